"""What units see, for print: a row for each, with its images and how strongly each class excites it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import networkx as nx

from ..errors import RenderError
from .scene import BLUE, FAINT, GREY, VERMILLION, Cells, Picture, Scene, Text, shortened, text_width
from .site_layout import MARGIN
from .words import called, short_model

ROW, GAP, NAME, BAR, SIZE = 42.0, 3.0, 74.0, 9.0, 6.0
LONGEST = 120  # rows of a sheet


def seen_units(graph: nx.DiGraph) -> dict[str, dict[str, Any]]:
    """{unit: what `what_units_see` found}, in the graph's order."""
    found: dict[str, dict[str, Any]] = {}
    for name, data in graph.nodes(data=True):
        if "sees" in data:
            found[name] = data
        for unit, seen in data.get("seen", {}).items():
            found[f"{name}:{unit}"] = seen
    return found


def contact_scene(graph: nx.DiGraph, units: Sequence[str] | None, width: float) -> Scene:
    """The sheet of some units ("site:unit"), by default all that know what they see."""
    seen = seen_units(graph)
    if not seen:
        raise RenderError("expected a graph from nadhooks.what_units_see, got one whose units see nothing")
    chosen = list(seen) if units is None else list(units)
    if not chosen:
        raise RenderError("expected at least one unit for a sheet, got units=[]")
    if missing := [unit for unit in chosen if unit not in seen]:
        raise RenderError(f"no unit {missing[0]!r} in the graph that knows what it sees")
    if len(chosen) > LONGEST:
        raise RenderError(f"expected at most {LONGEST} units on a sheet, got {len(chosen)}; choose some with units=")
    names = graph.graph.get("unit_names", {})
    classes = max(len(seen[unit]["activation"]) for unit in chosen)
    bars = min(0.3 * width, 12.0 * classes)
    room = width - 2 * MARGIN - NAME - bars - 2 * GAP
    if room < ROW:
        raise RenderError(f"too narrow for a sheet: {width:.0f} points; pass a larger width=")
    count = max(1, min(int((room + GAP) / (ROW + GAP)), max(len(seen[unit]["sees"]) for unit in chosen)))
    scene = Scene(width, 0.0, f"what units of {short_model(graph)} see")
    y = MARGIN + 8
    header = "mean activation by class"
    x = min(MARGIN + NAME + count * (ROW + GAP) + GAP, width - MARGIN - text_width(header, SIZE))
    scene.shapes.append(Text(MARGIN, y, shortened(scene.title, 8.0, x - GAP - MARGIN), 8.0))
    scene.shapes.append(Text(x, y, header, SIZE, GREY))
    y += 6
    for unit in chosen:
        name = names.get(unit, "")
        scene.shapes.append(Text(MARGIN, y + 10, shortened(unit, 6.5, NAME - 4), 6.5))
        if name:
            scene.shapes.append(Text(MARGIN, y + 19, shortened(name, 6.5, NAME - 4), 6.5, GREY))
        for number, each in enumerate(seen[unit]["sees"][:count]):
            x = MARGIN + NAME + number * (ROW + GAP)
            scene.shapes.append(Picture((x, y, ROW, ROW), each["crop"]))
            figure = f" · {each['activation']:.2g}"
            told = shortened(each["label"], 5.0, ROW - text_width(figure, 5.0)) + figure
            scene.shapes.append(Text(x + ROW / 2, y + ROW + 5.5, told, 5.0, GREY, "middle"))
        _bars(scene, seen[unit]["activation"], MARGIN + NAME + count * (ROW + GAP) + GAP, y, bars)
        y += ROW + 11
    scene.height = y + MARGIN
    return scene


def _bars(scene: Scene, activation: dict[str, float], x: float, y: float, width: float) -> None:
    """One upright bar for each class; the strongest is named."""
    most = max((abs(value) for value in activation.values()), default=0.0) or 1.0
    each = width / max(1, len(activation))
    base = y + ROW
    scene.shapes.append(Cells(((x, base, width, 0.5),), FAINT))
    for number, value in enumerate(activation.values()):
        tall = abs(value) / most * (ROW - BAR)
        colour = BLUE if value >= 0 else VERMILLION
        scene.shapes.append(Cells(((x + each * (number + 0.15), base - tall, 0.7 * each, tall),), colour))
    if all(text_width(name, 4.6) <= each - 1 for name in activation):
        for number, text in enumerate(activation):
            scene.shapes.append(Text(x + each * (number + 0.5), base + 5.5, text, 4.6, GREY, "middle"))
    else:
        best = max(activation, key=lambda name: activation[name])
        text = shortened(f"most: {called(best)}", 5.0, scene.width - MARGIN - x)
        scene.shapes.append(Text(x, base + 5.5, text, 5.0, GREY))
