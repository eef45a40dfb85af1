"""Pictures and pages of graphs, and of masks."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike

import networkx as nx

from . import formats
from .default_device import made_on_cpu
from .flow import flow_graph
from .graphs import FlowGraph
from .masks import Masks


def render(graph: nx.DiGraph | Masks, path: str | PathLike[str], *, width: str | float = "double") -> None:
    """Writes a flow graph into a file; the suffix chooses the format.

    .svg, .png (300 dots per inch), .pdf and .tex (TikZ) are pictures as wide as a paper's column: width "single" (3.5
    inches), "double" (7.16 inches) or a number of points (1/72 inch). .html is a page to move about in, which needs no
    network. .dot and .gv are Graphviz's text. The same graph gives the same bytes.

    graph: made by `flow_graph` or `unit_flow`. Masks stand for the graph of all their tasks over each other; as .html,
    for every task alone and for every two combined.

    Raises RenderError for another suffix, for a graph that is too large to be read at that width (`collapse` makes it
    smaller), and where the file cannot be written, in which case an older file of that name stays as it was.
    """
    if not isinstance(graph, Masks):
        return formats.render(graph, path, width=width)
    kept = {site.name: graph.kept_units(site.name).cpu().numpy() for site in graph.sites}
    return formats.render(flow_graph(graph), path, width=width, kept=kept)


def read_graph(path: str | PathLike[str]) -> FlowGraph:
    """Reads a flow graph that `render` wrote as .json or .graphml; every attribute comes back.

    Raises GraphFileError for another suffix, a file that cannot be read, and one that holds something else.
    """
    return FlowGraph(formats.read_graph(path))


@made_on_cpu
def contact_sheet(
    graph: nx.DiGraph,
    path: str | PathLike[str],
    units: Sequence[str] | None = None,
    *,
    width: str | float = "double",
) -> None:
    """Writes what units see, of a graph from `what_units_see`, as a sheet for print: .png, .pdf or .svg.

    units: some of them, as "site:unit"; all by default. A row holds the unit's images, strongest first, with class and
    activation, and its mean activation by class. Raises RenderError.
    """
    formats.write_scene(path, lambda: formats.contact_scene(graph, units, formats.points(width)))
