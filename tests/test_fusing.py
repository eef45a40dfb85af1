from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nadhooks
from nadhooks.fusing import Fused, _watched, fused

from .nets import images, labelled


class Small(nn.Module):
    """Two convolutions with norms behind them; what else becomes of the first one's output is up to a subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.norm2 = nn.Conv2d(4, 5, 3, bias=False), nn.BatchNorm2d(5, affine=False)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.first(self.conv1(x)), inplace=True)
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))

    def first(self, x: Tensor) -> Tensor:
        return self.norm1(x)


class Twice(Small):
    def first(self, x: Tensor) -> Tensor:
        return self.norm1(x) + x


class Fed(Small):
    """The norm takes something else besides."""

    def first(self, x: Tensor) -> Tensor:
        return self.norm1(x) + self.norm1(0.5 * x.detach())


class TwoNorms(Small):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.norm1(self.conv1(x)), self.other(self.conv1(x))
        return self.head(self.norm2(self.conv2(F.relu(a + b))).mean((2, 3)))


def built(kind: Callable[[], nn.Module]) -> Any:
    """In float64 and eval mode, with norms that have something to do."""
    torch.manual_seed(0)
    model = kind().double().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.running_mean is not None
            assert module.running_var is not None
            nn.init.uniform_(module.running_mean, -1, 1)
            nn.init.uniform_(module.running_var, 0.5, 2)
            if module.affine:
                nn.init.uniform_(module.weight, -2, 2)
                nn.init.uniform_(module.bias, -1, 1)
    return model


def names(model: nn.Module, found: Fused) -> set[str]:
    return {name for name, module in model.named_modules() if module in found.forwards}


def found_in(model: nn.Module, x: Tensor) -> Fused:
    return fused(model, lambda: model(x))


def test_a_convolution_takes_in_the_norm_behind_it() -> None:
    model, x = built(Small), images(2)
    expected, norms = model(x), []
    for norm in (model.norm1, model.norm2):
        norm.register_forward_hook(lambda module, args, output: norms.append(output is args[0]))
    found = found_in(model, x)
    assert names(model, found) == {"conv1", "norm1", "conv2", "norm2"}
    norms.clear()
    with found, found:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)
    assert norms == [True, True]  # which leave the tensor as it is
    assert torch.equal(model(x), expected)
    assert norms == [True, True, False, False]


@pytest.mark.parametrize("kind", [Twice, Fed, TwoNorms])
def test_a_convolution_whose_output_goes_elsewhere_too_stays(kind: type[nn.Module]) -> None:
    model, x = built(kind), images(2)
    found = found_in(model, x)
    assert names(model, found) == {"conv2", "norm2"}
    with found:
        torch.testing.assert_close(model(x), expected := model(x), rtol=0, atol=1e-12)
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_what_a_hook_looks_at_stays() -> None:
    model, x = built(Small), images(2)
    model.conv1.register_forward_hook(lambda module, args, output: None)
    model.norm2.register_forward_pre_hook(lambda module, args: None)
    assert names(model, found_in(model, x)) == set()


def test_tensors_that_go_by_their_ids_are_held_so_that_no_other_gets_the_same() -> None:
    taken = []

    class Hooked(Small):
        def first(self, x: Tensor) -> Tensor:
            taken.append(weakref.ref(x))
            return self.norm1(x)

    model = built(Hooked)
    model.conv1.register_forward_hook(lambda module, args, output: None)  # so its output is not held as one of ours
    with _watched(model), torch.no_grad():
        model(images(2))
        assert taken[0]() is not None


def test_norms_of_batches_and_forward_functions_of_others_stay() -> None:
    model, x = built(Small), images(2)
    model.norm1.train()
    model.conv2.forward = model.conv2.forward  # somebody else's
    assert names(model, found_in(model, x)) == set()
    assert "forward" in vars(model.conv2)


def test_what_else_a_norm_layer_does_is_still_done() -> None:
    model = built(lambda: timm.layers.ConvNormAct(2, 4, 3))  # timm's norm has the activation in it
    x = images(2)
    expected, found = model(x), found_in(model, x)
    assert names(model, found) == {"conv", "bn"}
    assert (expected == 0).any()
    with found:
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-12)


def test_the_model_is_given_back_whatever_happens() -> None:
    model, x = built(Small), images(2)
    found = found_in(model, x)
    with pytest.raises(RuntimeError, match="channels"), found:
        model(x[:, :1])
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


class Pooled(nn.Module):
    """Two ReLUs before poolings; what else becomes of the first one's tensor is up to a subclass."""

    def __init__(self, inplace: bool = True, **pool: Any) -> None:
        super().__init__()
        self.conv1, self.relu1, self.pool1 = nn.Conv2d(2, 4, 3), nn.ReLU(inplace), nn.MaxPool2d(2, **pool)
        self.conv2, self.relu2, self.pool2 = nn.Conv2d(4, 5, 3, padding=1), nn.ReLU(inplace), nn.MaxPool2d(2, **pool)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(self.conv1(x))
        return self.head(self.pool2(self.relu2(self.conv2(x))).mean((2, 3)))

    def first(self, x: Tensor) -> Tensor:
        return self.pool1(self.relu1(x))


class Beside(Pooled):
    """The ReLU's output goes elsewhere too; in place that is its input."""

    def first(self, x: Tensor) -> Tensor:
        return self.pool1(self.relu1(x)) + x[..., 3:, 3:].mean()


class PooledBoth(Pooled):
    """The pooling takes something else besides."""

    def first(self, x: Tensor) -> Tensor:
        return self.pool1(self.relu1(x)) + self.pool1(-x.detach())


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.leaky_relu(x)


@pytest.mark.parametrize("inplace", [True, False])
def test_pooling_goes_before_relu_to_the_last_bit(inplace: bool) -> None:
    model, x = built(lambda: Pooled(inplace, stride=1, padding=1, ceil_mode=True)), images(2).requires_grad_()
    found = found_in(model, x)
    assert names(model, found) == {"relu1", "pool1", "relu2", "pool2"}

    def shown() -> list[Tensor]:
        sizes: list[Tensor] = []
        handle = model.relu1.register_forward_hook(lambda module, args, output: sizes.append((output >= 0).all()))
        out = model(x)
        handle.remove()
        return [*sizes, out, *torch.autograd.grad(out.square().sum(), x)]

    rectified, out, gradient = shown()
    with found:
        before, *same = shown()
    assert rectified
    assert not before  # what reaches the pooling then
    assert torch.equal(same[0], out)
    assert torch.equal(same[1], gradient)


@pytest.mark.parametrize("kind", [Beside, PooledBoth])
def test_a_relu_whose_output_goes_elsewhere_too_stays(kind: type[nn.Module]) -> None:
    model, x = built(kind), images(2)
    assert names(model, found_in(model, x)) == {"relu2", "pool2"}


def test_relus_and_poolings_of_other_kinds_and_those_that_are_looked_at_stay() -> None:
    model, x = built(Pooled), images(2)
    model.relu1.register_forward_hook(lambda module, args, output: None)
    model.pool2.register_forward_pre_hook(lambda module, args: None)
    assert names(model, found_in(model, x)) == set()
    model = built(Pooled)
    model.relu1, model.pool2 = Leaky(), nn.AvgPool2d(2)
    assert names(model, found_in(model, x)) == set()
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2, return_indices=True)).double()
    assert names(model, found_in(model, x)) == set()


def test_a_convolution_that_is_changed_in_place_takes_in_no_norm() -> None:
    class Shared(Small):
        """One convolution for a norm, and for a ReLU in place with a pooling behind it."""

        def __init__(self) -> None:
            super().__init__()
            self.relu, self.pool = nn.ReLU(inplace=True), nn.MaxPool2d(2)

        def first(self, x: Tensor) -> Tensor:
            return self.norm1(x) + self.pool(self.relu(self.conv1(images(2)))).mean()

    model, x = built(Shared), images(2)
    found = found_in(model, x)
    assert names(model, found) == {"conv2", "norm2", "relu", "pool"}
    with found:
        out = model(x)
    torch.testing.assert_close(out, model(x), rtol=0, atol=1e-12)


@pytest.mark.parametrize("sites", [["conv1", "norm2"], ["norm1", "conv2"]])
def test_learning_finds_the_same_with_and_without(sites: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = built(Small)
    data = labelled(model, images(40))
    before = {name: x.clone() for name, x in model.state_dict().items()}

    def learn() -> nadhooks.Masks:
        return nadhooks.learn(model, data, sites, method=nadhooks.methods.nad(epochs=3))

    fast = learn()
    monkeypatch.setattr("nadhooks.teaching.fused", lambda *asked: Fused({}))
    slow = learn()
    for site in sites:
        torch.testing.assert_close(fast[site], slow[site], rtol=0, atol=1e-9)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
