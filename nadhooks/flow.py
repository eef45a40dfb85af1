"""Flow graphs: wiring plus masks, as a networkx graph that can be drawn, measured and written to files."""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal

import networkx as nx
from torch import Tensor

from .default_device import made_on_cpu
from .errors import NadhooksError
from .graphs import FlowGraph
from .joins import JOINS, SEQUENTIAL
from .masks import Masks, check_masks
from .wiring import INPUT, OUTPUT

Combine = Literal["union", "intersection", "difference"]
LISTED = 32  # graphs of more tasks do not list every task's units at every site
RECENT = 64  # joins that are looked at again for each new one


@made_on_cpu
def flow_graph(masks: Masks, task: object = None, *, combine: Combine = "union", joins: bool = False) -> nx.DiGraph:
    """The information flow of one task (a name or label), of several (a list), or of all tasks over each other.

    combine: which units count as kept with several tasks: those that at least one keeps ("union"), that all keep
        ("intersection"), or that the first keeps and no other ("difference": what A uses and B does not).
    joins: whether joins stand as nodes of their own, so that graphs stay linear in the number of sites. Sites that take
        what others take too share its join.

    Nodes are "input", every site's name, "output". Attributes of nodes:
        kind: "input", "site", "output" or "join". module: the site's module. stage: longest distance from the input.
        units: how many the site has. kept: how many of them are kept. share: kept / units. use: (units,) list, the
        share of the graph's tasks that keep each unit; 1 or 0 with "intersection" and "difference". sharing: (units,)
        list, how many of the graph's tasks keep each unit. kept_units: {task: its units' numbers}, of up to 32 tasks.
        join: what joins last before the site: "sequential", "sum", "concatenation", "product" (gates such as
        squeeze-and-excite's) or "attention".
        Of "input", "output" and joins, units and kept are 0.
    Edges carry `found`, how the wiring knows of them; `share`, the share of units that the source keeps (1.0 from
    "input"); and `join`, the most telling join on the way: attention before product, concatenation, sum, sequential. A
    transformer's block is fed by attention and joined by a sum. Masks from before joins were known say "sequential"
    throughout. With `joins`, nodes "sum 1", "sum 2", "attention 1", … stand before each site with another join than
    "sequential", also where it joins one source with what was made of it; edges from a join have found="join".
    The graph's attributes: level ("site"), tasks (names), combine, model.

    Raises TaskError for an unknown task.
    """
    check_masks(masks)
    if combine not in ("union", "intersection", "difference"):
        raise NadhooksError(f"combine: expected 'union', 'intersection' or 'difference', got {combine!r}")
    chosen = masks if task is None else masks.select(task)
    model = str(masks.provenance.get("model", ""))
    graph = FlowGraph(level="site", tasks=list(chosen.tasks), combine=combine, model=model)
    graph.add_nodes_from(masks.wiring)
    for node in (INPUT, OUTPUT):
        graph.nodes[node].update(kind=node, units=0, kept=0, share=1.0)
    for site in chosen.sites:
        graph.nodes[site.name].update(kind="site", module=site.module, units=site.units)
        graph.nodes[site.name].update(_kept(chosen.kept_units(site.name), chosen.tasks, combine))
    for source, target, data in masks.wiring.edges(data=True):
        known = {key: data[key] for key in ("join", "found") if key in data}  # a file may hold others
        share = graph.nodes[source]["share"]
        known["join"] = known["join"] if known.get("join") in JOINS else SEQUENTIAL
        graph.add_edge(source, target)
        graph.edges[source, target].update(known, share=share)
    for node in graph:
        last = {data.get("arrives") for *_, data in masks.wiring.in_edges(node, data=True)} & {*JOINS}
        graph.nodes[node]["join"] = max(last, key=JOINS.index, default=SEQUENTIAL)  # a file may hold words unknown here
    if joins:
        graph = _with_joins(graph)
    for stage, nodes in enumerate(nx.topological_generations(graph)):
        for node in nodes:
            graph.nodes[node]["stage"] = stage
    return graph


def _kept(kept: Tensor, tasks: tuple[str, ...], combine: Combine) -> dict[str, Any]:
    """What the graph says of a site's (tasks, units) booleans."""
    sharing = kept.sum(0)  # (units,)
    use = sharing.double() / len(kept)
    if combine == "intersection":
        use = sharing.eq(len(kept)).double()
    elif combine == "difference":
        use = (kept[0] & ~kept[1:].any(0)).double()
    number = int((use > 0).sum())
    found = {"kept": number, "share": number / kept.shape[1], "use": use.tolist(), "sharing": sharing.tolist()}
    if len(tasks) <= LISTED:
        found["kept_units"] = {task: row.nonzero()[:, 0].tolist() for task, row in zip(tasks, kept, strict=True)}
    return found


def _with_joins(graph: nx.DiGraph) -> nx.DiGraph:
    """The same flow with joins as nodes. What joins the sources of another join, and more, takes that join itself."""
    joined = FlowGraph(**graph.graph)
    made: dict[str, list[tuple[frozenset[str], str]]] = {word: [] for word in JOINS}  # by word: its sources and name
    numbers: Counter[str] = Counter()
    for node, attributes in graph.nodes(data=True):
        word, sources = attributes["join"], frozenset(graph.predecessors(node))
        if word == SEQUENTIAL or not sources:
            joined.add_node(node, **attributes)
            joined.add_edges_from((source, node, graph.edges[source, node]) for source in graph.predecessors(node))
            continue
        name = next((name for others, name in reversed(made[word]) if others == sources), "")
        if not name:
            numbers[word] += 1
            while (name := f"{word} {numbers[word]}") in graph:  # a site of that name
                numbers[word] += 1
            joined.add_node(name, kind="join", join=word, units=0, kept=0, share=1.0)
            _feed(joined, name, node, graph, made[word])
            made[word].append((sources, name))
        joined.add_node(node, **attributes)
        joined.add_edge(name, node, found="join", join=word, share=joined.nodes[name]["share"])
    return joined


def _feed(joined: nx.DiGraph, name: str, node: str, graph: nx.DiGraph, made: list[tuple[frozenset[str], str]]) -> None:
    """Leads what feeds a node into its join, through earlier joins of several sources where these are among them."""
    left = dict.fromkeys(graph.predecessors(node))
    units, kept = (sum(graph.nodes[source][key] for source in left) for key in ("units", "kept"))
    recent = sorted(made[-RECENT:], key=lambda pair: -len(pair[0]))
    for sources, other in recent:
        if len(sources) > 1 and sources <= left.keys():
            left = {source: None for source in left if source not in sources}
            joined.add_edge(other, name, found="join", join=joined.nodes[other]["join"],
                            share=joined.nodes[other]["share"])  # fmt: skip
    joined.add_edges_from((source, name, graph.edges[source, node]) for source in left)
    joined.nodes[name]["share"] = kept / units if units else 1.0
