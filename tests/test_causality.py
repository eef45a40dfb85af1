from __future__ import annotations

import dataclasses
import math
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

import nadhooks
from nadhooks.errors import NadhooksError, SiteError
from nadhooks.evaluation import Agreement, Removal, Verification

from .nets import Line, Split, images, seeded, vectors
from .test_units import EVERYTHING, Planted, X, masks_of


def test_correlations_are_of_values_and_of_ranks() -> None:
    found = Agreement.of([1.0, 2, 3, 4], [1.0, 4, 9, 16])
    assert found.pearson == pytest.approx(0.9843740386976972)
    assert found.spearman == pytest.approx(1.0)
    ties = Agreement.of([1.0, 1, 2], [3.0, 5, 5])  # ranks 1.5, 1.5, 3 and 1, 2.5, 2.5
    assert ties.spearman == pytest.approx(0.5)
    assert math.isnan(Agreement.of([1.0, 1], [1.0, 2]).pearson)
    assert repr(ties) == f"Agreement(pearson={ties.pearson!r}, spearman={ties.spearman!r})"  # for notebooks


def test_a_planted_graph_is_true_in_every_respect() -> None:
    model = Planted().double()
    masks = masks_of(model, ["a", "b"], X)
    graph = nadhooks.unit_flow(model, masks, 0, X, **EVERYTHING)
    found = nadhooks.verify(model, masks, graph, X, rounds=2)
    units = [edge for edge in graph.edges if "bias" not in edge[0]]
    assert len(found.edges.said) == len(units)
    # a:2 feeds b:1 by 3 a2 + 0.25, which no ReLU bends
    assert found.edges.said == pytest.approx(found.edges.measured, abs=1e-12)
    assert found.units.said == pytest.approx(found.units.measured, abs=1e-12)
    assert found.paths.said == pytest.approx(found.paths.measured, abs=1e-12)
    assert found.edges.pearson == pytest.approx(1)
    assert found.sites["a"] == pytest.approx((2.5 + 2.5 + 6 + 21, 2.5 + 2.5 + 6 + 21))
    assert found.removal.recall == 1.0
    assert found.removal.units == 2
    # without a:2 and b:1, its strongest: logit 0 is 2 a0 + 2 a1, and 12 below it b2 − a1 counts for nothing
    assert found.removal.logit_without_strongest == pytest.approx(2 * 2.5 + 2 * 3)


def test_what_was_verified_is_told_in_a_few_lines() -> None:
    removal = Removal(12, 0.96875, 1 / 3, 0.5921, 9.0, 1.0, 2.0)
    agreement, none = Agreement.of([1.0, 2, 3, 4], [1.0, 4, 9, 16]), Agreement.of([], [])
    found = Verification(agreement, agreement, agreement, none, {"a": (1.0, 2.0), "b": (2.0, 3.0)}, removal)
    assert repr(found) == str(found)
    assert str(found).splitlines()[1:] == [
        "  edges    1.000 / 0.984 (4)",
        "  paths    1.000 / 0.984 (4)",
        "  units    1.000 / 0.984 (4)",
        "  regions  none / none (0)",
        "  sites    1.000 / 1.000 (2)",
        "  removal  recall 0.969; without the 12 units that add most 0.333, without as many random ones 0.592",
    ]
    assert "sites    none" in str(dataclasses.replace(found, sites={}))


def test_a_graph_that_is_not_true_is_found_out() -> None:
    model, x = seeded(Line), images()
    masks = masks_of(model, ["act1", "act2"], x)
    graph = nadhooks.unit_flow(model, masks, 0, x, **EVERYTHING)
    true = nadhooks.verify(model, masks, graph, x)
    assert true.edges.pearson > 0.9
    weights = list(nx.get_edge_attributes(graph, "weight").values())
    wrong = [weights[place] for place in torch.randperm(len(weights), generator=torch.Generator().manual_seed(0))]
    nx.set_edge_attributes(graph, dict(zip(graph.edges, wrong, strict=True)), "weight")
    assert abs(nadhooks.verify(model, masks, graph, x).edges.pearson) < 0.5


def test_edges_are_measured_as_closing_by_hand_does() -> None:
    model, x = seeded(Split), vectors()
    masks = masks_of(model, ["stem", "left", "right"], x, {"stem": [2]})
    graph = nadhooks.unit_flow(model, masks, 0, x, **EVERYTHING)
    found = nadhooks.verify(model, masks, graph, x, units=1)  # the strongest unit of each site, and the input
    stem = model.stem(x).detach()
    stem[:, 2] = 0
    worth = {node: abs(data["attribution"]) for node, data in graph.nodes(data=True) if data.get("site") == "stem"
             and data["kind"] == "unit"}  # fmt: skip
    strongest = int(max(worth, key=lambda node: worth[node]).split(":")[1])
    closed = stem.clone()
    closed[:, strongest] = 0

    def logit(z: torch.Tensor) -> torch.Tensor:
        return model.join(model.left(z).relu() + model.right(z).relu() + z)[:, 0].detach().mean()

    assert float(logit(stem) - logit(closed)) == pytest.approx(found.units.measured[0], abs=1e-12)
    assert len(found.units.said) == 3
    assert len(found.regions.said) == 1


def test_pooled_graphs_are_compared_by_activations() -> None:
    model, x = seeded(Line), images()
    masks = masks_of(model, ["act1", "act2"], x)
    graph = nadhooks.unit_flow(model, masks, 0, x, weighting="pooled", estimator="midpoint", **EVERYTHING)
    found = nadhooks.verify(model, masks, graph, x, batch=4)
    assert found.edges.said == pytest.approx(found.edges.measured, abs=1e-12)


def test_ways_that_no_gradient_takes_count_for_nothing() -> None:
    class Detached(Line):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.act2(self.conv2(self.act1(self.conv1(x)).detach())).mean((2, 3)))

    model, x = seeded(Detached), images()
    masks = masks_of(model, ["conv1", "act1", "act2"], x)
    graph = nadhooks.unit_flow(model, masks, 0, x, **EVERYTHING)
    assert nadhooks.verify(model, masks, graph, x).edges.said


def test_other_graphs_are_refused() -> None:
    model = Planted().double()
    masks = masks_of(model, ["a", "b"], X)
    with pytest.raises(NadhooksError, match=r"expected a graph made by nadhooks.unit_flow"):
        nadhooks.verify(model, masks, nadhooks.flow_graph(masks), X)


def test_options_out_of_range_are_named() -> None:
    model = Planted().double()
    masks = masks_of(model, ["a", "b"], X)
    graph = nadhooks.unit_flow(model, masks, 0, X)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"batch": 0}, "batch: expected a number of images of at least 1, got 0"),
        ({"rounds": 0}, "rounds: expected a whole number of at least 1, got 0"),
        ({"units": 0}, "units: expected a whole number"),
        ({"patches": 1.5}, "patches: expected a whole number of at least 0, got 1.5"),
        ({"share": -1}, "share: expected a share above 0 and at most 1, got -1"),
        ({"share": 5}, "share: expected a share"),
    ]
    for options, told in wrong:
        with pytest.raises(NadhooksError, match=told):
            nadhooks.verify(model, masks, graph, X, **options)
    with pytest.raises(SiteError, match="the graph has the site 'b', which the masks have not"):
        nadhooks.verify(model, masks_of(model, ["a"], X), graph, X)
    for regions in ("ab", 0.5, (2, 0), (1, 2, 3)):
        with pytest.raises(NadhooksError, match="regions: expected a number or"):
            nadhooks.unit_flow(model, masks, 0, X, regions=regions)  # type: ignore[arg-type]
