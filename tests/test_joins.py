from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

import nadhooks
from nadhooks.joins import Joined, joined


def how(function: Any, *shapes: tuple[int, ...]) -> dict[int, Joined]:
    random = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=random, requires_grad=True) for shape in shapes]
    return joined(function(*leaves).grad_fn, {id(leaf): number for number, leaf in enumerate(leaves)})


ONE, W = (2, 4, 6), torch.ones(6, 6)


@pytest.mark.parametrize(
    ("function", "word"),
    [
        (lambda x: (x @ W).relu() * 2 + 1, "sequential"),
        (lambda x: F.layer_norm(x, (6,), torch.ones(6), torch.ones(6)) * torch.ones(6), "sequential"),
        (lambda x: x * x.square().mean(-1, keepdim=True).rsqrt(), "sequential"),  # a norm
        (lambda x: x.relu() + x, "sum"),
        (lambda x: (x @ W).add_(x), "sum"),
        (lambda x: x.relu() - x, "sum"),
        (lambda x: torch.lerp(x.relu(), x, 0.3), "sum"),
        (lambda x: torch.cat([x, x.relu()], 1), "concatenation"),
        (lambda x: torch.stack([x, x.relu()], 1).mean(1), "concatenation"),
        (lambda x: x * x.mean(1, keepdim=True).sigmoid(), "product"),
        (lambda x: F.glu(x), "product"),
        (lambda x: (x @ x.transpose(1, 2)).softmax(-1) @ x, "attention"),
        (lambda x: F.scaled_dot_product_attention(x, x.relu(), x), "attention"),
    ],
)
def test_operations_that_join_are_told_apart(function: Any, word: str) -> None:
    assert how(function, ONE) == {0: Joined(word, word)}


def test_a_flow_has_the_most_telling_join_on_its_way_and_the_last_one() -> None:
    found = how(lambda x, y, z: F.relu(x * y.sigmoid() + z), ONE, ONE, ONE)
    assert found == {0: Joined("product", "sum"), 1: Joined("product", "sum"), 2: Joined("sum", "sum")}
    found = how(lambda x, y, z: torch.cat([x + y, z], 1), ONE, ONE, ONE)
    assert found[0] == Joined("concatenation", "concatenation")
    assert found[2] == Joined("concatenation", "concatenation")


def test_what_does_not_lead_there_is_not_named() -> None:
    assert set(how(lambda x, y: x.relu(), ONE, ONE)) == {0}
    assert joined(None, {}) == {}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet18", {"channels": (8, 8, 8, 8)}, ("sum", "sum")),
        ("seresnet18", {"channels": (8, 8, 8, 8)}, ("product", "sum")),
        ("densenet121", {"growth_rate": 4, "block_config": (2, 2)}, ("concatenation", "concatenation")),
        ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "img_size": 32}, ("attention", "sum")),
    ],
)
def test_the_blocks_of_a_network_show_how_it_is_connected(name: str, options: Any, expected: tuple[str, str]) -> None:
    model = timm.create_model(name, num_classes=3, **options)
    size = options.get("img_size", 64)
    with nadhooks.attach(model, example=torch.randn(1, 3, size, size)) as gates:
        graph = nadhooks.flow_graph(gates.masks())
        for site in gates.sites:
            feeding = [data["join"] for *_, data in graph.in_edges(site.name, data=True)]
            assert (feeding[0], graph.nodes[site.name]["join"]) == expected
        assert graph.nodes["output"]["join"] == "sequential"


def test_joins_travel_in_mask_files(tmp_path: Any) -> None:
    model = timm.create_model("resnet18", channels=(8, 8, 8, 8))
    with nadhooks.attach(model, example=torch.randn(1, 3, 64, 64)) as gates:
        masks = gates.masks()
    masks.save(tmp_path / "m.safetensors")
    again = nadhooks.load(tmp_path / "m.safetensors").wiring.edges(data=True)
    assert list(again) == list(masks.wiring.edges(data=True))
