from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nadhooks
from nadhooks import sites, zoo
from nadhooks.errors import ModelError, NadhooksError
from nadhooks.shrinking import Shrinking, speed_up
from tests.nets import Line, images, seeded, vectors
from tests.test_folding import draw


class Chain(nn.Module):
    """Padded convolutions with norms: closed units are constants with a border; (batch, 2, 6, 6) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 3)
        for norm in (self.norm1, self.norm2):
            nn.init.uniform_(norm.bias, 0.1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(self.conv1(x)).relu()
        return self.head(self.norm2(self.conv2(x)).relu().mean((2, 3)))


class Sum(nn.Module):
    """A stem whose units are added to a branch's: (batch, 4) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.branch, self.head = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.head((x + self.branch(x).relu()).relu())


def report(model: nn.Module) -> Shrinking:
    return cast(Shrinking, model.shrinking)


def closing(model: nn.Module, shut: dict[str, list[int]], x: Any, closed: str = "zero") -> nn.Module:
    """The model with these units closed, by site, folded."""
    with nadhooks.attach(model, list(shut), example=x) as gates:
        with torch.no_grad():
            for name, units in shut.items():
                gates.logits[name][0, units] = 0
        if closed == "mean":
            gates.calibrate([x])
        return nadhooks.sub_architecture(model, gates.masks(), example=x)


def test_closed_units_are_cut_and_the_model_given_is_not_changed() -> None:
    model, x = seeded(Line), images()
    folded = closing(model, {"conv1": [1, 3], "conv2": [0]}, x)
    before = copy.deepcopy(folded.state_dict())
    small = nadhooks.shrink(folded, example=x, multiple=1)
    assert small.get_parameter("conv1.weight").shape == (2, 2, 3, 3)
    assert small.get_parameter("conv2.weight").shape == (4, 2, 3, 3)
    assert small.get_parameter("head.weight").shape == (3, 4)
    assert report(small).removed == {"conv1": 2, "conv2": 1}
    parameters = [sum(p.numel() for p in each.parameters()) for each in (folded, small)]
    assert report(small).parameters == tuple(parameters)
    torch.testing.assert_close(small(images(seed=9)), folded(images(seed=9)), rtol=0, atol=1e-14)
    assert all(torch.equal(value, before[name]) for name, value in folded.state_dict().items())


@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_what_constants_contribute_is_kept_by_one_of_them_at_borders_and_by_a_bias_elsewhere(closed: str) -> None:
    model, x = seeded(Chain), images()
    folded = closing(model, {"conv1": [0, 2, 5], "conv2": [1, 4]}, x, closed)
    small = nadhooks.shrink(folded, example=x, multiple=1)
    assert report(small).removed == {"conv1": 2, "conv2": 2}  # one of three stays: conv2 pads it with zeros
    torch.testing.assert_close(small(images(seed=9)), folded(images(seed=9)), rtol=0, atol=1e-13)


def test_widths_stay_multiples_where_that_is_asked() -> None:
    model, x = seeded(Chain), images()
    folded = closing(model, {"conv2": [0, 1, 2]}, x)
    assert report(nadhooks.shrink(folded, example=x, multiple=4)).removed == {}
    assert report(nadhooks.shrink(folded, example=x, multiple=3)).removed == {"conv2": 2}


def test_units_that_are_silent_on_the_inputs_at_hand_only_stay() -> None:
    model, x = seeded(Line), images()
    with torch.no_grad():
        cast(Tensor, model.conv1.bias)[0] = -1000.0  # nothing comes through the ReLU, until an input is large
    small = nadhooks.shrink(model, example=x, multiple=1)
    assert report(small).removed == {}
    assert torch.equal(small(1e4 * x), model(1e4 * x))


def test_units_that_nothing_reads_are_cut() -> None:
    model, x = seeded(Line), images()
    with torch.no_grad():
        model.conv2.weight[:, 2] = 0
    assert report(nadhooks.shrink(model, example=x, multiple=1)).removed == {"conv1": 1}


def test_units_of_a_sum_go_only_if_all_that_add_to_them_are_closed() -> None:
    model, x = seeded(Sum), vectors()
    assert report(nadhooks.shrink(closing(model, {"stem": [0, 1]}, x), example=x, multiple=1)).removed == {}
    folded = closing(model, {"stem": [0, 1], "branch": [1, 2]}, x)
    small = nadhooks.shrink(folded, example=x, multiple=1)
    assert sum(report(small).removed.values()) == 1
    torch.testing.assert_close(small(vectors(seed=9)), folded(vectors(seed=9)), rtol=0, atol=1e-14)


def test_a_cut_that_would_change_the_outputs_is_taken_back() -> None:
    class Reads(Line):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.conv1.weight.shape[0]  # more than its tensors hang on its width

    model, x = seeded(Reads), images()
    folded = closing(model, {"conv1": [0, 1]}, x)
    small = nadhooks.shrink(folded, example=x, multiple=1)
    assert report(small).removed == {}
    assert "2 dead units stay" in report(small).kept["conv1"]
    assert torch.equal(small(x), folded(x))


def test_without_torch_pruning_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(NadhooksError, match=r"pip install 'nadhooks\[shrink\]'"):
        nadhooks.shrink(seeded(Line), example=images())


def test_a_model_that_torch_pruning_cannot_follow_is_named() -> None:
    class Odd(Line):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).detach()

    with pytest.raises(ModelError, match="torch-pruning sees none of the layers of Odd"):
        nadhooks.shrink(seeded(Odd), example=images())


def test_speed_up_is_a_ratio_of_times() -> None:
    small, large = nn.Linear(8, 8), nn.Sequential(*(nn.Linear(512, 512) for _ in range(8)))
    assert speed_up(nn.Sequential(nn.Linear(512, 8), nn.Linear(8, 512)), large, torch.randn(64, 512), 5) < 0.7
    assert 0.3 < speed_up(small, copy.deepcopy(small), torch.randn(64, 8), 21) < 3


@pytest.mark.parametrize(
    ("name", "selector"),
    [
        ("timm:resnet18,channels=(8,16,16,32)", sites.channels()),
        ("timm:resnet26,channels=(16,16,32,32)", sites.channels()),
        ("timm:vit_tiny_patch16_224,img_size=64,depth=2", sites.neurons()),
        ("timm:convnext_atto,depths=(1,1,1,1)", sites.neurons()),
        ("torchvision:mobilenet_v3_small", sites.channels()),
    ],
)
@pytest.mark.parametrize("closed", ["zero", "mean"])
def test_models_of_the_zoos_get_smaller_and_put_out_the_same(name: str, selector: Any, closed: str) -> None:
    torch.manual_seed(0)
    model = zoo.load_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() < 2:
                parameter.add_(0.1 * torch.randn_like(parameter))
    example, x = torch.randn(2, 2, 3, 64, 64)
    with nadhooks.attach(model, selector, tasks=2, example=example) as gates:
        draw(gates, example, closed)
        folded = nadhooks.sub_architecture(model, gates.masks(), 1, example=example)
    small = nadhooks.shrink(folded, example=example, multiple=1)
    before, after = report(small).parameters
    assert after < 0.85 * before
    with torch.no_grad():
        ours, theirs = small(x), folded(x)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * max(1, float(theirs.abs().max())))


SILENT_FOR_SOME: dict[str, Callable[[Tensor], Tensor]] = {
    "clamp_min": lambda x: x.clamp_min(0),
    "clip": lambda x: torch.clip(x, min=0),
    "maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "where": lambda x: torch.where(x > 0, x, 0),
    "product": lambda x: x * (x > 0),
    "threshold": nn.Threshold(0.1, 0.0),
    "softshrink": nn.Softshrink(),
    "prelu": nn.PReLU(init=0.0),
    "tanh": lambda x: torch.tanh(100 * x),
    "sigmoid": lambda x: torch.sigmoid(1000 * x),
    "erf": lambda x: torch.erf(100 * x),
    "selu": lambda x: F.selu(1000 * x),
    "norm": lambda x: F.layer_norm(x, x.shape[-1:]).clamp_min(0),
}


@pytest.mark.parametrize("name", SILENT_FOR_SOME)
def test_units_that_are_silent_for_an_example_alone_stay(name: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(8, 32), nn.Linear(32, 4)
            self.between = SILENT_FOR_SOME[name]

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.between(self.first(x)))

    model, one = seeded(Net), torch.randn(1, 8, generator=torch.Generator().manual_seed(0)).double()
    smaller = nadhooks.shrink(model, example=one, multiple=1)
    for scale in (1, 100):
        x = torch.randn(200, 8, generator=torch.Generator().manual_seed(1)).double() * scale
        torch.testing.assert_close(smaller(x), model(x))


def test_units_that_read_dead_ones_alone_go_too() -> None:
    first, second = nn.Linear(4, 8), nn.Linear(8, 8)
    model = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), nn.Linear(8, 3)).double()
    with torch.no_grad():
        first.weight[:4] = 0
        second.weight[:2, 4:] = 0  # these read nothing else
    smaller = cast(nn.Sequential, nadhooks.shrink(model, example=vectors(), multiple=1))
    assert [cast(nn.Linear, smaller[place]).out_features for place in (0, 2)] == [4, 6]
    torch.testing.assert_close(smaller(vectors()), model(vectors()))


def test_multiples_below_1_are_refused() -> None:
    with pytest.raises(NadhooksError, match="multiple: expected a whole number of at least 1, got 0"):
        nadhooks.shrink(seeded(Line), example=images(), multiple=0)


@pytest.mark.parametrize(("between", "width"), [(nn.PixelShuffle(2), 2), (nn.GLU(1), 4)])
def test_units_that_a_shuffle_or_a_glu_puts_together_stay(between: nn.Module, width: int) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), between, nn.Conv2d(width, 3, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    small = nadhooks.shrink(model, example=x)
    assert report(small).removed == {}
    torch.testing.assert_close(small(x), model(x))
