"""Twelve models of both zoos: what `attach` promises holds on each of them."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import nadhooks
from examples.darts import SITES as DARTS_SITES
from examples.darts import imagenet_network
from nadhooks import sites, zoo

MODELS = {  # spec -> (blocks, channels, neurons, heads), 0 where there are none
    "timm:resnet18": (8, 21, 0, 0),
    "timm:vit_tiny_patch16_224": (12, 50, 12, 12),
    "timm:convnext_atto": (12, 41, 12, 0),
    "timm:efficientnet_b0": (16, 82, 16, 0),
    "timm:densenet121": (4, 121, 0, 0),
    "timm:swin_tiny_patch4_window7_224": (12, 53, 12, 12),
    "torchvision:vgg16": (15, 16, 2, 0),
    "torchvision:resnet50": (16, 54, 0, 0),
    "torchvision:densenet121": (4, 121, 0, 0),
    "torchvision:vit_b_16": (12, 38, 12, 12),
    "torchvision:swin_t": (12, 53, 12, 12),
    "torchvision:googlenet": (9, 58, 0, 0),
}


@pytest.fixture(scope="module", params=MODELS)
def spec(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(spec: str) -> Iterator[nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made = zoo.load_model(spec)
        for parameter in made.parameters():
            if parameter.abs().max() < 1e-3:  # zero-initialised branches and layer scales would hide the flow
                nn.init.uniform_(parameter.data, 0.5, 1.5)
        yield made


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(1))


def leaves(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def same(a: object, b: object) -> bool:
    return all(torch.equal(x, y) for x, y in zip(leaves(a), leaves(b), strict=True))


def test_every_selector_finds_its_sites(spec: str, model: nn.Module) -> None:
    for expected, selector in zip(
        MODELS[spec], (sites.blocks(), sites.channels(), sites.neurons(), sites.heads()), strict=True
    ):
        if not expected:
            with pytest.raises(nadhooks.NadhooksError, match="no site"):
                nadhooks.attach(model, selector)
            continue
        with nadhooks.attach(model, selector) as gates:
            assert len(gates.sites) == expected
            assert gates.wiring.number_of_nodes() == expected + 2
            assert all(gates.wiring.in_degree(site.name) and gates.wiring.out_degree(site.name) for site in gates.sites)


def test_open_gates_are_bit_identical(model: nn.Module, images: Tensor) -> None:
    state = copy.deepcopy(model.state_dict())

    def run() -> object:
        model.load_state_dict(state)  # batch norm's running statistics move in train mode
        with torch.random.fork_rng():
            torch.manual_seed(2)  # dropout and stochastic depth
            return model(images)

    try:
        for training in (False, True):
            model.train(training)
            bare = run()
            with nadhooks.attach(model) as gates:
                outside = run()
                with gates(0):
                    inside = run()
            assert same(outside, bare)
            assert same(inside, bare)
    finally:
        model.eval().load_state_dict(state)


def test_gradients_reach_every_gate_that_gates_something(model: nn.Module, images: Tensor) -> None:
    alive: dict[str, Tensor] = {}

    def see(site: nadhooks.Site, x: Tensor) -> None:
        alive[site.name] = x.detach().movedim(site.axis, 0).flatten(1).abs().amax(1) > 1e-6

    with nadhooks.attach(model) as gates:
        with gates(0), gates.watch(see):
            out = leaves(model(images))[0]
        out.mul(torch.randn(out.shape, generator=torch.Generator().manual_seed(3))).sum().backward(
            inputs=gates.parameters()
        )
        for site in gates.sites:
            gradient = gates.logits[site.name].grad
            assert gradient is not None
            reached = gradient[0] != 0
            # a unit that is alive may still meet a ReLU that both images leave shut (DenseNet has one right behind)
            assert reached[alive[site.name]].double().mean() > 0.8
            assert reached.any()


def test_a_closed_unit_equals_the_zeroed_channel(model: nn.Module, images: Tensor) -> None:
    modules = dict(model.named_modules())
    largest: dict[str, int] = {}

    def see(site: nadhooks.Site, x: Tensor) -> None:
        largest[site.name] = int(x.detach().movedim(site.axis, 0).flatten(1).abs().sum(1).argmax())

    with nadhooks.attach(model) as gates:
        with gates.watch(see):
            bare = model(images)
        for site in (gates.sites[0], gates.sites[len(gates.sites) // 2], gates.sites[-1]):
            unit = largest[site.name]

            def zeroed(
                module: nn.Module, args: object, output: Tensor, site: nadhooks.Site = site, unit: int = unit
            ) -> Tensor:
                output = output.clone()
                output.select(site.axis, unit).zero_()
                return output

            with gates.close(site.name, unit):
                closed = model(images)
            handle = modules[site.module].register_forward_hook(zeroed)
            by_hand = model(images)
            handle.remove()
            assert same(closed, by_hand)
            assert not same(closed, bare)


def test_detach_leaves_nothing_behind(model: nn.Module) -> None:
    model.train()
    for module in list(model.modules())[::3]:
        module.training = False
    first = next(model.parameters())
    first.requires_grad_(False)
    flags = [module.training for module in model.modules()]
    state = copy.deepcopy(model.state_dict())
    keys = [set(vars(module)) for module in model.modules()]
    with nadhooks.attach(model):
        assert any(module._forward_hooks for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert [module.training for module in model.modules()] == flags
    assert [set(vars(module)) for module in model.modules()] == keys
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    assert all(p.grad is None for p in model.parameters())
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    first.requires_grad_(True)
    model.eval()


@pytest.mark.parametrize(
    ("model", "globs", "number", "units"),
    [
        ("torchvision:vgg16", ["features.[1469]", "features.1[1368]", "features.2[0357]", "features.30"], 13, 4224),
        ("torchvision:resnet50", ["maxpool", "layer?.*"], 17, 15168),
        (
            "torchvision:densenet121",
            ["features.pool0", "features.denseblock[123]", "features.transition?", "features.norm5"],
            8,
            3776,
        ),
        ("examples/darts.py:imagenet_network", DARTS_SITES, 16, 6624),
    ],
)
def test_the_papers_sites(model: str, globs: list[str], number: int, units: int) -> None:
    network = imagenet_network() if model.startswith("examples") else zoo.load_model(model)
    with nadhooks.attach(network, globs) as gates:
        assert len(gates.sites) == number
        assert sum(site.units for site in gates.sites) == units
        assert {site.axis for site in gates.sites} == {1}
        if "darts" in model:  # each cell reads the two before it
            assert set(gates.wiring.predecessors("cells.6")) == {"cells.4", "cells.5"}
