"""Formats: one file each, pure, in inverse pairs where both ways make sense. Here: which suffix is written by what."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from os import PathLike
from pathlib import Path

import networkx as nx

from ..errors import RenderError
from ..flow_like import FLOW, LACKING, check_flow
from .contact_sheet import contact_scene as contact_scene
from .data import DATA_WRITERS
from .data import read_graph as read_graph
from .dot import to_dot
from .drawing import draw
from .html import Kept, to_html
from .scene import Scene
from .site_layout import DOUBLE, SINGLE
from .site_scene import site_scene
from .tikz import to_tikz
from .unit_scene import unit_scene
from .writing import write_bytes

Width = str | float
Writer = Callable[[nx.DiGraph, Width, Kept | None], bytes]
WIDTHS = {"single": SINGLE, "double": DOUBLE}


def points(width: Width) -> float:
    """A width in points. Raises RenderError for anything but "single", "double" or 100 to 10,000 points."""
    number = WIDTHS.get(width) if isinstance(width, str) else width
    if not isinstance(number, (int, float)) or not 100 <= number <= 10_000:
        raise RenderError(f"width: expected 'single', 'double' or 100 to 10,000 points, got {width!r}")
    return float(number)


def scene(graph: nx.DiGraph, width: Width = "double") -> Scene:
    """What a picture of the graph consists of. Raises RenderError where it cannot be read at that width."""
    check_flow(graph, error=RenderError)
    draws = unit_scene if graph.graph.get("level") == "unit" else site_scene
    return draws(graph, points(width))


def _drawn(format: str) -> Writer:
    return lambda graph, width, _: draw(scene(graph, width), format)


def _written(write: Callable[[nx.DiGraph], str]) -> Writer:
    return lambda graph, *_: write(graph).encode()


PICTURE_WRITERS: dict[str, Writer] = {f".{format}": _drawn(format) for format in ("svg", "png", "pdf")}
TEXT_WRITERS: dict[str, Writer] = {
    ".html": lambda graph, _, kept: to_html(graph, kept).encode(),
    ".tex": lambda graph, width, _: to_tikz(scene(graph, width)).encode(),
    **{suffix: _written(write) for suffix, write in {".dot": to_dot, ".gv": to_dot, **DATA_WRITERS}.items()},
}
WRITERS = PICTURE_WRITERS | TEXT_WRITERS
PICTURES, TEXT = tuple(PICTURE_WRITERS), tuple(TEXT_WRITERS)


def render(graph: nx.DiGraph, path: str | PathLike[str], *, width: Width = "double", kept: Kept | None = None) -> None:
    """Writes a graph made by `flow_graph` or `unit_flow` into a file; the suffix chooses the format.

    .svg, .png (300 dots per inch), .pdf and .tex (TikZ) are pictures as wide as a paper's column: "single" (3.5
    inches), "double" (7.16 inches) or a number of points (1/72 inch). .html is a page to move about in, which needs no
    network; it can switch between and combine the tasks in `kept_units`, or in kept: {site: (tasks, units) bool}. .dot
    and .gv are Graphviz's text. The same graph gives the same bytes.

    For other programs: .json (node-link), .graphml, .gexf (Gephi), .mmd (Mermaid), .csv.

    Raises RenderError for another suffix, for a graph that is too large to be read at that width (nadhooks.collapse
    makes it smaller), and where the file cannot be written, in which case an older file of that name stays as it was.
    """
    path, suffix = _named(path, WRITERS)
    if suffix not in DATA_WRITERS or not isinstance(graph, nx.DiGraph):  # other programs may want a bare wiring
        check_flow(graph, error=RenderError)
    try:
        data = WRITERS[suffix](graph, width, kept)
    except LACKING as error:
        raise RenderError(f"expected a graph made by {FLOW}, got one that lacks something ({error})") from error
    _write(path, data)


def write_scene(path: str | PathLike[str], made: Callable[[], Scene]) -> None:
    """Writes a scene, made when the name has been found good, as .svg, .png or .pdf. Raises RenderError."""
    path, suffix = _named(path, PICTURE_WRITERS)
    _write(path, draw(made(), suffix[1:]))


def _named(path: str | PathLike[str], known: Iterable[str]) -> tuple[Path, str]:
    try:
        path = Path(path)
    except TypeError as error:
        raise RenderError(f"expected a path, got {path!r}") from error
    suffix = path.suffix.lower()
    if suffix not in known:
        raise RenderError(f"{path}: expected a name that ends in {', '.join(known)}, got {suffix or 'no suffix'!r}")
    return path, suffix


def _write(path: Path, data: bytes) -> None:
    try:
        write_bytes(path, data)
    except OSError as error:
        raise RenderError(f"cannot write {path}: {error.strerror or error}") from error
