from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import nadhooks
from nadhooks import sites, zoo
from nadhooks.errors import SiteError

from .nets import Line, Mlp, Split, images, seeded, vectors


def names(model: nn.Module, chosen: sites.Sites | None, example: Tensor) -> list[str]:
    with nadhooks.attach(model, chosen, example=example) as gates:
        return [site.name for site in gates.sites]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.act(self.fc1(x)))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads = 2
        self.qkv, self.proj = nn.Linear(4, 12), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Stages(nn.Module):
    """A block of its own class in a row with two others, in containers, and an attention layer."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = Attention()
        self.stages = nn.ModuleList([nn.Sequential(Block(), Block()), nn.Sequential(Block())])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attn(x)
        for stage in self.stages:
            x = stage(x)
        return self.head(x.mean(1))


TOKENS = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))


def test_blocks_are_the_repeated_composites() -> None:
    assert names(Stages(), None, TOKENS) == ["stages.0.0", "stages.0.1", "stages.1.0"]


def test_blocks_of_plain_stacks_are_the_last_tensors_before_each_layer() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Flatten(), nn.Linear(16, 2)
    )
    assert names(net, None, images().float()) == ["2", "4"]


def test_neurons_are_activations_between_layers() -> None:
    assert names(Stages(), sites.neurons(), TOKENS) == ["stages.0.0.act", "stages.0.1.act", "stages.1.0.act"]


@pytest.mark.parametrize("compute", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_layers_that_compute_their_weights_are_layers_too(compute: Callable[[nn.Module], nn.Module]) -> None:
    def stack(made: Callable[[nn.Module], nn.Module]) -> nn.Module:
        layers = [made(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU(), made(nn.Conv2d(3, 3, 3, padding=1)), nn.ReLU()]
        return nn.Sequential(*layers, nn.Flatten(), made(nn.Linear(27, 4)))

    shown = torch.rand(2, 3, 3, 3)
    for chosen in (None, sites.channels()):
        assert names(stack(compute), chosen, shown) == names(stack(lambda layer: layer), chosen, shown)


def test_heads_are_blocks_of_the_output_projections_input() -> None:
    model = Stages()
    with nadhooks.attach(model, sites.heads(), example=TOKENS) as gates:
        (site,) = gates.sites
        assert (site.name, site.units, site.block, site.axis) == ("attn.proj@input", 2, 2, 2)
        seen: list[Tensor] = []
        handle = model.attn.proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        with gates.close(site.name, 1):
            model(TOKENS)
        handle.remove()
    assert (seen[0][..., 2:] == 0).all()
    assert (seen[0][..., :2] != 0).any()


def test_channels_reports_layers_that_never_fire() -> None:
    with nadhooks.attach(seeded(Split), sites.channels(), example=vectors()) as gates:
        assert [site.name for site in gates.sites] == ["stem", "left", "right", "join"]
        assert list(gates.skipped) == ["unused"]
        assert "never fired" in gates.skipped["unused"]


def test_globs_stay_within_a_part_and_double_stars_do_not() -> None:
    model = Stages()
    assert names(model, "stages.?.*", TOKENS) == ["stages.0.0", "stages.0.1", "stages.1.0"]
    assert names(model, ["**.fc[12]", "attn"], TOKENS)[0] == "attn"
    assert len(names(model, ["**.fc[12]", "attn"], TOKENS)) == 7
    assert names(model, "**.attn", TOKENS) == ["attn"]  # as in a shell, no part at all is fine too
    assert names(model, "**.fc[!2]", TOKENS) == ["stages.0.0.fc1", "stages.0.1.fc1", "stages.1.0.fc1"]


def test_callables_choose_by_name_and_module() -> None:
    assert names(seeded(Line), lambda name, module: isinstance(module, nn.ReLU), images()) == ["act1", "act2"]


def test_sites_come_in_firing_order() -> None:
    assert names(seeded(Line), ["head", "act2", "conv1"], images()) == ["conv1", "act2", "head"]


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ("conv9", r"no module name matches 'conv9' \(names begin conv1, act1"),
        (["conv1", "x*"], r"no module name matches 'x\*'"),
        (lambda name, module: False, r"no site"),
        (sites.heads(), r"no site: nadhooks.sites.heads\(\) chose nothing in Line"),
        ([], r"sites: expected a selector"),
        (3, r"sites: expected a selector"),
    ],
)
def test_choices_that_match_nothing_are_named(chosen: sites.Sites, message: str) -> None:
    with pytest.raises(SiteError, match=message):
        nadhooks.attach(seeded(Line), chosen, example=images())


def test_a_glob_that_needs_double_stars_says_so() -> None:
    with pytest.raises(SiteError, match=r"did you mean '\*\*\.fc1'"):
        nadhooks.attach(Stages(), "*.fc1", example=TOKENS)


def test_a_site_that_never_fires_is_named() -> None:
    with pytest.raises(SiteError, match="'unused' matches unused, which the forward pass never calls"):
        nadhooks.attach(seeded(Split), "unused", example=vectors())


class Odd(nn.Module):
    """Puts out a tensor that no layer made: its axis cannot be determined."""

    def __init__(self) -> None:
        super().__init__()
        self.turn = Turn()

    def forward(self, x: Tensor) -> Tensor:
        return self.turn(x).sum((1, 2))


class Turn(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2) * 2


def test_an_axis_that_cannot_be_determined_asks_for_it() -> None:
    x = images()
    with pytest.raises(SiteError, match=r"turn: the axis .* shape \(6, 6, 2, 6\); pass axis="):
        nadhooks.attach(Odd(), "turn", example=x)
    with nadhooks.attach(Odd(), "turn", example=x, axis=-2) as gates:
        assert (gates.sites[0].axis, gates.sites[0].units) == (2, 2)
    with nadhooks.attach(Odd(), "turn", example=x, axis={"t*": 1}) as gates:
        assert gates.sites[0].axis == 1
    for wrong in (0, 4, -5):
        with pytest.raises(SiteError, match=f"axis={wrong} does not fit"):
            nadhooks.attach(Odd(), "turn", example=x, axis=wrong)


def test_a_module_without_float_output_is_refused() -> None:
    class Index(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argmax(1)

    class Wraps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.index, self.fc = Index(), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.fc(x)[self.index(x)]

    with pytest.raises(SiteError, match="index: expected a floating-point tensor"):
        nadhooks.attach(Wraps().double(), "index", example=vectors())


def test_hidden_units_are_found_where_the_width_equals_the_sequence() -> None:
    model = Mlp(hidden=5)
    tokens = torch.randn(2, 5, 4)
    with nadhooks.attach(model, "act", example=tokens) as gates:
        assert gates.sites[0].axis == 2


class Turned(nn.Module):
    """A channels-last layer in a channels-first block, as ConvNeXt has it: only who takes its tensor tells the axis."""

    def __init__(self) -> None:
        super().__init__()
        self.block, self.next = Turns(), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.next(self.block(x)).mean((2, 3))


class Turns(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Linear(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.wide(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_the_axis_is_right_where_height_width_and_channels_are_equal() -> None:
    with nadhooks.attach(Turned().double(), "block", example=images()) as gates:
        assert (gates.sites[0].axis, gates.sites[0].units) == (1, 6)


def test_norms_over_several_axes_have_their_units_first() -> None:
    net = nn.Sequential(nn.Conv2d(2, 5, 3), nn.LayerNorm([5, 4, 4]), nn.Conv2d(5, 3, 1)).double()
    with nadhooks.attach(net, "1", example=images()) as gates:
        assert (gates.sites[0].axis, gates.sites[0].units) == (1, 5)


class Table(nn.Module):
    """A layer that works on a table of its own, not on samples, and one that has the sequence before the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.first, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.register_buffer("table", torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.positions(self.table)
        return self.head(self.first(x.transpose(0, 1)).transpose(0, 1).mean(1))


def test_tensors_whose_first_axis_is_not_the_batch_get_no_gates() -> None:
    with nadhooks.attach(Table(), sites.channels(), example=TOKENS) as gates:
        assert [site.name for site in gates.sites] == ["head"]
        assert set(gates.skipped) == {"positions", "first"}
    with pytest.raises(SiteError, match=r"first: axis 0 of shape \(5, 2, 4\) does not hold the samples"):
        nadhooks.attach(Table(), "first", example=TOKENS)


def test_sites_named_like_the_ends_of_a_graph_keep_apart() -> None:
    class Ends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.input, self.output = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.output(self.input(x))

    with nadhooks.attach(Ends().double(), sites.channels(), example=vectors()) as gates:
        graph = nadhooks.flow_graph(gates.masks())
        assert list(graph) == ["input", "input@output", "output@output", "output"]
        assert [graph.nodes[node]["kind"] for node in graph] == ["input", "site", "site", "output"]


def test_a_module_that_fires_with_several_widths_is_refused() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.act = nn.Linear(4, 4), nn.Linear(4, 6), nn.ReLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.b(self.act(self.a(x))))

    with pytest.raises(SiteError, match="act: it is called several times, and not always with 4 units"):
        nadhooks.attach(Reused().double(), "act", example=vectors())


@pytest.mark.parametrize("chosen", [sites.blocks, nn.ReLU, lambda name: True, "act[9-1]"])
def test_choices_of_another_kind_are_refused(chosen: Any) -> None:
    with pytest.raises(SiteError):
        nadhooks.attach(seeded(Line), chosen, example=images())


@pytest.mark.parametrize("axis", ["1", 1.5, [1], {"act1": "x"}])
def test_axes_of_another_kind_are_refused(axis: Any) -> None:
    with pytest.raises(SiteError, match="axis: expected an integer"):
        nadhooks.attach(seeded(Line), "act1", example=images(), axis=axis)


def test_heads_that_alternate_along_the_features_close_together() -> None:
    model: Any = zoo.load_model("timm:nest_tiny,img_size=112,num_classes=3")
    image = zoo.example_for(model)
    with nadhooks.attach(model, sites.heads(), example=image) as gates:
        site = gates.sites[0]
        assert (site.units, site.block, site.alternating) == (3, 32, True)
        projection = model.get_submodule(site.module)
        with gates.close(site.name, 1):
            closed = model(image)
        with torch.no_grad():
            projection.weight[:, 1::3] = 0
        assert torch.allclose(model(image), closed, atol=1e-6)
