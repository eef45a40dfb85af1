"""Attributes as plain values: lists and mappings as JSON text, for formats that know numbers and words only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import networkx as nx

STRUCTURED = (list, tuple, dict)


def flattened(graph: nx.DiGraph) -> nx.DiGraph:
    """The same graph with every list and mapping among its attributes as JSON text, and no attribute that is None."""
    flat = nx.DiGraph(**flat_values(graph.graph))
    flat.add_nodes_from((node, flat_values(data)) for node, data in graph.nodes(data=True))
    flat.add_edges_from((u, v, flat_values(data)) for u, v, data in graph.edges(data=True))
    return flat


def flat_values(data: Mapping[str, Any]) -> dict[str, Any]:
    return {
        key: json.dumps(value, ensure_ascii=False) if isinstance(value, STRUCTURED) else value
        for key, value in data.items()
        if value is not None
    }


def unfold(data: dict[str, Any]) -> None:
    """Puts the lists and mappings back, in place."""
    for key, value in data.items():
        if isinstance(value, str) and value[:1] in ("[", "{"):
            try:
                data[key] = json.loads(value)
            except ValueError:  # a name that begins with a bracket
                continue
