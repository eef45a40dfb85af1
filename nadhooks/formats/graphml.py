"""Flow graphs as GraphML, which yEd, Gephi, Cytoscape, igraph and networkx read; in inverse pairs."""

from __future__ import annotations

import networkx as nx

from ..errors import GraphFileError
from .plain import flattened, unfold


def to_graphml(graph: nx.DiGraph) -> str:
    """GraphML text; lists and mappings among the attributes are JSON texts."""
    return "\n".join(nx.generate_graphml(flattened(graph), named_key_ids=False)) + "\n"


def from_graphml(text: str) -> nx.DiGraph:
    """The inverse of `to_graphml`. Raises GraphFileError for anything else."""
    try:
        graph = nx.parse_graphml(text)
    except Exception as error:  # parsers of XML raise kinds of their own
        raise GraphFileError(f"expected GraphML, got something else ({error})") from error
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise GraphFileError("expected GraphML of a directed graph with single edges")
    for name in ("node_default", "edge_default"):
        graph.graph.pop(name, None)
    for data in (graph.graph, *(data for _, data in graph.nodes(data=True)), *(d for *_, d in graph.edges(data=True))):
        unfold(data)
    return graph
