from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

import nadhooks
from nadhooks.gating import by_unit, from_units
from nadhooks.shortcut import shortcut
from nadhooks.sites import Site
from nadhooks.teaching import Forward

from .nets import images, labelled


class Stem(nn.Module):
    """Two layers before the sites; what else becomes of them is up to a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 4, 3, padding=1), nn.Sequential(nn.Conv2d(4, 5, 3), nn.ReLU())
        self.third, self.head = nn.Conv2d(5, 6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.between(self.first(x))
        return self.head(self.behind(self.third(self.second(y)).relu(), y, x).mean((2, 3)))

    def between(self, y: Tensor) -> Tensor:
        return y.relu()

    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z


class Beside(Stem):
    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z + y.mean()


class BesideInput(Stem):
    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z + x.mean((1, 2, 3), keepdim=True)


class InPlace(Stem):
    def between(self, y: Tensor) -> Tensor:
        return F.relu(y, inplace=True)


class Keeps(nn.Conv2d):
    kept: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.kept = super().forward(x)
        return self.kept


class Reads(Stem):
    """What the first layer has kept is read behind the site."""

    def __init__(self) -> None:
        super().__init__()
        self.first = Keeps(2, 4, 3, padding=1)

    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z + cast(Keeps, self.first).kept.mean((1, 2, 3), keepdim=True)


class ReadsMean(Reads):
    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z + cast(Keeps, self.first).kept.mean()


class Checkpointed(Stem):
    """Two layers run again on the way back, in place of what they would have kept."""

    def between(self, y: Tensor) -> Tensor:
        return cast(Tensor, checkpoint(self.second, y.relu(), use_reentrant=False))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.third(self.between(self.first(x))).relu().mean((2, 3)))


class Decides(Stem):
    """A comparison, which no NaN is seen in, chooses what is done behind the site."""

    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z * torch.where(y.mean((1, 2, 3), keepdim=True) > 100, 5.0, 1.0)


class Chooses(Stem):
    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z * (1 + y.mean((2, 3)).argmax(1)[:, None, None, None])


class Watchful(Stem):
    def between(self, y: Tensor) -> Tensor:
        if not bool(y.isfinite().all()):
            raise ValueError("no numbers")
        return y


class Again(Stem):
    """The first layer runs once more behind the site."""

    def behind(self, z: Tensor, y: Tensor, x: Tensor) -> Tensor:
        return z + self.first(x).mean()


def built(kind: Callable[[], nn.Module] = Stem) -> nn.Module:
    torch.manual_seed(0)
    model = kind().double().eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def settled(model: nn.Module, gates: nadhooks.Gates) -> Forward:
    forward = Forward(gates, torch.device("cpu"), lambda outputs: outputs)
    forward.settle(images(1))
    return forward


class Convolutions(TorchFunctionMode):
    """Names of those that run."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {
            id(module.weight): name for name, module in model.named_modules() if isinstance(module, nn.Conv2d)
        }
        self.seen: set[str] = set()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is F.conv2d:
            self.seen.add(self.names[id(args[1])])
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("sites", "spared"),
    [
        (["first", "third"], ["first"]),
        (["second", "third"], ["first", "second.0"]),
        (["second.0", "second.1"], ["first", "second.0"]),
        (["third"], ["first", "second.0", "third"]),
    ],
)
def test_what_leads_to_the_first_site_does_not_run_again(sites: list[str], spared: list[str]) -> None:
    model, x = built(), images(5)
    with nadhooks.attach(model, sites, example=x[:1]) as gates:
        forward = settled(model, gates)
        half = {site.name: torch.full((5, site.units), 0.5, dtype=torch.float64) for site in gates.sites}
        with gates.apply(half):
            expected = forward(x, 5)
        known = forward(x, 5).sites
        with gates.apply(half), Convolutions(model) as ran:
            found = forward(x, 5, known=known)
        assert ran.seen == {"first", "second.0", "third"} - {*spared}
        torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=1e-14)
        for site in found.sites:
            torch.testing.assert_close(found.sites[site], expected.sites[site], rtol=0, atol=1e-14)
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("kind", [Beside, InPlace, Reads, ReadsMean, Decides, Chooses, Watchful])
def test_where_something_else_uses_what_comes_before_everything_runs(kind: Callable[[], nn.Module]) -> None:
    model = built(kind)
    with nadhooks.attach(model, ["second", "third"], example=images(1)) as gates:
        assert settled(model, gates).shortcut is None


def test_inputs_may_be_used_behind_the_site_and_layers_that_run_again_do() -> None:
    for kind, spared in ((BesideInput, {"first", "second"}), (Again, {"second"})):
        model = built(kind)
        with nadhooks.attach(model, ["second", "third"], example=images(1)) as gates:
            short = settled(model, gates).shortcut
            assert short is not None
            assert {name for name, module in model.named_modules() if module in short.before} == spared


def test_layers_that_somebody_looks_at_run() -> None:
    model = built()
    seen: list[int] = []
    model.get_submodule("first").register_forward_hook(lambda module, args, output: seen.append(len(output)))
    with nadhooks.attach(model, ["second", "third"], example=images(1)) as gates:
        short = settled(model, gates).shortcut
        assert short is not None
        assert {*short.before} == {model.get_submodule("second")}


def test_a_site_that_fires_twice_is_reached_on_foot() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    model = Twice().eval()
    site = Site("layer", 1, 4, "layer")
    assert shortcut(model, site, lambda: model(torch.randn(2, 4)), 2) is None


@pytest.mark.parametrize(
    ("shape", "axis", "units", "block"),
    [((3, 4, 5, 6), 1, 4, 1), ((3, 5, 8), 2, 2, 4), ((3, 6), 1, 3, 2), ((3, 5, 6, 4), 3, 4, 1)],
)
def test_what_was_put_by_units_is_put_back(shape: tuple[int, ...], axis: int, units: int, block: int) -> None:
    x = torch.randn(shape)
    site = Site("x", axis, units, "x", block=block)
    for order in (x, x.movedim(1, -1).contiguous().movedim(-1, 1)):
        back = from_units(by_unit(order, site, 3), site, x.shape[1:])
        assert torch.equal(back, x)
        if axis == 1:  # what comes next would be slower in another order of memory
            assert back.stride() == order.stride()


NAD, CONTRASTIVE, OUTPUTS = (
    nadhooks.methods.nad(epochs=3),
    nadhooks.methods.contrastive(steps=8),
    nadhooks.methods.contrastive(steps=8, activation=0),  # which asks nothing of the sites, and so knows nothing
)


@pytest.mark.parametrize(("method", "short"), [(NAD, True), (CONTRASTIVE, True), (OUTPUTS, False)])
@pytest.mark.parametrize("cache", [0, 2**30])
def test_learning_finds_the_same_with_and_without(
    method: nadhooks.methods.Method, short: bool, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    data = labelled(model, images(40))

    def learn() -> nadhooks.Masks:
        return nadhooks.learn(model, data, ["second", "third"], method=method, cache=cache)

    fast = learn()
    taken: list[bool] = []
    forward = Forward.__call__

    def plain(self: Forward, inputs: Any, samples: int, see: Any = None, known: Any = None) -> Any:
        if torch.is_grad_enabled() and see is None:  # a step, and neither a trial nor the preparation
            taken.append(known is not None and self.shortcut is not None)
        return forward(self, inputs, samples, see)

    monkeypatch.setattr(Forward, "__call__", plain)
    slow = learn()
    assert {*taken} == {short}
    for site in ("second", "third"):
        torch.testing.assert_close(fast[site], slow[site], rtol=0, atol=1e-9)


def test_images_of_another_size_go_the_whole_way() -> None:
    model, x = built(), images(5)
    wide, narrow = x.repeat(1, 1, 1, 2), x.repeat(1, 1, 2, 1)  # as many positions each
    with nadhooks.attach(model, ["second", "third"], example=x[:1]) as gates:
        forward = settled(model, gates)
        for shown, spared in ((x, {"first", "second.0"}), (wide, set()), (narrow, set())):
            expected = forward(shown, 5)
            with Convolutions(model) as ran:
                found = forward(shown, 5, known=expected.sites)
            assert ran.seen == {"first", "second.0", "third"} - spared
            torch.testing.assert_close(found.outputs, expected.outputs, rtol=0, atol=1e-14)
        forward.settle(wide[:1])
        with Convolutions(model) as ran:
            forward(narrow, 5, known=forward(narrow, 5).sites)
        assert ran.seen == {"first", "second.0", "third"}


@pytest.mark.parametrize("method", ["contrastive", "class-only", "nad"])
def test_checkpointed_layers_take_it_on_the_way_back_too(method: str) -> None:
    def learn(model: nn.Module) -> nadhooks.Masks:
        return nadhooks.learn(model, labelled(model, images(40)), ["second", "third"], method=method)

    expected, found = learn(built()), learn(built(Checkpointed))
    assert all(torch.equal(found[site.name], expected[site.name]) for site in expected.sites)
