"""Flow graphs as node-link JSON, as D3 and networkx know it; in inverse pairs."""

from __future__ import annotations

import json

import networkx as nx

from ..errors import GraphFileError


def to_node_link(graph: nx.DiGraph) -> str:
    """JSON text with the keys directed, multigraph, graph, nodes and edges; nothing is lost."""
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1, ensure_ascii=False) + "\n"


def from_node_link(text: str) -> nx.DiGraph:
    """The inverse of `to_node_link`. Raises GraphFileError for anything else."""
    try:
        graph = nx.node_link_graph(json.loads(text), edges="edges")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, nx.NetworkXError) as error:
        raise GraphFileError(
            f"expected node-link JSON, got something else ({type(error).__name__}: {error})"
        ) from error
    if not isinstance(graph, nx.DiGraph) or graph.is_multigraph():
        raise GraphFileError("expected node-link JSON of a directed graph with single edges")
    return graph
