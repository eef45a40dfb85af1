"""Formats: one file each, pure, in inverse pairs where both ways make sense. Here: pictures by suffix."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from os import PathLike
from pathlib import Path

import networkx as nx

from ..errors import RenderError
from .data import DATA_WRITERS
from .data import read_graph as read_graph
from .dot import to_dot
from .writing import write_bytes

TEXT = (".dot", ".gv")
PICTURES = (".svg", ".png", ".pdf")
INSTALL = "pip install 'nadhooks[dot]' (SVG and PNG), or install Graphviz so that `dot` is on the PATH (PDF too)"


def render(graph: nx.DiGraph, path: str | PathLike[str]) -> None:
    """Draws a graph made by `flow_graph` into a file; the suffix chooses the format: .svg, .png, .pdf, .dot or .gv.

    For other programs, of graphs by `unit_flow` too: .json (node-link), .graphml, .gexf (Gephi), .mmd (Mermaid), .csv.

    Raises RenderError for another suffix, where Graphviz is missing, and where the file cannot be written, in which
    case an older file of that name stays as it was.
    """
    try:
        path = Path(path)
    except TypeError as error:
        raise RenderError(f"expected a path, got {path!r}") from error
    suffix = path.suffix.lower()
    known = PICTURES + TEXT + tuple(DATA_WRITERS)
    if suffix not in known:
        raise RenderError(f"{path}: expected a name that ends in {', '.join(known)}, got {suffix or 'no suffix'!r}")
    try:
        text = DATA_WRITERS.get(suffix, to_dot)(graph)
    except (KeyError, AttributeError, TypeError) as error:
        raise RenderError(f"expected a graph made by nadhooks.flow_graph, got {graph!r} ({error})") from error
    data = draw(text, suffix[1:]) if suffix in PICTURES else text.encode()
    try:
        write_bytes(path, data)
    except OSError as error:
        raise RenderError(f"cannot write {path}: {error.strerror or error}") from error


def draw(dot: str, format: str) -> bytes:
    """DOT text through Graphviz: the `dot` on the PATH, else graphviz-pure's. Raises RenderError."""
    program = shutil.which("dot") or _graphviz_pure()
    if program is None:
        raise RenderError(f"no Graphviz found to draw with: {INSTALL}")
    if format == "pdf" and Path(program).stem == "graphviz-pure":
        raise RenderError(
            "graphviz-pure writes no PDF: install Graphviz so that `dot` is on the PATH, or render to .svg or .png"
        )
    drawn = subprocess.run([program, f"-T{format}"], input=dot.encode(), capture_output=True, check=False)
    if drawn.returncode:
        raise RenderError(f"{program} failed: {drawn.stderr.decode(errors='replace').strip()}")
    return drawn.stdout


def _graphviz_pure() -> str | None:
    """Its command, also in a virtual environment that is not activated."""
    return shutil.which("graphviz-pure") or shutil.which("graphviz-pure", path=sysconfig.get_path("scripts"))
