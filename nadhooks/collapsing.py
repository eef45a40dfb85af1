"""Flow graphs made small: sites of one part of the network, or units of one site, taken together."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx

from .errors import NadhooksError
from .flow_like import FLOW, LACKING, check_flow

SITES = 48  # as many as fit a page's width


def collapse(graph: nx.DiGraph, most: int = SITES) -> nx.DiGraph:
    """A smaller graph of the same kind, of at most so many sites.

    Of a site-level graph, sites that share the beginning of their names become one ("layer3.*"), as deep in the names
    as the number allows; where names do not tell, neighbouring stages do ("conv1 … conv9"). Units stand one after
    another in firing order, and `members` lists the sites. Joins go. Of a unit-level graph, each site of which units
    are shown becomes a node that keeps these, and an edge's `share` is its sum of |weight| as a part of the largest
    such sum.

    Raises NadhooksError for another graph or a number below 1.
    """
    if not isinstance(most, int) or most < 1:
        raise NadhooksError(f"most: expected a number of sites from 1, got {most!r}")
    made_by = f"{FLOW} or unit_flow"
    check_flow(graph, made_by)
    try:
        if graph.graph.get("level") == "unit":
            return _of_units(graph)
        return _of_sites(_without_joins(graph), most)
    except LACKING as error:
        raise NadhooksError(f"expected a graph made by {made_by}, got one that lacks something ({error})") from error


def _without_joins(graph: nx.DiGraph) -> nx.DiGraph:
    """Joins that stand as nodes give way to edges from all they join to all they feed."""
    graph = graph.copy()
    for name in [name for name, data in graph.nodes(data=True) if data["kind"] == "join"]:
        join = graph.nodes[name].get("join", "sequential")
        for source, _, before in list(graph.in_edges(name, data=True)):
            for target in list(graph.successors(name)):
                graph.add_edge(source, target, **{**before, "join": join})
        graph.remove_node(name)
    return graph


def _of_sites(graph: nx.DiGraph, most: int) -> nx.DiGraph:
    sites = [name for name, data in graph.nodes(data=True) if data["kind"] == "site"]
    deepest = max((name.count(".") for name in sites), default=0)
    groups = {name: [name] for name in sites}
    for depth in range(deepest + 1, 0, -1):
        if len(groups) <= most:
            break
        groups = _merged(graph, sites, lambda name, depth=depth: ".".join(name.split(".")[:depth]))  # type: ignore[misc]
    if len(groups) > most:
        place = {name: min(most - 1, i * most // len(sites)) for i, name in enumerate(_ordered(graph, sites))}
        groups = _merged(graph, sites, lambda name: place[name])
    small = graph.__class__(**graph.graph)
    home = {member: name for name, members in groups.items() for member in members}
    for name in graph:
        group = home.get(name, name)
        if group not in small:
            small.add_node(group, **(_united(graph, groups[group]) if group in groups else graph.nodes[name]))
    joins: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for source, target, data in graph.edges(data=True):
        edge = home.get(source, source), home.get(target, target)
        if edge[0] != edge[1]:
            small.add_edge(*edge, found=data.get("found", ""), share=small.nodes[edge[0]]["share"])
            joins[edge][data.get("join", "sequential")] += 1
    for (source, target), words in joins.items():
        small.edges[source, target]["join"] = words.most_common(1)[0][0]
    return _staged(small)


def _ordered(graph: nx.DiGraph, sites: list[str]) -> list[str]:
    return [name for name in nx.topological_sort(graph) if graph.nodes[name]["kind"] == "site"] if sites else []


def _merged(graph: nx.DiGraph, sites: list[str], key: Callable[[str], Any]) -> dict[str, list[str]]:
    """Sites by key; keys that feed each other in a circle become one, so that the graph stays acyclic."""
    between = nx.DiGraph()
    between.add_nodes_from(key(name) for name in sites)
    known = set(sites)
    between.add_edges_from((key(a), key(b)) for a, b in graph.edges if a in known and b in known)
    whole = {each: number for number, part in enumerate(nx.strongly_connected_components(between)) for each in part}
    members: dict[int, list[str]] = {}
    for name in sites:
        members.setdefault(whole[key(name)], []).append(name)
    groups: dict[str, list[str]] = {}
    for names in members.values():
        named = names[0] if len(names) == 1 else _glob(names)
        groups[named if named not in groups else f"{names[0]} … {names[-1]}"] = names
    return groups


def _glob(names: list[str]) -> str:
    parts = [name.split(".") for name in names]
    same = 0
    while all(len(part) > same + 1 and part[same] == parts[0][same] for part in parts):
        same += 1
    return ".".join([*parts[0][:same], "*"]) if same else f"{names[0]} … {names[-1]}"


def _united(graph: nx.DiGraph, members: list[str]) -> dict[str, Any]:
    if len(members) == 1:
        return dict(graph.nodes[members[0]]) | {"members": members}
    parts = [graph.nodes[name] for name in members]
    units = sum(part["units"] for part in parts)
    kept = sum(part["kept"] for part in parts)
    whole: dict[str, Any] = {
        "kind": "site", "stage": 0, "module": _glob(members), "units": units, "kept": kept,
        "share": kept / max(1, units),
        "use": [use for part in parts for use in part["use"]], "members": members,
    }  # fmt: skip
    if all("sharing" in part for part in parts):
        whole["sharing"] = [number for part in parts for number in part["sharing"]]
    if all("kept_units" in part for part in parts):
        whole["kept_units"] = {task: list(_shifted(parts, task)) for task in parts[0]["kept_units"]}
    return whole


def _shifted(parts: list[dict[str, Any]], task: str) -> Iterable[int]:
    start = 0
    for part in parts:
        yield from (start + unit for unit in part["kept_units"][task])
        start += part["units"]


def _staged(graph: nx.DiGraph) -> nx.DiGraph:
    for stage, names in enumerate(nx.topological_generations(graph)):
        for name in names:
            graph.nodes[name]["stage"] = stage
    return graph


def _of_units(graph: nx.DiGraph) -> nx.DiGraph:
    facts = {key: value for key, value in graph.graph.items() if key not in ("level", "sites", "paths")}
    flow = "flow: sum of |effect|, as a part of the largest"
    small = graph.__class__(**facts, flow=flow, counted="shown")
    small.add_node("input", kind="input", units=0, kept=0, share=1.0)
    shown: dict[str, list[int]] = {name: [] for name in graph.graph["sites"]}
    for _, data in graph.nodes(data=True):
        if data["kind"] == "unit":
            shown[data["site"]].append(data["unit"])
    for name, data in graph.graph["sites"].items():
        if not shown[name]:
            continue
        use = [0.0] * data["units"]
        for unit in shown[name]:
            use[unit] = 1.0
        kept = len(shown[name])
        facts = {"units": data["units"], "kept": kept, "share": kept / max(1, data["units"]), "use": use}
        small.add_node(name, kind="site", module=name, **facts)
    small.add_node("output", kind="output", units=0, kept=0, share=1.0)
    sums: Counter[tuple[str, str]] = Counter()
    for source, target, data in graph.edges(data=True):
        ends = [graph.nodes[name].get("site", graph.nodes[name]["kind"]) for name in (source, target)]
        if graph.nodes[source]["kind"] != "bias" and ends[0] != ends[1]:
            sums[ends[0], ends[1]] += abs(data["weight"])
    largest = max(sums.values(), default=0.0) or 1.0
    for (first, last), weight in sums.items():
        small.add_edge(first, last, found="unit_flow", weight=weight, share=weight / largest)
    return _staged(small)
