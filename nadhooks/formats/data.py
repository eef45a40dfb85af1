"""Formats for other programs, by suffix, and the way back from those that lose nothing."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from pathlib import Path

import networkx as nx

from ..errors import GraphFileError
from .gexf import to_gexf
from .graphml import from_graphml, to_graphml
from .mermaid import to_mermaid
from .node_link import from_node_link, to_node_link
from .table import to_csv

DATA_WRITERS: dict[str, Callable[[nx.DiGraph], str]] = {
    ".json": to_node_link,
    ".graphml": to_graphml,
    ".gexf": to_gexf,
    ".mmd": to_mermaid,
    ".csv": to_csv,
}
READERS: dict[str, Callable[[str], nx.DiGraph]] = {".json": from_node_link, ".graphml": from_graphml}


def read_graph(path: str | PathLike[str]) -> nx.DiGraph:
    """Reads a flow graph that `render` wrote as .json or .graphml; every attribute comes back.

    Raises GraphFileError for another suffix, a file that cannot be read, and one that holds something else.
    """
    try:
        path = Path(path)
    except TypeError as error:
        raise GraphFileError(f"expected the path of a .json or .graphml file, got {path!r}") from error
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise GraphFileError(f"{path}: expected a name that ends in {', '.join(READERS)}, got {path.suffix!r}")
    try:
        return reader(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise GraphFileError(f"{path}: cannot read it: {getattr(error, 'strerror', None) or error}") from error
    except GraphFileError as error:
        raise GraphFileError(f"{path}: {error}") from error.__cause__
