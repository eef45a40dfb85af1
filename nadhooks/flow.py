"""Flow graphs: wiring plus masks, as a networkx graph that can be drawn, measured and written to files."""

from __future__ import annotations

import networkx as nx

from .errors import NadhooksError
from .graphs import FlowGraph
from .masks import Masks
from .wiring import INPUT, OUTPUT


def flow_graph(masks: Masks, task: object = None) -> nx.DiGraph:
    """The information flow of one task (a name or label), or of all tasks over each other.

    Nodes are "input", every site's name, "output". Attributes of nodes:
        kind: "input", "site" or "output". module: the site's module. stage: longest distance from the input.
        units: how many the site has. kept: how many of them the task keeps (with all tasks: at least one task keeps).
        share: kept / units. use: (units,) list, the share of the graph's tasks that keep each unit.
        Of "input" and "output", units and kept are 0.
    Edges carry `found`, how the wiring knows of them, and `share`, the share of units that the source keeps (1.0 from
    "input"). The graph's attributes: `tasks`, the names of its tasks, and `model`.

    Raises TaskError for an unknown task.
    """
    if not isinstance(masks, Masks):
        raise NadhooksError(f"expected Masks, got {type(masks).__name__}; nadhooks.load(path) reads a file")
    chosen = masks if task is None else masks.select(task)
    graph = FlowGraph(masks.wiring, tasks=list(chosen.tasks), model=str(masks.provenance.get("model", "")))
    for stage, nodes in enumerate(nx.topological_generations(masks.wiring)):
        for node in nodes:
            graph.nodes[node].update(kind="site", stage=stage)
    for node in (INPUT, OUTPUT):
        graph.nodes[node].update(kind=node, units=0, kept=0, share=1.0)
    for site in chosen.sites:
        use = (chosen[site.name] > 0.5).double().mean(0)  # (units,)
        kept = int((use > 0).sum())
        graph.nodes[site.name].update(
            module=site.module, units=site.units, kept=kept, share=kept / site.units, use=use.tolist()
        )
    for source, _, data in graph.edges(data=True):
        data["share"] = graph.nodes[source]["share"]
    return graph
