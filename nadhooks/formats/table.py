"""Flow graphs as one table: a row for each node and for each edge, for spreadsheets and pandas."""

from __future__ import annotations

import csv
import io
from typing import Any

import networkx as nx

from .plain import flat_values

FIRST = ("row", "name", "source", "target")


def to_rows(graph: nx.DiGraph) -> list[dict[str, Any]]:
    """A mapping for each node (row "node", name) and then each edge (row "edge", source, target), and its attributes.

    Lists and mappings are JSON texts. `pandas.DataFrame(to_rows(graph))` is the table in pandas.
    """
    nodes = [{"row": "node", "name": name, **flat_values(data)} for name, data in graph.nodes(data=True)]
    edges = [{"row": "edge", "source": u, "target": v, **flat_values(data)} for u, v, data in graph.edges(data=True)]
    return nodes + edges


def to_csv(graph: nx.DiGraph) -> str:
    """The rows as CSV with a header; what a row does not have is empty."""
    rows = to_rows(graph)
    columns = dict.fromkeys([*FIRST, *(key for row in rows for key in row)])
    text = io.StringIO()
    lines = csv.DictWriter(text, list(columns), lineterminator="\n")
    lines.writeheader()
    lines.writerows(rows)
    return text.getvalue()
