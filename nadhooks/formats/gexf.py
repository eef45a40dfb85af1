"""Flow graphs as GEXF, Gephi's own format: written only, for it has no place for what a graph says of itself."""

from __future__ import annotations

import re

import networkx as nx

from .plain import flattened


def to_gexf(graph: nx.DiGraph) -> str:
    """GEXF text; lists and mappings among the attributes are JSON texts, edges' weights are Gephi's weights."""
    flat = flattened(graph)
    for node, data in flat.nodes(data=True):
        data["label"] = node
    text = "\n".join(nx.generate_gexf(flat))
    return re.sub(r' lastmodifieddate="[^"]*"', "", text, count=1) + "\n"  # the same graph gives the same text any day
