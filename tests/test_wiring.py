from __future__ import annotations

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import nadhooks

from .nets import Line, Pair, Split, images, seeded, vectors


def edges(model: nn.Module, sites: object, example: Tensor) -> set[tuple[str, str]]:
    with nadhooks.attach(model, sites, example=example) as gates:  # type: ignore[arg-type]
        return set(gates.wiring.edges)


def test_a_line_is_a_line_through_in_place_layers() -> None:
    found = edges(seeded(Line), ["conv1", "act1", "act2"], images())
    assert found == {("input", "conv1"), ("conv1", "act1"), ("act1", "act2"), ("act2", "output")}


def test_branches_and_shortcuts_are_edges_of_their_own() -> None:
    found = edges(seeded(Split), ["stem", "left", "right", "join"], vectors())
    assert found == {
        ("input", "stem"),
        ("stem", "left"),
        ("stem", "right"),
        ("stem", "join"),
        ("left", "join"),
        ("right", "join"),
        ("join", "output"),
    }


def test_sites_between_cut_the_path() -> None:
    assert ("stem", "join") not in edges(seeded(Line), ["conv1", "act1", "head"], images())
    assert edges(seeded(Split), ["stem", "join"], vectors()) == {
        ("input", "stem"),
        ("stem", "join"),
        ("join", "output"),
    }


def test_leaves_of_one_module_are_wired_apart() -> None:
    found = edges(seeded(Pair), "both", vectors())
    assert found == {("input", "both[0]"), ("input", "both[1]"), ("both[0]", "output"), ("both[1]", "output")}


def test_frozen_weights_and_no_grad_do_not_hide_the_wiring() -> None:
    model = seeded(Split)
    model.requires_grad_(False)
    with torch.no_grad():
        assert len(edges(model, ["stem", "left", "right", "join"], vectors())) == 7


def test_a_module_called_twice_keeps_the_graph_acyclic() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))

    with nadhooks.attach(Twice().double(), ["a", "b"], example=vectors()) as gates:
        assert nx.is_directed_acyclic_graph(gates.wiring)
        assert set(gates.wiring.edges) == {("input", "a"), ("a", "b"), ("a", "output"), ("b", "output")}


def test_wiring_is_frozen_ordered_and_says_how_it_was_found() -> None:
    with nadhooks.attach(seeded(Split), ["stem", "left", "right", "join"], example=vectors()) as gates:
        assert list(gates.wiring) == ["input", "stem", "left", "right", "join", "output"]
        assert {data["found"] for _, _, data in gates.wiring.edges(data=True)} == {"autograd"}
        with pytest.raises(nx.NetworkXError):
            gates.wiring.add_edge("input", "output")


def test_gradients_and_weights_are_untouched() -> None:
    model = seeded(Line)
    edges(model, "conv1", images())
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
