"""Flow graphs that show themselves in notebooks."""

from __future__ import annotations

import networkx as nx

from .collapsing import collapse
from .errors import NadhooksError
from .flow_like import LACKING
from .formats import draw, scene


class FlowGraph(nx.DiGraph):
    """A `networkx.DiGraph` like any other, but for the picture that a notebook shows of it."""

    def _repr_svg_(self) -> str | None:
        """The picture; of a graph too large to be read, its collapsed view, and of one that no picture suits, none."""
        for graph in (lambda: self, lambda: collapse(self)):
            try:
                return draw(scene(graph()), "svg").decode()
            except (NadhooksError, *LACKING):  # the user's own graph is theirs to change
                continue
        return None
