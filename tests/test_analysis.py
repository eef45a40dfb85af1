from __future__ import annotations

import networkx as nx
import pytest
import torch

import nadhooks
from nadhooks import analysis
from nadhooks.analysis import Hub
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import Tasks

from .test_masks import THREE
from .test_units import planted


def diamond(kept: dict[str, int]) -> nx.DiGraph:
    """input → a → (b, c) → d → output, each site keeping so many of 8 units."""
    wiring = nx.DiGraph([("input", "a"), ("a", "b"), ("a", "c"), ("b", "d"), ("c", "d"), ("d", "output")])
    sites = tuple(Site(name, 1, 8, name) for name in "abcd")
    values = {name: (torch.arange(8) < kept[name]).float()[None] for name in "abcd"}
    return nadhooks.flow_graph(Masks(sites, values, Tasks.of(1), wiring))


def test_bottlenecks_are_what_every_way_passes_narrowest_first() -> None:
    assert analysis.bottlenecks(diamond({"a": 6, "b": 1, "c": 1, "d": 3})) == ["d", "a"]
    graph = planted()
    assert analysis.bottlenecks(graph) == []  # the shortcut leads around b, and a has several units
    graph.remove_nodes_from(["a:0", "a:1"])
    assert analysis.bottlenecks(graph) == ["a:2", "b:1"]


def test_the_flow_is_bound_by_the_narrowest_cut() -> None:
    found = analysis.max_flow(diamond({"a": 6, "b": 1, "c": 2, "d": 5}))
    assert (found.value, set(found.cut)) == (3, {"b", "c"})
    found = analysis.max_flow(diamond({"a": 6, "b": 4, "c": 4, "d": 5}))
    assert (found.value, found.cut) == (5, ("d",))


def test_the_flow_between_units_is_bound_by_edges() -> None:
    graph = nx.DiGraph(level="unit")
    for node, kind in (("input:0,0", "input"), ("input:0,1", "input"), ("a:0", "unit"), ("a:bias", "bias"),
                       ("output", "output")):  # fmt: skip
        graph.add_node(node, kind=kind)
    graph.add_edge("input:0,0", "a:0", weight=-2.0)
    graph.add_edge("input:0,1", "a:0", weight=1.0)
    graph.add_edge("a:bias", "a:0", weight=0.5)
    graph.add_edge("a:0", "output", weight=3.0)
    assert analysis.max_flow(graph) == analysis.MaxFlow(3.0, (("a:0", "output"),))
    graph.edges["a:0", "output"]["weight"] = 9.0
    assert analysis.max_flow(graph).value == 3.5
    assert len(analysis.max_flow(graph).cut) == 3


def test_a_flow_without_bound_is_said() -> None:
    wiring = nx.DiGraph([("input", "a"), ("a", "output"), ("input", "output")])
    masks = Masks((Site("a", 1, 4, "a"),), {"a": THREE["a"]}, THREE.task_rows, wiring)
    with pytest.raises(nadhooks.NadhooksError, match="passes no site"):
        analysis.max_flow(nadhooks.flow_graph(masks))


def test_parts_of_a_graph_without_ends_are_named() -> None:
    graph = diamond({"a": 6, "b": 1, "c": 1, "d": 3})
    for lacks in ("input", "output"):
        part = graph.subgraph(set(graph) - {lacks})
        for asks in (analysis.bottlenecks, analysis.max_flow):
            with pytest.raises(nadhooks.NadhooksError, match=f"without '{lacks}'"):
                asks(part)
    del graph.nodes["b"]["kept"]
    with pytest.raises(nadhooks.NadhooksError, match="'b' has no 'kept'"):
        analysis.max_flow(graph)
    for number in (-1, 1.5):
        with pytest.raises(nadhooks.NadhooksError, match="number of units"):
            analysis.hubs(graph, number)  # type: ignore[arg-type]
    for of_masks in (analysis.communities, analysis.overlap_curve, grouped().agreement):
        with pytest.raises(nadhooks.NadhooksError, match="expected Masks"):
            of_masks(graph)


def test_hubs_are_the_units_that_most_tasks_keep() -> None:
    graph = nadhooks.flow_graph(THREE)
    assert analysis.hubs(graph, 2) == [Hub("a", 0, 2), Hub("a", 1, 1)]
    assert len(analysis.hubs(graph)) == 4
    with pytest.raises(nadhooks.NadhooksError, match=r"nadhooks.flow_graph"):
        analysis.hubs(planted())


def grouped() -> Masks:
    """Four tasks in two groups that share the first or the last half of `late`, and `early` alike."""
    wiring = nx.DiGraph([("input", "early"), ("early", "late"), ("late", "output")])
    sites = (Site("early", 1, 4, "early"), Site("late", 1, 8, "late"))
    late = torch.tensor([[1, 1, 1, 1, 0, 0, 0, 0]] * 2 + [[0, 0, 0, 0, 1, 1, 1, 1]] * 2).float()
    values = {"early": torch.tensor([[1, 1, 0, 0]] * 4).float(), "late": late}
    return Masks(sites, values, Tasks.of(["cat", "dog", "car", "bus"]), wiring)


def test_communities_are_the_classes_that_share_units() -> None:
    found = analysis.communities(grouped())
    assert found.groups == (("cat", "dog"), ("car", "bus"))
    assert found.modularity == pytest.approx(0.5)
    same = grouped().select(["cat", "dog"])
    assert analysis.communities(same).modularity == 0


def test_overlap_curves_show_where_classes_part() -> None:
    early, late = analysis.overlap_curve(grouped())
    assert (early.stage, early.sites, early.overlap) == (1, ("early",), 1.0)
    assert early.chance == pytest.approx(1 / 3)  # half of 4 units each: 1 in common, 3 in either
    assert (late.stage, late.sites) == (2, ("late",))
    assert late.overlap == pytest.approx(2 / 6)  # of the six pairs two are the same, four have nothing in common
    assert late.chance == pytest.approx(2 / 6)
    with pytest.raises(nadhooks.NadhooksError, match="two or more tasks"):
        analysis.overlap_curve(grouped().select("cat"))


def test_graphs_with_joins_can_be_analysed_too() -> None:
    graph = diamond({"a": 6, "b": 1, "c": 2, "d": 5})
    graph.add_node("sum 1", kind="join", join="sum", units=0, kept=0, share=1.0)
    graph.remove_edges_from([("b", "d"), ("c", "d")])
    graph.add_edges_from([("b", "sum 1"), ("c", "sum 1"), ("sum 1", "d")])
    assert analysis.max_flow(graph).value == 3
    assert analysis.bottlenecks(graph) == ["d", "a"]
