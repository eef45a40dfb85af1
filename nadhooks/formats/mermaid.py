"""Flow graphs as Mermaid flowcharts, which GitHub, GitLab and many notebooks draw from text."""

from __future__ import annotations

from typing import Any

import networkx as nx

from ..errors import RenderError
from .scene import NEGATIVE, POSITIVE

MOST = 500  # edges; Mermaid refuses more unless the page that shows it says otherwise
WIDEST, THINNEST = 6.0, 1.0  # points
SIGNS = {"sum": "+", "product": "×", "concatenation": "‖", "attention": "attention"}
GREY = "#7f7f7f"


def to_mermaid(graph: nx.DiGraph) -> str:
    """Mermaid text: a box for each site with kept and all units, or a frame for each site with its units in it.

    Edges are as wide as their share, or their |weight|, orange for what adds to the logit and blue for what takes away.
    Raises RenderError for more than 500 edges, which Mermaid does not draw.
    """
    if graph.number_of_edges() > MOST:
        raise RenderError(
            f"Mermaid draws at most {MOST} edges, and this graph has {graph.number_of_edges():,}; show fewer units "
            "(nodes=, edges= or top= of unit_flow), joins as nodes (joins=True of flow_graph), or write .graphml"
        )
    nodes = {name: f"n{number}" for number, name in enumerate(graph)}
    lines = ["flowchart LR"]
    frames: dict[str, list[str]] = {}
    for name, data in graph.nodes(data=True):
        frame = data["site"] if data["kind"] in ("unit", "bias") else ""
        frames.setdefault(frame, []).append(f"{nodes[name]}{_shape(name, data)}")
    lines += [f"  {line}" for line in frames.pop("", [])]
    for number, (site, inside) in enumerate(frames.items()):
        lines += [f'  subgraph s{number}["{_escaped(site)}"]', *(f"    {line}" for line in inside), "  end"]
    lines += [f"  {nodes[source]} --> {nodes[target]}" for source, target in graph.edges]
    strongest = max((abs(_strength(data)) for *_, data in graph.edges(data=True)), default=0.0) or 1.0
    for number, (*_, data) in enumerate(graph.edges(data=True)):
        width = THINNEST + (WIDEST - THINNEST) * abs(_strength(data)) / strongest
        colour = GREY if "weight" not in data else POSITIVE if data["weight"] >= 0 else NEGATIVE
        lines.append(f"  linkStyle {number} stroke:{colour},stroke-width:{width:.1f}px")
    return "\n".join(lines) + "\n"


def _shape(name: str, data: dict[str, Any]) -> str:
    if data["kind"] == "site":
        return f'["{_escaped(name)}<br/>{data["kept"]} / {data["units"]}"]'
    if data["kind"] == "join":
        return f'(("{SIGNS.get(data["join"], _escaped(data["join"]))}"))'
    if data["kind"] == "unit":
        return f'["{data["unit"]}"]'
    return f'(["{"bias" if data["kind"] == "bias" else _escaped(name)}"])'


def _strength(data: dict[str, Any]) -> float:
    weight = data.get("weight")
    return float(weight if isinstance(weight, (int, float)) else data.get("share", 1.0))


def _escaped(text: str) -> str:
    """Signs that Mermaid or HTML would read as their own, by number; first the one that numbers begin with."""
    for sign in '#&<>"':
        text = text.replace(sign, f"\0{ord(sign)};")
    return text.replace("\0", "#")
