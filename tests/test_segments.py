from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks.segments import Cut, Gating, Replay, gated, replaying
from nadhooks.sites import Site

from .nets import Line, images, seeded


def half_open(model: nn.Module, sites: object, x: Tensor) -> tuple[tuple[Site, ...], Gating]:
    """Random hard gates at these sites."""
    with nadhooks.attach(model, sites, example=x[:1]) as gates:  # type: ignore[arg-type]
        random = torch.Generator().manual_seed(0)
        return gates.sites, {
            site.name: ((torch.rand(1, site.units, generator=random) > 0.3).to(x), None) for site in gates.sites
        }


def first_logit(outputs: Tensor) -> Tensor:
    return outputs[:, 0].sum()


MODELS: dict[str, tuple[dict[str, Any], Any]] = {
    "resnet18": ({"channels": (8, 8, 16, 16)}, None),
    "seresnext26d_32x4d": ({}, None),
    "densenet121": ({"growth_rate": 4, "block_config": (2, 2, 2, 2)}, "features.denseblock*"),
    "vit_tiny_patch16_224": ({"img_size": 64, "depth": 3, "embed_dim": 48}, None),
    "mobilenetv3_small_050": ({}, None),
}


@pytest.mark.parametrize("name", MODELS)
def test_replayed_segments_are_what_they_were_and_modules_before_do_not_run_again(name: str) -> None:
    options, chosen = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = timm.create_model(name, **options).eval()
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    sites, gates = half_open(model, chosen, x)
    ran: list[str] = []
    with replaying(model, sites, gates, x, first_logit) as replay:
        for module_name, module in model.named_modules():
            if not list(module.children()):
                module.register_forward_pre_hook(lambda *_, name=module_name: ran.append(name))
        everything = [*replay.entering]
        for site in sites:
            ran.clear()
            same = replay.run(site.name, replay.leaving[site.name], everything[everything.index(site.name) + 1 :])
            assert all(torch.equal(value, replay.entering[target]) for target, value in same.items())
            assert len(same) == len(everything) - everything.index(site.name) - 1
        layers = [part for part, module in model.named_modules() if hasattr(module, "weight") and part in ran]
        assert len(layers) <= 4, "behind the last site only the head runs"


def slow(model: nn.Module, sites: tuple[Site, ...], gates: Gating, x: Tensor, source: str, value: Tensor) -> Tensor:
    """The logit with a source's value replaced and everything behind it following."""
    handles = [
        model.get_submodule(site.module).register_forward_hook(
            lambda module, args, out, site=site: value if site.name == source else gated(site, out, gates)
        )
        for site in sites
    ]
    with torch.no_grad():
        out = first_logit(model(x))
    for handle in handles:
        handle.remove()
    return out


def test_free_runs_follow_a_change_to_the_end() -> None:
    model, x = seeded(Line), images()
    sites, gates = half_open(model, ["act1", "act2"], x)
    with replaying(model, sites, gates, x, first_logit) as replay:
        value = replay.leaving["act1"] * 2
        held = replay.run("act1", value, ["output"])["output"]
        free = replay.run("act1", value, ["output"], free=True)["output"]
    assert held == replay.entering["output"]  # act2 puts out what it did
    assert free != held
    assert torch.equal(free, slow(model, sites, gates, x, "act1", value))


def test_the_gradients_of_a_cut_pass_are_those_of_the_gated_network() -> None:
    model, x = seeded(Line), images()
    model.requires_grad_(False)
    sites, gates = half_open(model, ["act1", "act2"], x)
    cut = Cut(model, sites, gates, x, first_logit)
    inputs = x.clone().requires_grad_()
    (g1, _), (g2, _) = gates["act1"], gates["act2"]
    first = model.conv1(inputs).relu() * g1[..., None, None]
    second = model.conv2(first).relu() * g2[..., None, None]
    logit = first_logit(model.head(second.mean((2, 3))))
    expected = torch.autograd.grad(logit, [inputs, first, second])
    for name, gradient in zip(["input", "act1", "act2"], expected, strict=True):
        torch.testing.assert_close(cut.gradient[name], gradient, rtol=1e-12, atol=1e-14)


def test_modules_that_are_called_for_what_they_do_to_their_input_run_again() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.relu, self.b = nn.Linear(4, 4), nn.ReLU(inplace=True), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            shift = self.a(x)
            self.relu(shift)
            return self.b(x) + shift.sum(1, keepdim=True)

    model = InPlace().double()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sites = (Site("b", 1, 2, "b"),)
    gates: Gating = {"b": (torch.ones(1, 2, dtype=torch.float64), None)}
    with replaying(model, sites, gates, x, first_logit) as replay:
        assert isinstance(replay, Replay)
        again = replay.run("b", replay.leaving["b"], ["output"])["output"]
    assert torch.equal(again, first_logit(model(x)).detach())
