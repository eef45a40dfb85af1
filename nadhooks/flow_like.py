"""Whether a graph is a flow graph, wherever one is asked for."""

from __future__ import annotations

import networkx as nx

from .errors import NadhooksError

FLOW, UNIT_FLOW = "nadhooks.flow_graph", "nadhooks.unit_flow"
LACKING = nx.NetworkXException, KeyError, AttributeError, TypeError  # what graphs that were changed may end in


def check_flow(graph: object, made_by: str = FLOW, error: type[NadhooksError] = NadhooksError) -> None:
    """Raises the error for anything but a directed graph whose nodes all are of a kind ("site", "unit", "input", …)."""
    got = f"a {type(graph).__name__}"
    if isinstance(graph, nx.DiGraph) and not graph.is_multigraph():
        without = [node for node, data in graph.nodes(data=True) if "kind" not in data]
        if graph and not without:
            return
        got = f"one whose node {without[0]!r} has no 'kind'" if without else "an empty one"
    raise error(f"expected a graph made by {made_by}, got {got}")
