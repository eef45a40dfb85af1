"""`torch.set_default_device` is the user's: ours are made where they belong, whatever it says.

The meta device stands in for a GPU: what is made on it by mistake has no numbers, and ends in an error or a difference.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks import analysis, evaluation, methods
from nadhooks.default_device import made_on_cpu, users_device

IMAGES = torch.rand(48, 1, 8, 8, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(48) % 3
LOADER = list(zip(IMAGES.split(16), LABELS.split(16), strict=True))
ELSEWHERE = torch.device("meta")
FEW: dict[str, methods.Method] = {
    "contrastive": methods.contrastive(steps=3),
    "class-only": methods.class_only(steps=3),
    "nad": methods.nad(epochs=1),
    "random": methods.random(),
    "activation": methods.activation(images=4),
    "taylor": methods.taylor(images=4),
    "routing": methods.routing(images=2, steps=2),
}


@functools.cache
def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 8, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3),
    ).eval()  # fmt: skip


def learn(method: methods.Method, **more: Any) -> nadhooks.Masks:
    return nadhooks.learn(model(), LOADER, ["1", "3"], method=method, **more)


@functools.cache
def masks() -> nadhooks.Masks:
    return learn(FEW["contrastive"])


@functools.cache
def graph() -> Any:
    return nadhooks.unit_flow(model(), masks(), 0, IMAGES[LABELS == 0], nodes=1.0)


def figures(masks: nadhooks.Masks) -> list[Tensor]:
    return [*masks.values.values(), *masks.constants.values(), *masks.quality.values()]


def with_gates() -> list[Tensor]:
    gates = nadhooks.attach(model(), ["1", "3"], tasks=[0, 1, 2], example=IMAGES[:1])
    try:
        found = [*map(Tensor.detach, gates.parameters())]
        gates.load(masks())
        gates.rewire(IMAGES[:1])
        for labels in (0, [0, 1], LABELS[:2]):
            with gates(labels):
                found.append(model()(IMAGES[:2]).detach())
        with gates(0), gates.close("1", [0, 2]):
            found.append(model()(IMAGES[:2]).detach())
        gates.calibrate(LOADER)
        rows = evaluation.recognition(gates, LOADER, masks())
        return [*found, *figures(gates.masks()), *evaluation.quality(rows).values()]
    finally:
        gates.detach()


def of_graph(graph: Any) -> list[Tensor]:
    numbers = [x for *_, data in [*graph.nodes(data=True), *graph.edges(data=True)] for x in data.values()]
    return [torch.tensor([x for x in numbers if isinstance(x, (int, float))], dtype=torch.float64, device="cpu")]


def folded() -> list[Tensor]:
    part = nadhooks.sub_architecture(model(), masks(), 1, example=IMAGES[:1])
    smaller = nadhooks.shrink(part, example=IMAGES[:1], multiple=1)
    return [part(IMAGES).detach(), smaller(IMAGES).detach(), *map(Tensor.detach, smaller.parameters())]


def seen() -> list[Tensor]:
    shown = nadhooks.what_units_see(model(), graph(), masks().sites, LOADER)
    units = [data for _, data in shown.nodes(data=True) if data["kind"] == "unit"]
    numbers = [[each[key] for each in data["sees"] for key in ("image", "activation")] for data in units]
    return [*of_graph(shown), torch.tensor(numbers, device="cpu")]


def overlap() -> list[Tensor]:
    curve = [x for stage in analysis.overlap_curve(masks()) for x in (stage.overlap, stage.chance)]
    return [torch.tensor([analysis.communities(masks()).modularity, *curve], device="cpu")]


WORK: dict[str, Callable[[], list[Tensor]]] = {
    **{name: functools.partial(lambda method: figures(learn(method)), method) for name, method in FEW.items()},
    "held out": lambda: figures(learn(FEW["contrastive"], held_out=LOADER)),
    "fidelity": lambda: figures(learn(FEW["class-only"], fidelity=0.5)),
    "budget": lambda: figures(learn(FEW["taylor"], keep=methods.Budget(0.5, by="parameters"))),
    "start": lambda: figures(learn(FEW["class-only"], start="taylor")),
    "gates": with_gates,
    "sets": lambda: figures((masks() & masks().hard()) | (masks() - masks())),
    "similarity": lambda: [masks().jaccard(), *masks().agreement(masks()).values(), masks().kept()],
    "shuffled": lambda: figures(evaluation.shuffled(masks())),
    "flow": lambda: of_graph(nadhooks.flow_graph(masks(), 0)),
    "units": lambda: of_graph(nadhooks.unit_flow(model(), masks(), 0, IMAGES[LABELS == 0], nodes=1.0)),
    "overlap": overlap,
    "folded": folded,
    "seen": seen,
}


@pytest.mark.parametrize("work", WORK)
def test_another_default_device_changes_nothing(work: str) -> None:
    expected = WORK[work]()
    with ELSEWHERE:
        found = WORK[work]()
        assert torch.empty(0).device == ELSEWHERE
    assert [x.device.type for x in found] == ["cpu"] * len(expected)
    assert all(map(torch.equal, found, expected))
    assert sum(x.numel() for x in found)


def test_models_and_loaders_have_the_users_default_device() -> None:
    said = []

    class Asks(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            said.append(torch.empty(0).device)
            return super().forward(x)

    class Loader:
        def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
            for images, labels in LOADER:
                said.append(torch.empty(0).device)
                yield images.flatten(1), labels

    asking = nn.Sequential(nn.Linear(64, 4), nn.ReLU(), Asks(4, 3))
    with ELSEWHERE:
        nadhooks.learn(asking, Loader(), ["1"], method=FEW["class-only"])
    assert len(said) > len(LOADER)
    assert set(said) == {ELSEWHERE}


def test_default_device_set_for_good_is_given_back_after_errors() -> None:
    torch.set_default_device(ELSEWHERE)
    try:
        with pytest.raises(nadhooks.NadhooksError):
            nadhooks.learn(model(), [], ["1"])
        assert torch.empty(0).device == ELSEWHERE
    finally:
        torch.set_default_device(None)


def test_inside_another_that_is_made_on_the_cpu() -> None:
    @made_on_cpu
    def inner() -> list[torch.device]:
        with users_device():
            return [torch.empty(0).device, *innermost()]

    @made_on_cpu
    def innermost() -> list[torch.device]:
        return [torch.empty(0).device]

    with ELSEWHERE:
        assert inner() == [ELSEWHERE, torch.device("cpu")]
    assert inner() == [torch.device("cpu")] * 2
