"""Flow graphs and masks in the terms of network analysis: bottlenecks, hubs, flow and cut, communities, overlap."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import networkx as nx
import torch
from torch import Tensor

from .default_device import made_on_cpu
from .errors import NadhooksError
from .flow_like import FLOW, check_flow
from .masks import Masks, check_masks
from .wiring import INPUT, OUTPUT


@dataclass(frozen=True)
class Hub:
    """A unit and how many of the graph's tasks keep it."""

    site: str
    unit: int
    tasks: int


@dataclass(frozen=True)
class MaxFlow:
    """How much passes from the input to the output at most, and where that is decided: sites, or edges u→v."""

    value: float
    cut: tuple[Any, ...]


@dataclass(frozen=True)
class Communities:
    """Groups of tasks that share units, largest first, and how much more they do than groups at random."""

    modularity: float
    groups: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Overlap:
    """One stage: the mean Jaccard similarity of two tasks' units, and that of random masks of the same sizes."""

    stage: int
    sites: tuple[str, ...]
    overlap: float
    chance: float


def _check_ends(graph: nx.DiGraph, asks: str) -> None:
    check_flow(graph)
    ends = (OUTPUT,) if graph.graph.get("level") == "unit" else (INPUT, OUTPUT)  # the image may have no effect
    if missing := [end for end in ends if end not in graph]:
        raise NadhooksError(f"{asks}: expected a graph from the input to the output, got one without {missing[0]!r}")
    if without := [node for node, data in graph.nodes(data=True) if data["kind"] == "site" and "kept" not in data]:
        raise NadhooksError(f"{asks}: expected a graph made by {FLOW}, got one whose node {without[0]!r} has no 'kept'")


def bottlenecks(graph: nx.DiGraph) -> list[str]:
    """The nodes that every way from the input to the output passes, narrowest first.

    Of a site-level graph the sites, by the units that they keep; of a unit-level graph the units, by |attribution|.
    These are the dominators of the output.
    """
    _check_ends(graph, "bottlenecks")
    whole = _with_source(graph)
    above = nx.immediate_dominators(whole, INPUT_OF_ALL)
    found, node = [], above.get(OUTPUT)
    while node is not None and node != INPUT_OF_ALL:
        if graph.nodes[node]["kind"] in ("site", "unit"):
            found.append(node)
        node = above[node]
    found.reverse()  # from the input on, among those that are as narrow
    return sorted(found, key=lambda node: abs(_width(graph.nodes[node])))


def hubs(graph: nx.DiGraph, number: int = 20) -> list[Hub]:
    """The units of a site-level graph that most of its tasks keep, most shared first, then in firing order."""
    check_flow(graph)
    if not isinstance(number, int) or number < 0:
        raise NadhooksError(f"hubs: expected a number of units from 0, got {number!r}")
    found = [
        Hub(node, unit, tasks)
        for node, data in graph.nodes(data=True)
        for unit, tasks in enumerate(data.get("sharing", ()))
        if tasks
    ]
    if not any("sharing" in data for _, data in graph.nodes(data=True)):
        raise NadhooksError("hubs: expected a graph made by nadhooks.flow_graph, which counts the tasks of each unit")
    return sorted(found, key=lambda hub: -hub.tasks)[:number]


def max_flow(graph: nx.DiGraph) -> MaxFlow:
    """The maximum flow from the input to the output, and the minimum cut that holds it to that.

    Of a site-level graph, in units: a site lets through as many as it keeps, and the cut names sites. Of a unit-level
    graph, in |weight|: the cut names edges. Ford and Fulkerson, 1956, by networkx.
    """
    _check_ends(graph, "max_flow")
    sites = graph.graph.get("level") != "unit"
    network = nx.DiGraph()
    network.add_node(INPUT_OF_ALL)
    for node, data in graph.nodes(data=True):
        through = {"capacity": float(data["kept"])} if sites and data["kind"] == "site" else {}
        network.add_edge((node, "in"), (node, "out"), **through)
        if data["kind"] in (INPUT, "bias") and not sites:
            network.add_edge(INPUT_OF_ALL, (node, "in"))
    if sites:
        network.add_edge(INPUT_OF_ALL, (INPUT, "in"))
    for source, target, data in graph.edges(data=True):
        through = {} if sites else {"capacity": abs(data["weight"])}
        network.add_edge((source, "out"), (target, "in"), **through)
    try:
        value, (before, _) = nx.minimum_cut(network, INPUT_OF_ALL, (OUTPUT, "out"))
    except nx.NetworkXUnbounded as error:
        raise NadhooksError(
            "max_flow: a way from the input to the output passes no site, so its flow has no bound"
        ) from error
    crossing = [(u, v) for u, v in network.edges if u in before and v not in before]
    cut = tuple(u[0] if sites else (u[0], v[0]) for u, v in crossing)
    return MaxFlow(float(value), cut)


@made_on_cpu
def communities(masks: Masks, seed: int = 0) -> Communities:
    """Groups of tasks by the units that they share, and the modularity of that division (Newman, 2006).

    Tasks are linked by how far their Jaccard similarity exceeds the mean over all pairs; groups by the Louvain method
    (Blondel et al., 2008). Modularity near 0 says that classes share units without any structure.
    """
    check_masks(masks)
    similarity = masks.jaccard()
    others = similarity[~torch.eye(len(masks), dtype=torch.bool)]
    mean = float(others.mean()) if len(others) else 0.0
    links = nx.Graph()
    links.add_nodes_from(masks.tasks)
    for i, row in enumerate(similarity.tolist()):
        links.add_weighted_edges_from(
            (masks.tasks[i], masks.tasks[j], value - mean) for j, value in enumerate(row[:i]) if value > mean + 1e-12
        )
    order = {name: place for place, name in enumerate(masks.tasks)}
    groups = nx.community.louvain_communities(links, seed=seed)
    named = sorted(
        (tuple(sorted(group, key=order.__getitem__)) for group in groups), key=lambda g: (-len(g), order[g[0]])
    )
    modularity = nx.community.modularity(links, groups) if links.number_of_edges() else 0.0
    return Communities(float(modularity), tuple(named))


@made_on_cpu
def overlap_curve(masks: Masks) -> list[Overlap]:
    """How alike two tasks' units are at each stage, from the input to the output: where classes share and part.

    Means over all pairs of tasks and the stage's sites of |A∩B| / |A∪B|, beside what independent masks of the same
    sizes have: of n units, |A∩B| is |A|·|B| / n then. Raises NadhooksError for fewer than two tasks.
    """
    check_masks(masks)
    if len(masks) < 2:
        raise NadhooksError(f"overlap: expected two or more tasks to compare, got {len(masks)}")
    known = {site.name for site in masks.sites}
    found = []
    for stage, nodes in enumerate(nx.topological_generations(masks.wiring)):
        names = tuple(name for name in masks.wiring if name in known and name in nodes)
        if names:
            pairs = [pairs_overlap(masks[name] > 0.5) for name in names]
            found.append(Overlap(stage, names, *(sum(parts) / len(names) for parts in zip(*pairs, strict=True))))
    return found


# --- pieces ----------------------------------------------------------------------------------------------------------

INPUT_OF_ALL = ("input", "of all")  # no node of a graph is a pair


def _with_source(graph: nx.DiGraph) -> nx.DiGraph:
    """The graph with one node before all of the input's regions."""
    whole = nx.DiGraph(graph.edges)
    whole.add_nodes_from([*graph, INPUT_OF_ALL])
    whole.add_edges_from((INPUT_OF_ALL, node) for node, data in graph.nodes(data=True) if data["kind"] == INPUT)
    return whole


def _width(data: dict[str, Any]) -> float:
    return float(data["kept"] if "kept" in data else data["attribution"])


def pairs_overlap(kept: Tensor) -> Iterator[float]:
    """The mean Jaccard similarity of pairs of (tasks, units) rows, and that of independent ones of their sizes."""
    kept = kept.double()
    sizes = kept.sum(1)
    apart = ~torch.eye(len(kept), dtype=torch.bool)
    for both in (kept @ kept.T, sizes[:, None] * sizes[None] / kept.shape[1]):
        either = sizes[:, None] + sizes[None] - both
        yield float(torch.where(either > 0, both / either.clamp(min=1e-12), torch.ones_like(both))[apart].mean())
