"""What units see: the strongest images, cropped to where, and their activation by class."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import nadhooks
from nadhooks.errors import DataError, RenderError, SiteError
from nadhooks.formats.contact_sheet import contact_scene
from nadhooks.formats.scene import Picture, Text
from nadhooks.seeing import activations

SITE = nadhooks.Site("conv", 1, 2, "conv")


class Net(nn.Module):
    """Unit 0 is the image, unit 1 its negative; a place of the site sees one pixel of the image and no other."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 1, bias=False)
        self.conv.weight.data = torch.tensor([1.0, -1.0]).view(2, 1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).mean((2, 3))


def graph(units: tuple[int, ...] = (0, 1)) -> nx.DiGraph:
    made = nx.DiGraph(level="unit", tasks=["a"], model="net", sites={"conv": {"units": 2, "kept": 2, "stage": 1}})
    made.add_node("input", kind="input", stage=0)
    for unit in units:
        made.add_node(f"conv:{unit}", kind="unit", site="conv", unit=unit, stage=1, attribution=1.0)
    made.add_node("output", kind="output", stage=2)
    return made


def batches() -> list[tuple[Tensor, Tensor]]:
    """Four images of 8 × 8, dark but for one pixel: 1, 2, 3, 4 at (0, 0), (2, 5), (7, 7), (4, 1)."""
    images = torch.zeros(4, 1, 8, 8)
    for number, (row, column) in enumerate([(0, 0), (2, 5), (7, 7), (4, 1)]):
        images[number, 0, row, column] = number + 1
    labels = torch.tensor([0, 1, 0, 1])
    return [(images[:2], labels[:2]), (images[2:], labels[2:])]


def test_the_strongest_images_come_first_with_where_they_excite_the_unit() -> None:
    seen = nadhooks.what_units_see(Net(), graph(), [SITE], batches(), names={0: "cat", 1: "dog"}, top=3, size=8)
    found = seen.nodes["conv:0"]["sees"]
    assert [(each["image"], each["label"], each["activation"]) for each in found] == [
        (3, "dog", 4.0), (2, "cat", 3.0), (1, "dog", 2.0),
    ]  # fmt: skip
    tops = [(each["box"][0], each["box"][1]) for each in found]
    assert tops == [(4, 1), (7, 7), (2, 5)]
    assert all(each["box"][2:] == [1, 1] for each in found)
    assert "sees" not in graph().nodes["conv:0"]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_crops_are_the_same_where_gradients_are_switched_off(mode: type[torch.no_grad]) -> None:
    expected = nadhooks.what_units_see(Net(), graph(), [SITE], batches())
    model, shown = Net(), batches()
    with mode():
        seen = nadhooks.what_units_see(model, graph(), [SITE], [(x.clone(), labels) for x, labels in shown])
    assert seen.nodes["conv:0"]["sees"] == expected.nodes["conv:0"]["sees"]


def test_activation_by_class_is_the_mean_over_images_and_places() -> None:
    seen = nadhooks.what_units_see(Net(), graph(), [SITE], batches(), names={0: "cat"})
    assert seen.nodes["conv:0"]["activation"] == pytest.approx({"cat": (1 + 3) / 2 / 64, "1": (2 + 4) / 2 / 64})
    assert seen.nodes["conv:1"]["activation"] == pytest.approx({"cat": -2 / 64, "1": -3 / 64})


def test_crops_are_pngs_of_the_size_asked_for() -> None:
    seen = nadhooks.what_units_see(Net(), graph(), [SITE], batches(), size=8)
    crop = seen.nodes["conv:0"]["sees"][0]["crop"]
    assert crop.startswith("data:image/png;base64,")
    image = Image.open(io.BytesIO(base64.b64decode(crop.partition(",")[2])))
    assert image.size == (8, 8)
    assert image.getpixel((4, 4)) == 255


def test_the_model_is_left_as_it_was() -> None:
    model = Net().train()
    nadhooks.what_units_see(model, graph(), [SITE], batches())
    assert model.training
    assert not model.conv._forward_hooks
    assert model.conv.weight.grad is None


def test_sites_of_a_site_graph_know_what_chosen_units_see() -> None:
    sites = nx.DiGraph(level="site", tasks=["a"])
    sites.add_node("conv", kind="site", units=2)
    seen = nadhooks.what_units_see(Net(), sites, [SITE], batches(), units={"conv": [1]}, top=1)
    assert list(seen.nodes["conv"]["seen"]) == ["1"]
    assert seen.nodes["conv"]["seen"]["1"]["sees"][0]["activation"] == 0.0


def test_images_may_come_in_dicts() -> None:
    named = [{"pixels": x, "labels": labels} for x, labels in batches()]
    seen, expected = (nadhooks.what_units_see(Net(), graph(), [SITE], data) for data in (named, batches()))
    assert seen.nodes["conv:0"] == expected.nodes["conv:0"]


def test_batches_that_are_no_images_with_labels_are_named() -> None:
    (x, labels), _ = batches()
    wrong: list[tuple[Any, str]] = [
        (x, "expected a loader of .* got batches of Tensor"),
        ((x, labels[:1]), "expected 2 whole-number labels"),
        ((x, torch.eye(2)), "expected one label for each image, got rows of 0 and 1"),
        (((x, x), labels), r"as one floating-point tensor \(images, .*, got tuple of 2"),
        ((x.byte(), labels), "as one floating-point tensor"),
        ((x[0], labels[:1]), r"as one floating-point tensor .* got Tensor of shape \(1, 8, 8\)"),
        ((x / 0, labels), "finite numbers, got NaN or infinity"),
    ]
    for batch, told in wrong:
        with pytest.raises(nadhooks.NadhooksError, match=told):
            nadhooks.what_units_see(Net(), graph(), [SITE], [batch])


def test_what_cannot_be_done_is_said() -> None:
    with pytest.raises(DataError, match="got none"):
        nadhooks.what_units_see(Net(), graph(), [SITE], [])
    with pytest.raises(SiteError, match="conv: the graph has units of this site, but sites= does not"):
        nadhooks.what_units_see(Net(), graph(), [], batches())
    with pytest.raises(nadhooks.NadhooksError, match="units="):
        nadhooks.what_units_see(Net(), graph(()), [SITE], batches())
    with pytest.raises(SiteError, match="no site 'fc'"):
        nadhooks.what_units_see(Net(), graph(), [SITE], batches(), units={"fc": [0]})
    with pytest.raises(SiteError, match="conv"):
        nadhooks.what_units_see(nn.Sequential(nn.Conv2d(1, 2, 1)), graph(), [SITE], batches())
    with pytest.raises(nadhooks.NadhooksError, match=r"expected a graph made by nadhooks.flow_graph, got a str"):
        nadhooks.what_units_see(Net(), "graph", [SITE], batches())
    for units in ([99], [], [-1], 1):
        with pytest.raises(SiteError, match="units: expected"):
            nadhooks.what_units_see(Net(), graph(), [SITE], batches(), units={"conv": units})  # type: ignore[dict-item]
    with pytest.raises(SiteError, match="does not show unit 1 of conv"):
        nadhooks.what_units_see(Net(), graph((0,)), [SITE], batches(), units={"conv": [1]})
    with pytest.raises(nadhooks.NadhooksError, match="names: expected"):
        nadhooks.what_units_see(Net(), graph(), [SITE], batches(), names=["cat", "dog"])  # type: ignore[arg-type]
    with pytest.raises(RenderError, match="units see nothing"):
        contact_scene(graph(), None, 252)


@pytest.mark.parametrize(
    ("shape", "axis", "more", "places", "grid"),
    [
        ((2, 4, 3, 5), 1, {}, 15, (3, 5, 0)),
        ((2, 3, 5, 4), 3, {}, 15, (3, 5, 0)),
        ((2, 17, 4), 2, {}, 17, (4, 4, 1)),  # a class token and 4 × 4 patches
        ((2, 16, 4), 2, {}, 16, (4, 4, 0)),
        ((2, 4), 1, {}, 1, None),
        ((8, 9, 4), 2, {}, 36, None),  # windows: where each lies is not known
        ((2, 16, 8), 2, {"block": 2}, 16, (4, 4, 0)),
    ],
)
def test_places_are_told_by_shape(
    shape: tuple[int, ...], axis: int, more: dict[str, Any], places: int, grid: tuple[int, int, int] | None
) -> None:
    active, found = activations(torch.ones(shape), nadhooks.Site("s", axis, 4, "s", **more), 2, (64, 64))
    assert active.shape == (2, 4, places)
    assert found == grid


@pytest.mark.parametrize(
    ("tokens", "image", "grid"),
    [
        (129, (256, 128), (16, 8, 1)),
        (49, (96, 128), (6, 8, 1)),
        (36, (64, 144), (4, 9, 0)),
        (49, (96, 100), None),
    ],
)
def test_tokens_of_images_that_are_no_squares_are_told_by_the_image(
    tokens: int, image: tuple[int, int], grid: tuple[int, int, int] | None
) -> None:
    _, found = activations(torch.ones(2, tokens, 4), nadhooks.Site("s", 2, 4, "s"), 2, image)
    assert found == grid


def test_what_a_layer_overwrites_in_place_is_seen_before() -> None:
    class Overwritten(Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).relu_().mean((2, 3))

    expected, seen = (nadhooks.what_units_see(kind(), graph(), [SITE], batches()) for kind in (Net, Overwritten))
    assert seen.nodes["conv:1"]["activation"] == expected.nodes["conv:1"]["activation"]


def test_units_of_several_positions_count_as_their_norm() -> None:
    site = nadhooks.Site("s", 1, 2, "s", block=2)
    active, _ = activations(torch.tensor([[3.0, 4.0, 0.0, 2.0]]), site, 1, (8, 8))
    assert active.flatten().tolist() == [5.0, 2.0]


def test_contact_sheets_show_images_and_names(tmp_path: Path) -> None:
    seen = nadhooks.what_units_see(Net(), graph(), [SITE], batches(), names={0: "cat", 1: "dog"}, top=3, size=8)
    seen.graph["unit_names"] = {"conv:0": "brightness"}
    sheet = contact_scene(seen, None, 252)
    assert sum(isinstance(shape, Picture) for shape in sheet.shapes) == 6
    words = {shape.text for shape in sheet.shapes if isinstance(shape, Text)}
    assert {"conv:0", "conv:1", "brightness"} <= words
    assert any(word.endswith(" · 4") for word in words)  # the strongest image's activation, however long its label
    for suffix in ("png", "pdf", "svg"):
        nadhooks.contact_sheet(seen, tmp_path / f"sheet.{suffix}")
        assert (tmp_path / f"sheet.{suffix}").stat().st_size > 1000
    with pytest.raises(RenderError, match=r"ends in .svg, .png, .pdf, got '.html'"):
        nadhooks.contact_sheet(seen, tmp_path / "sheet.html")
    with pytest.raises(RenderError, match="no unit 'conv:9'"):
        nadhooks.contact_sheet(seen, tmp_path / "sheet.png", ["conv:9"])
    with pytest.raises(RenderError, match="at least one unit"):
        nadhooks.contact_sheet(seen, tmp_path / "sheet.png", [])
    with pytest.raises(RenderError, match="too narrow"):
        nadhooks.contact_sheet(seen, tmp_path / "sheet.png", width=100)


def test_labels_under_crops_are_shortened_and_figures_are_not() -> None:
    names = {0: "golden retriever of a long line", 1: "automobile"}
    seen = nadhooks.what_units_see(Net(), graph(), [SITE], [(x * 900, y) for x, y in batches()], names=names, top=1)
    words = [shape.text for shape in contact_scene(seen, ["conv:0"], 252).shapes if isinstance(shape, Text)]
    figure = f" · {seen.nodes['conv:0']['sees'][0]['activation']:.2g}"
    assert figure == " · 3.6e+03"
    assert sum(word.endswith(figure) and "…" in word for word in words) == 1


def test_sites_from_a_file_see_what_those_of_the_model_see(tmp_path: Path) -> None:
    class Views(Net):
        def __init__(self) -> None:
            super().__init__()
            self.conv.weight.data[1] = 2

        def forward(self, x: Tensor) -> Tensor:
            both = self.conv(torch.cat([x, 2 * x.flip(-1)]))  # two views of each image
            return both.unflatten(0, (2, len(x))).mean((0, 3, 4))

    with nadhooks.attach(Views(), "conv", example=torch.randn(1, 1, 8, 8)) as gates:
        masks = gates.masks()
        assert gates.sites[0].views
    masks.save(tmp_path / "masks")
    loaded = nadhooks.load(tmp_path / "masks")
    here, there = (nadhooks.what_units_see(Views(), graph(), each.sites, batches()) for each in (masks, loaded))
    assert here.nodes["conv:0"] == there.nodes["conv:0"]
