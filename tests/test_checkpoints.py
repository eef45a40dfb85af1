from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

import nadhooks
from nadhooks import methods, objectives
from nadhooks.checkpoints import KEY, Checkpoint, held
from nadhooks.errors import LearningError
from nadhooks.progress import Progress

from .interrupted import KINDS, net
from .nets import fair_line, images, labelled

RUN = {"method": "contrastive", "seed": 1}
METHOD = methods.contrastive(steps=8)


def table(value: float) -> dict[str, Tensor]:
    return {"a/b": torch.full((2, 3), value, dtype=torch.float64), "c": torch.full((2, 4), value)}


def loader() -> list[tuple[Tensor, Tensor]]:
    return labelled(fair_line(), images(64))


def learn(path: str | Path | None, **more: Any) -> nadhooks.Masks:
    options: dict[str, Any] = {"method": METHOD, "every": 0.0, "checkpoint": path} | more
    return nadhooks.learn(options.pop("model", fair_line()), loader(), options.pop("sites", "act1"), **options)


class Stop(Exception):
    pass


def stopped(path: Path, after: int = 5, **more: Any) -> bytes:
    """A run that was stopped after so many steps; gives what it left in the file."""

    def stop(progress: Progress) -> None:
        if progress.done == after:
            raise Stop

    with pytest.raises(Stop):
        learn(path, progress=stop, **more)
    return path.read_bytes()


def test_phases_go_on_where_they_stood(tmp_path: Path) -> None:
    path = tmp_path / "run"
    first = Checkpoint(path, 0.0, RUN)
    assert first.begin({"scores": table(0)}).step == 0
    first.note(1, {"scores": table(1), "state": {"m": torch.ones(2)}})
    first.note(-1, {"scores": table(2)})
    first.begin({"scores": table(0)})
    first.note(3, {"scores": table(4), "state": {"m": torch.zeros(2)}})
    second = Checkpoint(path, 0.0, RUN)
    steps = []
    for tables in ({"scores": table(2)}, {"scores": table(4), "state": {"m": torch.zeros(2)}}, {"scores": table(0)}):
        stand = second.begin({"scores": table(0)})
        steps.append(stand.step)
        torch.testing.assert_close(stand.tables, tables, rtol=0, atol=0)
    assert steps == [-1, 3, 0]
    second.remove()
    second.remove()
    assert not path.exists()


def test_it_is_written_now_and_then_only(tmp_path: Path) -> None:
    path = tmp_path / "run"
    rare = Checkpoint(path, 3600.0, RUN)
    rare.begin({"scores": table(0)})
    rare.note(1, {"scores": table(1)})
    assert not path.exists()
    rare.write()
    assert path.exists()
    nowhere = Checkpoint(None, 0.0, RUN)
    nowhere.begin({"scores": table(0)})
    nowhere.note(1, {"scores": table(1)})
    nowhere.write()
    nowhere.remove()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_killed_again_and_again_gives_the_same_masks_to_the_last_bit(kind: str, tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.interrupted", kind, str(tmp_path)],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) > 0  # times that there was something to go on from
    undisturbed, resumed = (torch.load(tmp_path / f"{name}.pt") for name in ("undisturbed", "resumed"))
    assert undisturbed.keys() == resumed.keys() == {"conv1", "act2"}
    assert all(torch.equal(undisturbed[site], resumed[site]) for site in undisturbed)
    assert not (tmp_path / "run.checkpoint").exists()


@pytest.mark.parametrize("cache", [0, 2_000, 10_000, 2**30])
def test_wherever_a_run_stops_it_ends_the_same(cache: int, tmp_path: Path) -> None:
    """With memory for none, for the outputs alone, for some sites and for all; each batch holds a wrong answer."""
    x = images(64)
    said = net()(x).argmax(1)
    right, wrong = x[said == 1][:6].split(3), x[said == 0][:2].split(1)
    data = [(torch.cat([a, b]), torch.ones(4).long()) for a, b in zip(right, wrong, strict=True)]

    def run(**more: Any) -> nadhooks.Masks:
        method = methods.nad(epochs=3, batch=4)
        return nadhooks.learn(net(), data, ["conv1", "act2"], method=method, cache=cache, **more)

    whole = run()
    for stop in range(1, 6):
        steps: list[Progress] = []

        def report(progress: Progress, steps: list[Progress] = steps, stop: int = stop) -> None:
            steps.append(progress)
            if len(steps) == stop:
                raise Stop

        with pytest.raises(Stop):
            run(checkpoint=tmp_path / "run", every=0.0, progress=report)
        resumed = run(checkpoint=tmp_path / "run", every=0.0)
        assert all(torch.equal(resumed[site], whole[site]) for site in ("conv1", "act2")), stop


@pytest.mark.parametrize("after", range(1, 8))
def test_sites_keep_their_turns_wherever_a_run_stops(after: int, tmp_path: Path) -> None:
    """They are compared by turns, in the order of the network, which is not that of their names."""
    sites, whole, resumed = ["conv1", "act1"], list[Progress](), list[Progress]()
    learn(None, sites=sites, progress=whole.append)
    stopped(tmp_path / "run", after, sites=sites)
    learn(tmp_path / "run", sites=sites, progress=resumed.append)
    assert [report.terms for report in resumed] == [report.terms for report in whole[after:]]


def test_what_was_done_is_not_done_again(tmp_path: Path) -> None:
    expected = learn(None)
    stopped(tmp_path / "run")
    reports: list[Progress] = []
    again = learn(tmp_path / "run", progress=reports.append)
    assert [report.done for report in reports] == [6, 7, 8]
    assert torch.equal(again["act1"], expected["act1"])
    assert not (tmp_path / "run").exists()


OTHER: list[tuple[str, dict[str, Any]]] = [
    ("seed", {"seed": 1}),
    ("method", {"method": "class-only"}),
    ("options", {"method": methods.contrastive(steps=8, momentum=0.5)}),
    ("method's estimator", {"method": replace(METHOD, estimator=methods.hard_concrete())}),
    ("method's estimator", {"method": replace(METHOD, estimator=methods.perturbed_topk(3.0))}),
    ("method's update", {"method": replace(METHOD, update=methods.averaged(methods.momentum_step(0.1), 0.65, 0.9))}),
    ("options", {"method": replace(METHOD, steps=20)}),
    ("keep", {"keep": 0.3}),
    ("sites", {"sites": "act2"}),
    ("labels", {"tasks": [0, 1]}),
    ("closed", {"closed": "zero"}),
    ("start", {"start": "taylor"}),
    ("outputs", {"tasks": [0, 1, 2], "outputs": {0: [1, 2], 1: [0], 2: [2]}}),
    ("autocast", {"autocast": torch.bfloat16}),
    ("cache", {"cache": 0}),
    ("weights", {"model": fair_line(3)}),
]


@pytest.mark.parametrize(("what", "other"), OTHER)
def test_the_checkpoint_of_another_run_is_refused_and_left_alone(
    what: str, other: dict[str, Any], tmp_path: Path
) -> None:
    path = tmp_path / "run"
    same: dict[str, Any] = {"tasks": [0, 1, 2]} if what == "outputs" else {}
    left = stopped(path, **same)
    with pytest.raises(LearningError, match=rf"is the checkpoint of another run: its {what} is .*, here .*; delete"):
        learn(path, **other)
    assert path.read_bytes() == left


def test_an_objective_with_another_weight_is_another_run(tmp_path: Path) -> None:
    def weighed(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table, weight: float
    ) -> Tensor:
        far = weight * objectives.binary_kl(student.outputs, teacher.outputs, samples.classes)
        return objectives.per_task(far, samples.rows, len(gates["act1"]))

    quick = replace(METHOD, closed="mean")
    left = stopped(tmp_path / "run", method=replace(quick, objective=partial(weighed, weight=1.0)))
    with pytest.raises(LearningError, match=r"another run: its method's objective is .*1\.0.*, here .*50\.0"):
        learn(tmp_path / "run", method=replace(quick, objective=partial(weighed, weight=50.0)))
    assert (tmp_path / "run").read_bytes() == left
    learn(tmp_path / "run", method=replace(quick, objective=partial(weighed, weight=1.0)))


def changed(data: list[tuple[Tensor, Tensor]], how: str) -> list[tuple[Tensor, Tensor]]:
    inputs, labels = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    if how == "a pixel":
        inputs = inputs.clone()
        inputs.view(-1)[7] += 1
    elif how == "the order":
        inputs, labels = inputs.flip(0), labels.flip(0)
    elif how == "a label":
        labels = labels.clone()
        labels[3] = (labels[3] + 1) % 3
    return list(zip(inputs.split(16), labels.split(16), strict=True))


@pytest.mark.parametrize("how", ["a pixel", "the order", "a label"])
@pytest.mark.parametrize("method", [METHOD, methods.nad(epochs=4, batch=4)])
def test_a_checkpoint_of_other_data_is_refused(method: methods.Method, how: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    left = stopped(path, method=method, tasks=[0, 1, 2])
    other = changed(loader(), how)
    options: dict[str, Any] = {"method": method, "tasks": [0, 1, 2], "checkpoint": path, "every": 0.0}
    with pytest.raises(LearningError, match=r"another run: its (data is other|loader showed other samples)"):
        nadhooks.learn(fair_line(), other, "act1", **options)
    assert path.read_bytes() == left
    resumed = nadhooks.learn(fair_line(), loader(), "act1", **options)
    assert torch.equal(resumed["act1"], learn(None, method=method, tasks=[0, 1, 2])["act1"])


def test_a_checkpoint_of_more_data_is_refused(tmp_path: Path) -> None:
    path, options = tmp_path / "run", {"method": methods.nad(epochs=4, batch=4), "tasks": [0, 1, 2], "every": 0.0}
    left = stopped(path, after=12, method=options["method"], tasks=[0, 1, 2])
    with pytest.raises(LearningError, match="another run: its loader showed more samples"):
        nadhooks.learn(fair_line(), loader()[:1], "act1", checkpoint=path, **options)  # type: ignore[arg-type]
    assert path.read_bytes() == left


@pytest.mark.parametrize("what", ["a value", "a step"])
def test_a_damaged_checkpoint_is_refused_and_left_alone(what: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    content = stopped(path)
    if what == "a value":
        content = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
    else:
        assert content.count(b'steps\\": [5]') == 1
        content = content.replace(b'steps\\": [5]', b'steps\\": [4]')
    path.write_bytes(content)
    with pytest.raises(LearningError, match="run is damaged; delete it to begin anew"):
        learn(path)
    assert path.read_bytes() == content


def test_a_run_without_a_checkpoint_keeps_nothing_of_its_phases() -> None:
    checkpoint = Checkpoint(None, 60.0, RUN)
    checkpoint.begin({"scores": table(1.0)})
    checkpoint.note(3, {"scores": table(2.0)})
    assert checkpoint.phases == []
    with pytest.raises(LearningError, match="checkpoint: expected a path, got 5"):
        learn(5)  # type: ignore[arg-type]


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "run"
    stopped(path)
    with safetensors.safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        told = json.loads(file.metadata()[KEY])
    old = {name: told[name] for name in ("run", "steps", "tensors")} | {"version": 5}  # it had neither data nor keys
    path.write_bytes(safetensors.torch.save(tensors, {KEY: json.dumps(old)}))
    with pytest.raises(LearningError, match="is the checkpoint of another run: its version is 5, here"):
        learn(path)


def test_what_an_update_remembers_has_to_be_tensors(tmp_path: Path) -> None:
    def update(scores: Any, gradients: Any, step: methods.Step, state: Any) -> None:
        state["n"] = 1

    with pytest.raises(LearningError, match="a checkpoint holds tensors, got int for 'n' in the state of an update"):
        learn(tmp_path / "run", method=replace(METHOD, update=update), every=3600.0)
    learn(None, method=replace(METHOD, update=update))


def test_a_checkpoint_of_other_held_out_data_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path / "run", held_out=loader())
    with pytest.raises(LearningError, match="another run: its held-out data is"):
        learn(tmp_path / "run", held_out=changed(loader(), "a pixel"))


def test_a_checkpoint_stays_where_it_was_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path)

    def move(progress: Progress) -> None:
        monkeypatch.chdir(tmp_path / "other")
        if progress.done == 5:
            raise Stop

    with pytest.raises(Stop):
        learn(Path("run"), progress=move)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other", "run"]
    monkeypatch.chdir(tmp_path)
    learn(Path("run"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["other"]


def test_of_two_runs_with_one_checkpoint_the_second_stops(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    first = Checkpoint(path, 0.0, RUN)
    second = Checkpoint(path, 0.0, RUN)
    for run in (first, second):
        run.begin({"scores": table(0)})
    first.note(1, {"scores": table(1)})
    with pytest.raises(LearningError, match="was written by another run meanwhile; name another file"):
        second.note(1, {"scores": table(2)})
    second.remove()
    first.note(2, {"scores": table(3)})
    third = Checkpoint(path, 0.0, RUN)
    assert third.begin({"scores": table(0)}).step == 2
    third.note(3, {"scores": table(4)})
    with pytest.raises(LearningError, match="was written by another run meanwhile"):
        first.note(3, {"scores": table(5)})
    first.remove()
    assert torch.equal(Checkpoint(path, 0.0, RUN).begin({"scores": table(0)}).tables["scores"]["c"], table(4)["c"])
    third.remove()
    assert not path.exists()


def test_a_checkpoint_that_was_deleted_meanwhile_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "run.safetensors"
    run = Checkpoint(path, 0.0, RUN)
    run.begin({"scores": table(0)})
    run.note(1, {"scores": table(1)})
    path.unlink()
    run.note(2, {"scores": table(2)})
    assert Checkpoint(path, 0.0, RUN).begin({"scores": table(0)}).step == 2


def test_a_checkpoint_of_other_tasks_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    left = stopped(path)
    two = [(x[y != 2], y[y != 2]) for x, y in loader()]
    with pytest.raises(LearningError, match="is the checkpoint of another run, of other tasks"):
        nadhooks.learn(fair_line(), two, "act1", method=METHOD, checkpoint=path, every=0.0)
    assert path.read_bytes() == left


def test_masks_that_a_run_began_from_belong_to_it(tmp_path: Path) -> None:
    first, second = (learn(None, seed=seed, method="random", keep=2) for seed in (5, 6))
    assert not torch.equal(first["act1"], second["act1"])
    left = stopped(tmp_path / "run", start=first)
    for other, what in ((second, "start"), (second.replaced(provenance=first.provenance), "first masks")):
        with pytest.raises(LearningError, match=f"another run: its {what} is"):
            learn(tmp_path / "run", start=other)
    assert (tmp_path / "run").read_bytes() == left
    assert torch.equal(learn(tmp_path / "run", start=first)["act1"], learn(None, start=first)["act1"])


def test_a_file_that_is_no_checkpoint_is_refused_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "run"
    good = stopped(path)
    masks = learn(None)
    masks.save(tmp_path / "masks")
    broken = [b"", b"hello", good[: len(good) // 2], good[:-1], (tmp_path / "masks").read_bytes()]
    broken.append(safetensors.torch.save({"a": torch.zeros(1)}))
    for content in broken:
        path.write_bytes(content)
        with pytest.raises(LearningError, match=r"run is not a checkpoint of nadhooks: .*; name another file"):
            learn(path)
        assert path.read_bytes() == content
    with pytest.raises(LearningError, match="is not a checkpoint of nadhooks"):
        learn(tmp_path)  # a folder
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(LearningError, match="is not a checkpoint of nadhooks"):
            learn(tmp_path / "pipe")


@pytest.mark.parametrize("where", ["missing/run", "file/run", "x" * 300])
def test_what_cannot_be_written_is_said_before_anything_is_learnt(where: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file, no folder")
    reports: list[Progress] = []
    with pytest.raises(LearningError, match="cannot write the checkpoint"):
        learn(tmp_path / where, progress=reports.append)
    assert reports == []


def test_nothing_is_left_of_a_run_that_never_began(tmp_path: Path) -> None:
    with pytest.raises(LearningError, match="no sample of task 2"):
        nadhooks.learn(
            fair_line(), [(x[y != 2], y[y != 2]) for x, y in loader()], "act1", tasks=3, checkpoint=tmp_path / "run"
        )
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_that_is_held_stays_until_masks_are_saved(tmp_path: Path) -> None:
    path, masks = tmp_path / "run", tmp_path / "masks"
    with pytest.raises(nadhooks.NadhooksError, match="cannot write"), held(path) as run:
        learn(run).save(tmp_path / "missing" / "masks")
    assert path.exists()
    reports: list[Progress] = []
    with held(path) as run:
        learn(run, progress=reports.append).save(masks)
        assert path.exists()
    assert not path.exists()
    assert reports == []  # nothing is learnt twice
    assert nadhooks.load(masks) == learn(None)
    with held(path) as run:  # masks in its place stay, too
        learn(run).save(path)
    assert nadhooks.load(path) == nadhooks.load(masks)
    with held(None) as nowhere:
        assert nowhere is None


def test_a_finished_run_of_other_data_is_refused_too(tmp_path: Path) -> None:
    options: dict[str, Any] = {"method": methods.nad(epochs=2, batch=4), "tasks": [0, 1, 2], "every": 0.0}

    def learn(data: Any, **more: Any) -> nadhooks.Masks:
        return nadhooks.learn(fair_line(), data, "act1", **options, **more)

    with held(tmp_path / "run") as run:
        masks = learn(loader(), checkpoint=run)
        with pytest.raises(LearningError, match="another run: its loader showed other samples"):
            learn(changed(loader(), "a pixel"), checkpoint=run)
        assert learn(loader(), checkpoint=run) == masks == learn(loader())


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_not_a_number_stops_the_run_and_the_last_good_state_stays(where: str, tmp_path: Path) -> None:
    path = tmp_path / "run"
    steps: list[int] = []

    def objective(
        student: methods.Pass, teacher: methods.Pass, samples: methods.Samples, gates: methods.Table
    ) -> Tensor:
        steps.append(len(steps) + 1)
        loss = gates["act1"].sum(1)
        if len(steps) < 6:
            return loss
        # the square root of 0 has no gradient, but a value
        return loss * torch.nan if where == "loss" else loss + (loss - loss.detach()).sqrt()

    with pytest.raises(LearningError, match=rf"the {where} is nan at step 6; .*the last good state is in .*run"):
        learn(path, method=objective)
    with safetensors.safe_open(str(path), "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert len(tensors) == 2  # scores and momentum
    assert all(bool(x.isfinite().all()) for x in tensors.values())
    assert '"steps": [5]' in file_metadata(path)


def file_metadata(path: Path) -> str:
    with safetensors.safe_open(str(path), "pt") as file:
        return file.metadata()["nadhooks-run"]


def test_masks_are_measured_before_the_checkpoint_goes(tmp_path: Path) -> None:
    """Whatever fails in the end, the work is not lost."""

    class Once:
        """Held-out samples that are there when the run begins."""

        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(loader())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nadhooks.learner, "recognition", lambda *args, **more: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            learn(tmp_path / "run", held_out=Once())
    assert (tmp_path / "run").exists()
    again = learn(tmp_path / "run", held_out=Once())
    assert set(again.quality) == {"recall", "fpr", "auc", "fpr95"}
    assert not (tmp_path / "run").exists()
