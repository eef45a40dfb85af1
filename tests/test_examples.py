"""The examples' pieces, in settings small enough for a test."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from examples import segmentation
from nadhooks.methods import Pass, Samples


@pytest.fixture(scope="module")
def held_out() -> list[segmentation.Canvases]:
    return list(itertools.islice(segmentation.canvases("test", seed=2), 3))


def test_canvases_show_the_digits_that_their_labels_say(held_out: list[segmentation.Canvases]) -> None:
    for canvas in held_out:
        for image, labels, pixels in zip(*canvas, strict=True):
            assert labels.nonzero()[:, 0].tolist() == [label for label in pixels.unique().tolist() if label < 10]
            assert 1 <= labels.sum() <= 3
            assert image[0][pixels < 10].mean() > image[0][pixels == 10].mean() + 0.4
    again = next(segmentation.canvases("test", seed=2))
    assert torch.equal(again.images, held_out[0].images)


def test_the_dense_objective_looks_at_the_tasks_own_channel_alone() -> None:
    torch.manual_seed(0)
    teacher = torch.randn(3, 11, 2, 2, dtype=torch.float64)
    student = teacher.clone()
    student[1, 4] += 1  # the channel of another digit, which only moves what is not 2
    student[2, 2, 0, 0] += 1
    samples = Samples(torch.tensor([0, 0, 1]), torch.tensor([2, 4, 2]), torch.tensor([True, False, True]))
    gates = {"site": torch.ones(2, 5)}
    terms = segmentation.pixelwise(Pass(student, {}), Pass(teacher, {}), samples, gates)
    p, q = teacher.softmax(1), student.softmax(1)

    def far(sample: int, digit: int) -> float:
        a, b = p[sample, digit], q[sample, digit]
        return float((a * (a / b).log() + (1 - a) * ((1 - a) / (1 - b)).log()).mean())

    assert terms["with the digit"].tolist() == pytest.approx([0, far(2, 2)])
    assert terms["without"].tolist() == pytest.approx([far(1, 4), 0])
    assert far(1, 4) > 0 < far(2, 2)


def test_a_digits_part_segments_it_and_a_random_part_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NADHOOKS_CACHE", str(tmp_path))
    kinds, widths = (0, 1, 4), (16, 24, 32)
    held_out = list(itertools.islice(segmentation.canvases("test", 2, kinds), 1))
    model = segmentation.trained(60, widths, kinds)
    method = replace(segmentation.METHOD, steps=60)
    masks = segmentation.learnt(model, 4, kinds, method=method, keep=0.6)
    assert masks.labels == kinds
    found = segmentation.measured(model, masks, held_out, draws=2)
    for row in range(len(kinds)):
        full, own, _, random = (float(values[row]) for values in found.values())
        assert full > 0.5
        assert own > 0.5 * full
        assert own > random + 0.25
    assert found["its own part"].mean() > found["other digits' parts"].mean() + 0.05
    assert [site.name for site in masks.sites] == ["down.0", "down.1", "down.2", "up.0", "up.1"]
    assert {data["join"] for _, _, data in masks.wiring.edges(data=True)} >= {"sequential", "concatenation"}
    segmentation.picture(model, masks, held_out[0], kinds[:2]).savefig(tmp_path / "canvases.png")
    assert (tmp_path / "canvases.png").read_bytes().startswith(b"\x89PNG")
    kept = segmentation.trained(60, widths, kinds)
    assert torch.equal(kept(held_out[0].images), model(held_out[0].images))
