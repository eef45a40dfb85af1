"""Networks in which it is known what each class needs: that this is so, and that it is found."""

from __future__ import annotations

from typing import get_args

import pytest
import torch
from torch import Tensor

import nadhooks
from nadhooks.gates import Gates
from nadhooks.gating import Closed

from .planted import CLASSES, KINDS, SITES, Planted, planted

NOTHING = 1e-7  # of p(class)
SOMETHING = 5e-5


@pytest.fixture(scope="module", params=KINDS, ids=["-".join(kind) for kind in KINDS])
def plant(request: pytest.FixtureRequest) -> Planted:
    return planted(*request.param)


def says_yes(plant: Planted) -> Tensor:
    """(samples, classes) p(class)."""
    with torch.no_grad():
        return plant.model(plant.inputs).double().softmax(1)[:, :CLASSES]


def change(plant: Planted, gates: Gates, site: str, unit: int, before: Tensor) -> Tensor:
    with gates.close(site, [unit]):
        return (says_yes(plant) - before).abs()


@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_classes_need_what_was_planted_and_nothing_else(plant: Planted, closed: Closed) -> None:
    before = says_yes(plant)
    own = plant.labels[:, None] == torch.arange(CLASSES)  # (samples, classes)
    with nadhooks.attach(plant.model, list(plant.truth), closed=closed, example=plant.inputs[:1]) as gates:
        if closed == "mean":
            gates.calibrate(plant.loader)
        assert [site.name for site in gates.sites] == list(plant.truth)
        assert len(gates.sites) == SITES >= 3
        for site, part in plant.truth.items():
            for unit, needed in enumerate(part.T):  # (classes,)
                moved = change(plant, gates, site, unit, before)  # (samples, classes)
                for label in range(CLASSES):
                    mine, others = moved[own[:, label], label], moved[~own[:, label], label]
                    if needed[label]:
                        assert min(mine.mean(), others.mean()) > SOMETHING
                    else:
                        assert max(mine.max(), others.max()) < NOTHING


def test_classes_are_told_apart(plant: Planted) -> None:
    shown = plant.labels < CLASSES
    with torch.no_grad():
        answers = plant.model(plant.inputs).argmax(1)
    assert answers[shown].eq(plant.labels[shown]).double().mean() > 0.9
    assert (answers[~shown] >= CLASSES).double().mean() > 0.9


def test_distractors_are_never_still(plant: Planted) -> None:
    with nadhooks.attach(plant.model, list(plant.truth), example=plant.inputs[:1]) as gates:
        seen = {}
        with gates.watch(lambda site, x: seen.update({site.name: x.clone()})), torch.no_grad():
            plant.model(plant.inputs)
    for site, part in plant.truth.items():
        nobodys = ~part.any(0)
        assert nobodys.any()
        assert seen[site][:, nobodys].std(0).min() > 0.005


@pytest.mark.parametrize("closed", get_args(Closed))
def test_contrastive_finds_exactly_what_was_planted(plant: Planted, closed: Closed) -> None:
    assert plant.f1(plant.learn(keep=plant.keep, closed=closed).values).tolist() == [1.0] * CLASSES


def test_f1_is_1_for_the_truth_and_less_otherwise(plant: Planted) -> None:
    assert plant.f1(plant.truth).tolist() == [1.0] * CLASSES
    assert plant.f1({site: torch.ones_like(part) for site, part in plant.truth.items()}).max() < 0.9
    assert plant.f1({site: ~part for site, part in plant.truth.items()}).max() == 0
