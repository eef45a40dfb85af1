from __future__ import annotations

import csv
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nadhooks
from nadhooks import methods
from nadhooks.checkpoints import Checkpoint
from nadhooks.errors import LearningError
from nadhooks.evaluation import recognition
from nadhooks.progress import Clock, Progress, csv_log, tensorboard_log

from .nets import fair_line, images, labelled

MEASURES = ("recall", "fpr", "auc", "fpr95")


def loader(seed: int = 1) -> list[tuple[Tensor, Tensor]]:
    return labelled(fair_line(), images(64, seed))


def reported(**options: Any) -> tuple[nadhooks.Masks, list[Progress]]:
    reports: list[Progress] = []
    data = options.pop("loader", loader())
    told = [reports.append, *options.pop("also", [])]
    return nadhooks.learn(fair_line(), data, ["act1", "act2"], progress=told, **options), reports


def test_every_step_is_reported() -> None:
    masks, reports = reported(method=methods.contrastive(steps=12, positives=3, negatives=5), keep=0.4)
    assert [report.done for report in reports] == list(range(1, 13))
    assert {report.total for report in reports} == {12}
    assert [report.samples for report in reports] == [24 * done for done in range(1, 13)]
    assert reports[0].seconds_left is None
    assert all(report.seconds_left is not None and report.seconds_left >= 0 for report in reports[1:])
    assert reports[-1].seconds_left == 0
    kept = [report.kept for report in reports]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > 0.7
    assert kept[-1] == pytest.approx(float(masks.kept().mean())) == pytest.approx(4 / 9)


def test_samples_are_counted_over_all_chunks_of_tasks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("nadhooks.learner.SAMPLES_PER_PASS", 16)  # two of the three tasks at a time
    method = methods.contrastive(steps=5, positives=3, negatives=5)
    _, reports = reported(method=method)
    counted = [*range(16, 81, 16), *range(88, 121, 8)]
    assert [report.samples for report in reports] == counted
    assert [report.seconds_left is None for report in reports] == [True] + 9 * [False]

    def stop(progress: Progress) -> None:
        if progress.done == 7:
            raise KeyboardInterrupt

    files: dict[str, Any] = {"method": method, "checkpoint": tmp_path / "run", "every": 0.0}
    with pytest.raises(KeyboardInterrupt):
        nadhooks.learn(fair_line(), loader(), ["act1", "act2"], progress=stop, **files)
    _, rest = reported(**files)
    assert [report.samples for report in rest] == counted[7:]


def test_a_term_does_not_hide_what_is_always_logged() -> None:
    progress = Progress(1, 2, 3.0, 4, 5.0, {"loss": 10.0, "seconds_left": 11.0, "mine": 12.0}, 0.5)
    assert progress.numbers() == {
        "loss": 3.0, "samples": 4, "kept": 0.5, "seconds_left": 5.0,
        "term loss": 10.0, "term seconds_left": 11.0, "mine": 12.0,
    }  # fmt: skip


@pytest.mark.parametrize("method", ["random", "activation"])
def test_baselines_that_look_at_no_output_are_measured_if_that_is_asked_for(method: str) -> None:
    masks, _ = reported(method=method, held_out=loader(2))
    assert set(masks.quality) == set(MEASURES)
    assert torch.equal(masks["act1"], reported(method=method)[0]["act1"])


def test_held_out_samples_that_are_no_numbers_are_refused_at_once() -> None:
    (x, y), *others = loader(2)
    x = x.clone()
    x.view(-1)[0] = torch.nan
    with pytest.raises(LearningError, match="held_out: expected images that are finite numbers"):
        reported(held_out=[(x, y), *others])


@pytest.mark.parametrize(
    ("method", "terms"),
    [
        (methods.nad(epochs=1), {"cross-entropy", "distance", "gates"}),
        (methods.routing(images=2, steps=3), {"cross-entropy", "gates"}),
        (methods.taylor(images=8), {"objective"}),
    ],
)
def test_the_terms_add_up_to_the_loss(method: methods.Method, terms: set[str]) -> None:
    _, reports = reported(method=method)
    for report in reports:
        assert set(report.terms) == terms
        assert sum(report.terms.values()) == pytest.approx(report.loss, rel=1e-12)


def test_terms_of_ones_own_are_told_by_their_names() -> None:
    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> dict[str, Tensor]:
        return {"first": gates["act1"].sum(1), "second": 2 * gates["act2"].sum(1)}

    _, reports = reported(method=objective, keep=1.0)
    assert reports[-1].terms == {"first": 4, "second": 10}
    assert reports[-1].loss == 14


def test_several_reports_hear_the_same() -> None:
    first: list[Progress] = []
    second: list[Progress] = []
    nadhooks.learn(
        fair_line(), loader(), "act1", method=methods.contrastive(steps=3), progress=[first.append, second.append]
    )
    assert first == second
    assert len(first) == 3


def test_time_left_is_at_the_pace_since_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    clock = Clock()
    assert clock.left(5, 20) is None  # a run that goes on at its fifth step
    now[0] += 3
    assert clock.left(6, 20) == 3 * 14
    now[0] += 1
    assert clock.left(7, 20) == 2 * 13
    assert clock.left(7, 0) is None


@pytest.mark.parametrize(
    "method", [methods.contrastive(steps=30), methods.contrastive(steps=25), methods.nad(epochs=4, batch=4)]
)
def test_held_out_figures_come_ten_times_and_are_those_of_recognition(method: methods.Method) -> None:
    held_out = loader(seed=9)
    masks, reports = reported(method=method, held_out=held_out)
    told = [report for report in reports if report.held_out]
    assert len(told) == 10
    assert told[-1] is reports[-1]
    model = fair_line()
    with nadhooks.attach(model, masks.sites, example=images(1)) as gates:
        found = recognition(gates, held_out, masks)
    assert masks.provenance["quality"] == {"images": 64}
    for measure in MEASURES:
        expected = [getattr(figures, measure) for figures in found]
        assert masks.quality[measure].tolist() == pytest.approx(expected, abs=1e-6)
        assert reports[-1].held_out[measure] == pytest.approx(sum(expected) / 3, abs=1e-6)


def test_held_out_figures_come_from_loaders_without_a_length_too_once_they_were_read() -> None:
    class Stream:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(loader())

    method = methods.nad(epochs=10, batch=4)
    masks, reports = reported(method=method, held_out=loader(seed=9), loader=Stream())
    expected, of_known_length = reported(method=method, held_out=loader(seed=9))
    assert masks == expected
    assert sum(bool(report.held_out) for report in reports) == 10
    assert reports[-1].held_out == of_known_length[-1].held_out
    assert reports[-1].seconds_left == 0


def test_tasks_that_are_learnt_one_by_one_are_told_ten_times_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nadhooks.learner, "SAMPLES_PER_PASS", 8)
    masks, reports = reported(method=methods.contrastive(steps=10, positives=4, negatives=4), held_out=loader(seed=9))
    told = [report for report in reports if report.held_out]
    assert [report.done for report in told] == [3, 6, 9, 12, 15, 18, 21, 24, 27, 30]
    assert reports[-1].held_out["auc"] == pytest.approx(float(masks.quality["auc"][2]), abs=1e-6)


def test_held_out_figures_are_of_no_consequence() -> None:
    x, labels = (torch.cat(parts) for parts in zip(*loader(), strict=True))
    shuffling: Any = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 9, shuffle=True)
    method = methods.nad(epochs=3)

    def draw(progress: Progress) -> None:
        torch.rand(3)

    alone = nadhooks.learn(fair_line(), shuffling, ["act1", "act2"], method=method)
    told, reports = reported(loader=shuffling, method=method, held_out=shuffling)
    silent = nadhooks.learn(fair_line(), shuffling, ["act1", "act2"], method=method, held_out=shuffling)
    drawing = nadhooks.learn(fair_line(), shuffling, ["act1", "act2"], method=method, progress=draw)
    assert any(report.held_out for report in reports)
    for other in (told, silent, drawing):
        assert all(torch.equal(alone[site], other[site]) for site in ("act1", "act2"))


def test_held_out_data_is_read_once_and_may_be_an_iterator() -> None:
    masks, reports = reported(method=methods.contrastive(steps=10), held_out=iter(loader(seed=9)))
    expected, _ = reported(method=methods.contrastive(steps=10), held_out=loader(seed=9))
    assert sum(bool(report.held_out) for report in reports) == 10
    assert all(torch.equal(masks.quality[measure], expected.quality[measure]) for measure in MEASURES)


@pytest.mark.parametrize("method", [methods.nad(epochs=1), methods.contrastive(steps=2)])
def test_held_out_data_without_a_class_is_refused_before_anything_is_learnt(method: methods.Method) -> None:
    reports: list[Progress] = []
    for held_out, message in (
        ([(x[y != 1], y[y != 1]) for x, y in loader()], "held_out: expected samples of task 1 and of others, got 0 of"),
        ([(x[y == 0], y[y == 0]) for x, y in loader()], "held_out: expected samples of task 0 and of others"),
        ([], "got an empty one"),
    ):
        with pytest.raises(LearningError, match=message):
            nadhooks.learn(fair_line(), loader(), "act1", method=method, held_out=held_out, progress=reports.append)
    assert reports == []


def test_rows_are_added_to_a_table(tmp_path: Path) -> None:
    path = tmp_path / "run.csv"
    reports: list[Progress] = []
    for _ in range(2):
        nadhooks.learn(
            fair_line(),
            loader(),
            "act1",
            method=methods.contrastive(steps=3),
            progress=[csv_log(path), reports.append],
            held_out=loader(seed=9),
        )
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "measure", "value"]
    found = [(int(row["step"]), row["measure"], float(row["value"])) for row in rows]
    expected = [(report.done, name, value) for report in reports for name, value in report.numbers().items()]
    assert [row[:2] for row in found] == [row[:2] for row in expected]
    assert [row[2] for row in found] == pytest.approx([row[2] for row in expected], rel=1e-5)
    assert {"loss", "samples", "kept", "seconds_left", "held-out recall"} <= {row[1] for row in found}


def test_a_table_stays_where_it_was_begun_and_goes_on_behind_half_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.csv").write_text("step,measure,value\n7,lo", encoding="utf-8")
    report = csv_log("run.csv")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    report(Progress(8, 9, 0.5, 3))
    rows = (tmp_path / "run.csv").read_text(encoding="utf-8").splitlines()
    assert rows == ["step,measure,value", "7,lo", "8,loss,0.5", "8,samples,3", "8,kept,1"]


@pytest.mark.parametrize(
    "options",
    [
        {"method": methods.contrastive(steps=8)},
        {"method": methods.nad(epochs=2, batch=4)},  # several steps for a batch of the loader
        {"method": methods.contrastive(steps=3, images=20), "fidelity": 0.5},  # a run for each share
    ],
)
def test_steps_that_are_done_again_after_a_stop_are_in_the_table_once(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, steps = tmp_path / "run.csv", list[Progress]()

    def stop(progress: Progress) -> None:
        steps.append(progress)
        if len(steps) == 7:
            raise KeyboardInterrupt

    def rows() -> list[str]:
        return [row for row in path.read_text(encoding="utf-8").splitlines() if ",seconds_left," not in row]

    reported(**options, also=[csv_log(path)])
    whole = rows()
    path.unlink()
    files: dict[str, Any] = {"checkpoint": tmp_path / "run", "every": 0.0}
    write = Checkpoint.write
    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "write", lambda self: None if len(steps) > 3 else write(self))
        with pytest.raises(KeyboardInterrupt):
            reported(**options, **files, also=[csv_log(path), stop])
    assert (tmp_path / "run").exists()
    assert rows() == whole[: len(rows())]
    _, rest = reported(**options, **files, also=[csv_log(path)])
    assert all(report.resumed for report in rest)
    assert rest[0] == steps[4]._replace(resumed=True, seconds_left=None)  # three steps are done again
    assert rows() == whole


def test_terms_of_any_name_can_be_logged(tmp_path: Path) -> None:
    csv_log(tmp_path / "run.csv")(Progress(1, 2, 0.5, terms={'größe, "x"': 0.5}))
    with (tmp_path / "run.csv").open(newline="", encoding="utf-8") as file:
        assert ["1", 'größe, "x"', "0.5"] in list(csv.reader(file))


def test_a_table_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(LearningError, match=r"cannot write the log .*run\.csv"):
        csv_log(tmp_path / "missing" / "run.csv")


class Writer:
    def __init__(self) -> None:
        self.scalars: list[tuple[str, float, int]] = []
        self.flushed = 0

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars.append((name, value, step))

    def flush(self) -> None:
        self.flushed += 1


def test_numbers_go_to_tensorboard() -> None:
    writer = Writer()
    reports: list[Progress] = []
    nadhooks.learn(
        fair_line(),
        loader(),
        "act1",
        method=methods.contrastive(steps=3),
        progress=[tensorboard_log(writer), reports.append],
        held_out=loader(seed=9),
    )
    assert writer.flushed == 3
    for report in reports:
        told = {name: value for name, value, step in writer.scalars if step == report.done}
        assert told["loss"] == report.loss
        assert told["held-out/auc"] == report.held_out["auc"]
        assert len(told) == len(report.numbers())


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    """What TensorBoard reads in a folder."""
    events: Any = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(name)]


def test_a_folder_is_enough_for_tensorboard(tmp_path: Path) -> None:
    tensorboard_log(tmp_path / "run")(Progress(3, 4, 0.25))
    assert scalars(tmp_path / "run", "loss") == [(3, 0.25)]


def test_steps_that_are_done_again_are_in_tensorboard_once(tmp_path: Path) -> None:
    first = tensorboard_log(tmp_path)
    for step in range(1, 6):
        first(Progress(step, 9, step / 8, 12 * step))
    again = tensorboard_log(tmp_path)
    for step in range(3, 10):
        again(Progress(step, 9, step / 8, 12 * step, resumed=True))
    assert scalars(tmp_path, "loss") == [(step, step / 8) for step in range(1, 10)]
    anew = tensorboard_log(tmp_path)
    anew(Progress(1, 9, 0.5, 12))
    assert scalars(tmp_path, "loss")[-1] == (1, 0.5)


def test_a_folder_that_cannot_be_written_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(LearningError, match=r"cannot write the log .*file"):
        tensorboard_log(tmp_path / "file")


def test_without_tensorboard_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(LearningError, match="logging to TensorBoard needs its package: pip install tensorboard"):
        tensorboard_log(tmp_path)
