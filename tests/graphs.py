"""Graphs made by hand, as `flow_graph` and `unit_flow` make them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import networkx as nx

Edge = tuple[str, ...]  # source, target, and how it joins


def site_graph(
    units: Mapping[str, int],
    kept: Mapping[str, Mapping[str, Sequence[int]]],
    edges: Sequence[Edge],
    model: str = "torchvision:net",
    **facts: object,
) -> nx.DiGraph:
    """units: {site: number}. kept: {task: {site: units}}. Sites whose number is 0 are joins, named by their word."""
    graph = nx.DiGraph(level="site", tasks=list(kept), model=model, **facts)
    graph.add_node("input", kind="input", units=0, kept=0, share=1.0)
    for name, number in units.items():
        if not number:
            graph.add_node(name, kind="join", join=name.split()[0], units=0, kept=0, share=1.0)
            continue
        by_task = {task: sorted(sites.get(name, ())) for task, sites in kept.items()}
        sharing = [sum(unit in chosen for chosen in by_task.values()) for unit in range(number)]
        some = sum(count > 0 for count in sharing)
        graph.add_node(
            name,
            kind="site",
            module=name,
            units=number,
            kept=some,
            share=some / number,
            use=[count / len(kept) for count in sharing],
            sharing=sharing,
            kept_units=by_task,
        )
    graph.add_node("output", kind="output", units=0, kept=0, share=1.0)
    for source, target, *join in edges:
        graph.add_edge(
            source, target, found="autograd", share=graph.nodes[source]["share"], join=join[0] if join else "sequential"
        )
    for stage, names in enumerate(nx.topological_generations(graph)):
        for name in names:
            graph.nodes[name]["stage"] = stage
    return graph


def chain(sites: int, units: int = 8, name: str = "layer.{}", keep: int = 2) -> nx.DiGraph:
    """One task that keeps every `keep`-th unit of so many sites in a row."""
    names = [name.format(number) for number in range(sites)]
    path = ["input", *names, "output"]
    kept = {"cat": {each: range(0, units, keep) for each in names}}
    return site_graph(dict.fromkeys(names, units), kept, list(itertools.pairwise(path)))


def unit_graph(sites: int = 3, units: int = 8, shown: int = 3, regions: int = 0) -> nx.DiGraph:
    """Every unit that is shown feeds every one of the next site; weights fall and change their sign with the number."""
    graph = nx.DiGraph(
        level="unit", tasks=["cat"], model="torchvision:net", weighting="class", reference="zero",
        estimator="gradient", images=8, sites={}, paths=[],
    )  # fmt: skip
    cells = [(row, column) for row in range(regions) for column in range(regions)]
    for row, column in cells:
        where = {"row": row, "column": column, "rows": regions, "columns": regions}
        graph.add_node(f"input:{row},{column}", kind="input", stage=0, **where)
    if not cells:
        graph.add_node("input", kind="input", stage=0)
    before = list(graph)
    for stage in range(1, sites + 1):
        name = f"layer.{stage - 1}"
        graph.graph["sites"][name] = {
            "units": units,
            "kept": units // 2,
            "stage": stage,
            "shown": shown,
            "coverage": 0.8,
        }
        graph.add_node(f"{name}:bias", kind="bias", site=name, stage=stage)
        here = [f"{name}:{2 * number}" for number in range(shown)]
        for number, node in enumerate(here):
            graph.add_node(node, kind="unit", site=name, unit=2 * number, stage=stage, attribution=(-0.5) ** number)
            for place, source in enumerate(before):
                graph.add_edge(source, node, weight=(-0.8) ** (number + place))
        graph.add_edge(f"{name}:bias", here[0], weight=0.1)
        before = here
    graph.add_node("output", kind="output", stage=sites + 1)
    graph.add_edges_from((source, "output", {"weight": 0.5}) for source in before)
    return graph
