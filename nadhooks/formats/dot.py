"""Flow graphs as Graphviz's DOT: pure text. Every site is a column of small squares, one for each unit."""

from __future__ import annotations

import math
from typing import Any

import graphviz
import networkx as nx

from .scene import BLUE, NEGATIVE, POSITIVE, blended, mixed, text_width
from .site_scene import colours_of, palette
from .words import headline, subtitle

SQUARE = 8  # points
COLUMNS = 8  # squares beside each other
CELLS = 256  # squares per site; wider sites share squares
TOTAL_CELLS = 20_000  # squares per picture; more would take Graphviz minutes
DROPPED = "#e6e6e6"
KEPT = BLUE
SIGNS = {"sum": "+", "concatenation": "||", "product": "×", "attention": "A"}
EDGE = "#7f7f7f"
GREY = "#555555"
FONT = "Arial"  # one name: of a list of names Graphviz would not know how wide the letters are


def to_dot(graph: nx.DiGraph) -> str:
    """DOT text of a graph made by `flow_graph` or `unit_flow`; the same graph gives the same text."""
    nodes = {name: f"n{number}" for number, name in enumerate(graph)}  # a `:` in a node id would be read as a port
    if graph.graph.get("level") == "unit":
        return _units(graph, nodes)
    sites = max(1, sum(data["kind"] == "site" for _, data in graph.nodes(data=True)))
    cells = max(COLUMNS, min(CELLS, TOTAL_CELLS // sites))
    dot = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "nodesep": "0.25", "ranksep": "0.35", "fontname": FONT, "fontsize": "13",
                    "labelloc": "t", "labeljust": "l", "bgcolor": "white", "pad": "0.2",
                    "label": f"<{_title(graph, cells)}>"},
        node_attr={"shape": "plain", "fontname": FONT, "fontsize": "10"},
        edge_attr={"color": EDGE, "arrowsize": "0.6"},
    )  # fmt: skip
    for name, data in graph.nodes(data=True):
        if data["kind"] == "site":
            dot.node(nodes[name], f"<{_site(graph, name, cells)}>", tooltip=_tooltip(name, data))
        elif data["kind"] == "join":
            dot.node(nodes[name], SIGNS.get(data["join"], data["join"]), shape="circle", margin="0.02", tooltip=name)
        else:
            dot.node(nodes[name], _escaped(name), shape="box", style="rounded", margin="0.12,0.06")
    for source, target, data in graph.edges(data=True):
        dot.edge(nodes[source], nodes[target], penwidth=f"{0.6 + 3.4 * data.get('share', 1.0):.2f}")
    return dot.source


def _units(graph: nx.DiGraph, nodes: dict[str, str]) -> str:
    """Every site a box around its units; edges as wide as their weight and coloured by sign."""
    dot = graphviz.Digraph(
        graph_attr={"rankdir": "LR", "fontname": FONT, "fontsize": "13", "labelloc": "t", "labeljust": "l",
                    "bgcolor": "white", "label": f"<{_escaped(subtitle(graph))}>"},
        node_attr={"shape": "box", "style": "filled", "fontname": FONT, "fontsize": "9", "margin": "0.06,0.02",
                   "height": "0.15", "width": "0.3", "color": GREY, "fillcolor": "white"},
        edge_attr={"arrowsize": "0.4"},
    )  # fmt: skip
    for number, site in enumerate(graph.graph["sites"]):
        with dot.subgraph(name=f"cluster_{number}") as box:
            box.attr(label=f"<{_escaped(site)}>", fontsize="10", color=DROPPED)
            for name, data in graph.nodes(data=True):
                if data.get("site") == site:
                    box.node(nodes[name], str(data.get("unit", "bias")), tooltip=name)
    for name, data in graph.nodes(data=True):
        if "site" not in data:
            dot.node(nodes[name], _escaped(name))
    most = max((abs(data["weight"]) for *_, data in graph.edges(data=True)), default=1.0) or 1.0
    for source, target, data in graph.edges(data=True):
        colour = POSITIVE if data["weight"] >= 0 else NEGATIVE
        width = f"{0.2 + 3.8 * abs(data['weight']) / most:.2f}"
        dot.edge(nodes[source], nodes[target], color=colour, penwidth=width, tooltip=f"{data['weight']:+.4g}")
    return dot.source


def _title(graph: nx.DiGraph, cells: int) -> str:
    shades = palette(graph)
    if len(shades) == 4:  # two tasks, a colour for each
        legend = [
            cell for colour, words in shades[1:] + shades[:1] for cell in (_key(colour), _text(words, named=True))
        ]
        if any(data["units"] > cells for _, data in graph.nodes(data=True)):
            mean = blended([colour for colour, _ in shades])
            legend += [_key(mean), _text("of several kinds: their colours mixed")]
    elif len(shades) == 2:
        legend = [_key(KEPT), _text(shades[1][1]), _key(DROPPED), _text(shades[0][1])]
        if any(data["units"] > cells for _, data in graph.nodes(data=True)):
            legend += [_key(_shade(0.5)), _text("some of a square's units kept")]
    else:
        steps = [_key(_shade(step / 5)) for step in range(1, 6)]
        legend = [_key(DROPPED), _text("kept by no task"), _text("by one"), *steps, _text("by all")]
    head = f'<TD ALIGN="LEFT">{_escaped(headline(graph))}</TD>'
    width = 2 + sum(width + 2 for width, _ in legend)
    # sizes are fixed: Graphviz would stretch the legend to the width of the title
    key = (
        f'<TABLE ALIGN="LEFT" BORDER="0" CELLSPACING="2" CELLPADDING="0" FIXEDSIZE="TRUE" WIDTH="{width}" HEIGHT="18">'
    )
    return (
        f'<TABLE BORDER="0" CELLSPACING="2" CELLPADDING="1"><TR>{head}</TR>'
        f'<TR><TD ALIGN="LEFT">{key}<TR>{"".join(cell for _, cell in legend)}</TR></TABLE></TD></TR></TABLE>'
    )


def _site(graph: nx.DiGraph, name: str, cells: int) -> str:
    data, colours = graph.nodes[name], [colour for colour, _ in palette(graph)]
    use = colours_of(graph, name)
    each = math.ceil(len(use) / cells)  # units that share a square
    parts = [use[start : start + each] for start in range(0, len(use), each)]
    if len(colours) == 4:  # two tasks
        shades = [blended([colours[round(value)] for value in part]) for part in parts]
    else:
        shades = [_shade(sum(part) / len(part)) for part in parts]
    rows = "".join(
        f"<TR>{''.join(map(_square, shades[start : start + COLUMNS]))}</TR>" for start in range(0, len(shades), COLUMNS)
    )
    size = f'WIDTH="{SQUARE * min(COLUMNS, len(shades))}" HEIGHT="{SQUARE * math.ceil(len(shades) / COLUMNS)}"'
    # the size is fixed: Graphviz would spread the squares to the width of a long name
    grid = f'<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="0" CELLPADDING="0" FIXEDSIZE="TRUE" {size}>{rows}</TABLE>'
    title = "<BR/>".join(_escaped(part) for part in _wrapped(name))
    shared = f"<BR/>{each} units a square" if each > 1 else ""
    return (
        '<TABLE BORDER="0" CELLBORDER="0" CELLSPACING="1" CELLPADDING="1">'
        f"<TR><TD>{title}</TD></TR><TR><TD>{grid}</TD></TR>"
        f'<TR><TD><FONT POINT-SIZE="9" COLOR="{GREY}">{data["kept"]} / {data["units"]}{shared}</FONT></TD></TR></TABLE>'
    )


def _square(colour: str) -> str:
    return f'<TD WIDTH="{SQUARE}" HEIGHT="{SQUARE}" FIXEDSIZE="TRUE" BGCOLOR="{colour}"></TD>'


def _key(colour: str) -> tuple[int, str]:
    return 12, f'<TD WIDTH="12" HEIGHT="12" FIXEDSIZE="TRUE" BGCOLOR="{colour}"></TD>'


def _text(text: str, named: bool = False) -> tuple[int, str]:
    width = 10 + (math.ceil(text_width(text, 10)) if named else 5 * len(text))  # a name may be all capitals
    font = f'<FONT POINT-SIZE="10" COLOR="{GREY}">{_escaped(text)}</FONT>'
    return width, f'<TD WIDTH="{width}" HEIGHT="14" FIXEDSIZE="TRUE">{font}</TD>'


def _shade(share: float) -> str:
    """From the colour of a dropped unit to that of a kept one."""
    return DROPPED if share <= 0 else mixed("#c6dbef", KEPT, share)


def _wrapped(name: str, width: int = 14) -> list[str]:
    """A long dotted name on several lines, broken behind dots."""
    lines = [""]
    for part in name.replace(".", ".\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("")
        lines[-1] += part
    return lines


def _tooltip(name: str, data: dict[str, Any]) -> str:
    return f"{name}: {data['kept']} of {data['units']} units kept"


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
