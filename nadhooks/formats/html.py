"""A flow graph as one HTML page that needs no network: panned and zoomed, classes switched, units named.

The page draws what `site_layout` and `unit_scene` place; its parts lie in `page/`, d3 (https://d3js.org) among them.
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import networkx as nx
import numpy as np

from .scene import (
    BOTH,
    FAINT,
    GREY,
    INK,
    NEGATIVE,
    POSITIVE,
    SHADES,
    TASKS,
    Disc,
    Shape,
    Stroke,
    Text,
)  # fmt: skip
from .site_layout import MARGIN, lay_out
from .site_scene import JOINS, SitePainter
from .unit_scene import ENDS, Strips, columns_of
from .words import headline, short_model, subtitle

Kept = Mapping[str, np.ndarray]

PITCH = 74.0  # points from one strip to the next
COLOURS: dict[str, Any] = {
    "faint": FAINT, "ink": INK, "grey": GREY, "tasks": TASKS, "both": BOTH, "shades": SHADES, "positive": POSITIVE,
    "negative": NEGATIVE, "joins": {kind: colour for kind, (colour, _) in JOINS.items()},
}  # fmt: skip


def to_html(graph: nx.DiGraph, kept: Kept | None = None) -> str:
    """The page of a graph made by `flow_graph` or `unit_flow`.

    kept: {site: (tasks, units) bool}, what each of the graph's tasks keeps, so that the page can switch between them;
    without it, what the graph's `kept_units` say, and where a graph has none, the page shows all tasks over each other.
    """
    unit_level = graph.graph.get("level") == "unit"
    data = (_units if unit_level else _sites)(graph)
    data |= {"level": "unit" if unit_level else "site", "model": short_model(graph), "colours": COLOURS}
    data["graph"] = nx.node_link_data(graph, edges="edges")
    if not unit_level:
        data["bits"] = {site: _packed(rows) for site, rows in (kept or _from_graph(graph)).items()}
    parts = {
        "TITLE": html.escape(f"{data['model']}: information flow"),
        "DATA": json.dumps(data, ensure_ascii=False, separators=(",", ":")).replace("</", "<\\/"),
        **{name: _part(file) for name, file in (("CSS", "page.css"), ("D3", "d3.min.js"), ("JS", "page.js"))},
    }
    page = _part("page.html")
    for name in ("TITLE", "CSS", "D3", "JS", "DATA"):  # the data last: it may hold anything
        before, _, after = page.partition(f"@{name}@")
        page = before + parts[name] + after
    return page


def _part(file: str) -> str:
    return (resources.files(__package__) / "page" / file).read_text(encoding="utf-8")


def _packed(rows: np.ndarray) -> str:
    """(tasks, units) bool, each row in whole bytes, the first unit in the highest bit."""
    return base64.b64encode(np.packbits(rows, axis=1).tobytes()).decode()


def _from_graph(graph: nx.DiGraph) -> dict[str, np.ndarray]:
    """What the graph knows of each task; nothing where it knows their sum alone."""
    tasks = graph.graph.get("tasks", [])
    combined = graph.graph.get("combine", "union") != "union"
    rows: dict[str, np.ndarray] = {}
    for name, data in graph.nodes(data=True):
        if data["kind"] != "site":
            continue
        units = data.get("kept_units") or {}
        if len(tasks) == 1:
            rows[name] = np.array([data["use"]]) > 0
        elif set(tasks) <= set(units) and not combined:
            rows[name] = np.zeros((len(tasks), data["units"]), bool)
            for row, task in enumerate(tasks):
                rows[name][row, units[task]] = True
        else:
            return {}
    return rows


def _sites(graph: nx.DiGraph) -> dict[str, Any]:
    layout = lay_out(graph, None)
    painter = SitePainter(graph, layout, layout.width)
    painter.down = MARGIN - layout.top
    figures = {}
    for name, data in graph.nodes(data=True):
        if data["kind"] == "site":
            painter.label(name, layout.places[name], data)
            figure = next(
                shape for shape in reversed(painter.shapes) if isinstance(shape, Text) and shape.colour == GREY
            )
            painter.shapes.remove(figure)
            figures[name] = _figure(figure)
        elif data["kind"] != "join":
            painter.end(name, data)
    bottom = painter.headers(painter.down + layout.bottom)
    words, painter.shapes = painter.shapes, []
    for name, data in graph.nodes(data=True):
        if data["kind"] == "join":
            painter.join(name, data)
        painter.sign(name)
    places = {
        name: [*_rounded(painter.left + p.x, painter.down + p.y, p.width, p.height), p.columns, p.cell]
        for name, p in layout.places.items()
    }
    routes = [
        [source, target, [_rounded(x + painter.left, y + painter.down) for x, y in route]]
        for (source, target), route in layout.routes.items()
    ]
    size = [layout.width, bottom + MARGIN]
    facts: dict[str, Any] = {"headline": headline(graph), "band": layout.band, "counts": painter.counts, "size": size}
    return {
        "places": places,
        "routes": routes,
        "figures": figures,
        **facts,
        **_words(words),
        "signs": _signs(painter.shapes),
    }


def _units(graph: nx.DiGraph) -> dict[str, Any]:
    columns = max(1, len(columns_of(graph)))  # a mask that lets nothing through has none
    shown = max((data.get("shown", 0) for data in graph.graph["sites"].values()), default=0)
    tall = max(300.0, min(1600.0, 4.0 * shown))
    strips = Strips(graph, 2 * MARGIN + 2 * ENDS + PITCH * columns, tall)
    places = strips.place()
    bottom = strips.names(places)
    for name, data in graph.nodes(data=True):
        if data["kind"] in ("input", "output"):
            strips.node(name, data)
    strips.grid()
    fills = {name: strips.fill(name) for name in graph}
    return {
        "places": {name: _rounded(*box) for name, box in strips.boxes.items()},
        "strips": {name: _rounded(*box) for name, box in places.items()},
        "fills": fills,
        "headline": subtitle(graph),
        "size": [strips.width, bottom + MARGIN],
        **_words(strips.shapes),
    }


def _signs(shapes: Iterable[Shape]) -> list[dict[str, Any]]:
    """How flows join: circles, and the lines in them."""
    signs: list[dict[str, Any]] = []
    for shape in shapes:
        if isinstance(shape, Disc):
            x, y, radius = _rounded(shape.x, shape.y, shape.radius)
            signs.append({"x": x, "y": y, "r": radius, "colour": shape.edge})
        elif isinstance(shape, Stroke):
            ends = _rounded(*shape.points[0], *shape.points[-1])
            signs.append({"line": ends, "width": round(shape.width, 2), "colour": shape.colour})
    return signs


def _words(shapes: Iterable[Shape]) -> dict[str, Any]:
    """Texts, and the lines over globs."""
    labels, rules = [], []
    for shape in shapes:
        if isinstance(shape, Text):
            anchor = {
                "x": round(shape.x, 2),
                "y": round(shape.y, 2),
                "size": round(shape.size, 2),
                "align": shape.align,
            }
            labels.append(anchor | {"text": shape.text, "turned": shape.turned, "grey": shape.colour == GREY})
        elif isinstance(shape, Stroke) and len(shape.points) == 4 and shape.points[0][1] == shape.points[-1][1]:
            rules.append(_rounded(shape.points[0][0], shape.points[-1][0], shape.points[0][1]))
    return {"labels": labels, "rules": rules}


def _figure(text: Text) -> dict[str, Any]:
    look = {"x": round(text.x, 2), "y": round(text.y, 2), "font-size": round(text.size, 2), "text-anchor": text.align}
    return look | ({"transform": f"rotate(-90 {text.x:.2f} {text.y:.2f})"} if text.turned else {})


def _rounded(*values: float) -> list[float]:
    return [round(value, 2) for value in values]
