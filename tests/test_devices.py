"""Models on another device than the CPU, where images, labels and masks come from."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks import methods, objectives, sites
from nadhooks.evaluation import quality, recognition

from .second_device import There, moved, second_device

CLASSES = 3
FAST = methods.contrastive(steps=3, images=8)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    with second_device(monkeypatch) as device:
        yield device


def network(name: str = "resnet10t") -> nn.Module:
    torch.manual_seed(0)
    vit = {"img_size": 32, "patch_size": 8, "depth": 2}
    options: dict[str, Any] = vit if name.startswith("vit") else {"zero_init_last": False}
    return timm.create_model(name, num_classes=CLASSES, in_chans=1, **options).eval()


def batches() -> list[tuple[Tensor, Tensor]]:
    random = torch.Generator().manual_seed(0)
    return [(torch.randn(9, 1, 32, 32, generator=random), torch.arange(9) % CLASSES) for _ in range(4)]


def test_the_second_device_refuses_to_be_mixed_with_the_first(device: torch.device) -> None:
    here = torch.arange(6.0).reshape(2, 3)
    there = here.to(device)
    assert there.device == device != here.device
    assert isinstance(there.flatten() + torch.ones(6, device=device) * torch.tensor(2.0), There)
    assert torch.equal((there[here[:, 0] > 0] * 2).cpu(), here[1:] * 2)
    for mixed in (lambda: there + here, lambda: torch.cat([there, here]), lambda: here[there[:, 0] > 0]):
        with pytest.raises(RuntimeError, match="expected tensors on one device"):
            mixed()


@pytest.mark.parametrize(
    "options",
    [
        {"method": FAST},
        {"method": FAST, "closed": "zero", "cache": 0},
        {"method": FAST, "keep": methods.Budget(0.5, over="site"), "held_out": batches()},
        {"method": FAST, "keep": 0.15},
        {"method": FAST, "keep": methods.Budget(0.5, by="flops"), "start": "taylor"},
        {"method": "activation", "keep": None, "fidelity": 5.0},
        {"method": methods.class_only(steps=3, images=8)},
        {"method": methods.nad(epochs=2), "keep": None},
        {"method": "activation"},
        {"method": "routing"},
        {"method": "random"},
    ],
    ids=lambda options: ", ".join(
        f"{key} {getattr(value, 'name', value)}" for key, value in options.items() if key != "held_out"
    ),
)
def test_masks_are_the_cpus_to_the_last_bit(device: torch.device, options: dict[str, Any]) -> None:
    def learnt(model: nn.Module) -> nadhooks.Masks:
        return nadhooks.learn(model, batches(), seed=0, **{"keep": 0.5, **options})

    model = network()
    expected, found = learnt(copy.deepcopy(model)), learnt(moved(model))
    assert found == expected


@pytest.mark.parametrize(("name", "choice"), [("resnet10t", sites.blocks()), ("vit_tiny_patch16_224", sites.heads())])
def test_masks_and_flow_there_are_the_cpus(device: torch.device, name: str, choice: Any) -> None:
    data, shown = batches(), batches()[0][0][:2]

    def results(model: nn.Module, images: Tensor) -> tuple[dict[str, Tensor], list[Any]]:
        masks = nadhooks.learn(model, data, keep=0.8, sites=choice, method=FAST)
        with nadhooks.attach(model, masks.sites, tasks=list(masks.labels), example=images) as gates:
            gates.load(masks)
            measured = quality(recognition(gates, data, masks))
            gates.rewire()
            with torch.no_grad(), gates(torch.arange(2)):
                outputs = model(images).cpu()
        graph = nadhooks.unit_flow(model, masks, 0, images, regions=1)
        proof = nadhooks.verify(model, masks, graph, images, units=4, patches=8)
        seen = nadhooks.what_units_see(model, graph, masks.sites, data)
        folded = nadhooks.sub_architecture(model, masks, 0, example=images)(images).detach().cpu()
        weights = {edge: about["weight"] for edge, about in graph.edges.items()}
        proven = [*proof.edges.measured, proof.removal.logit]
        return dict(masks.values), [dict(masks.constants), measured, outputs, weights, proven, len(seen), folded]

    model = network(name)
    gates, figures = results(moved(copy.deepcopy(model)), shown.to(device))
    expected, expected_figures = results(model, shown)
    torch.testing.assert_close(gates, expected, rtol=0, atol=0)
    torch.testing.assert_close(figures, expected_figures, rtol=1e-3, atol=1e-5)  # attention takes other kernels there


def test_gates_train_there(device: torch.device) -> None:
    images, labels = batches()[0]
    model = moved(network())
    with nadhooks.attach(model, tasks=CLASSES, example=images[:1].to(device)) as gates:
        optimiser = torch.optim.SGD(gates.parameters(), 0.1)
        before = [logits.detach().cpu() for logits in gates.parameters()]
        for rows in (labels, labels.to(device)):
            with gates(rows):
                loss = model(images.to(device)).square().mean()
            (loss + objectives.squared_gates(gates.values()).mean()).backward()
            optimiser.step()
        assert all(isinstance(logits.data, There) for logits in gates.parameters())
        assert not any(
            torch.equal(logits.detach().cpu(), x) for logits, x in zip(gates.parameters(), before, strict=True)
        )
