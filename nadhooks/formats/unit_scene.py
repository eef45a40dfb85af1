"""A unit-level graph as strips: every unit of a site in its fixed place, edges by weight and sign, weak ones first."""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cached_property
from typing import Any

import networkx as nx

from ..errors import RenderError
from .frame import SMALL, Item, headers, legend, remark, swatch, title
from .labels import APART, Labels, label
from .scene import (
    FAINT,
    GREY,
    INK,
    NEGATIVE,
    PAPER,
    POSITIVE,
    Box,
    Cells,
    Disc,
    Point,
    Scene,
    Shape,
    Stroke,
    Text,
    line,
    mixed,
    shortened,
    swing,
    text_width,
)  # fmt: skip
from .site_layout import MARGIN, PITCH
from .words import called, subtitle

NODES, EDGES = 500, 400  # more would be a hairball: of more edges, the strongest are drawn
WIDEST, THINNEST = 3.2, 0.25  # edges, in points
ENDS = 40.0  # room for the input and for the output
LEAST = 1.7  # the height of a unit's mark


def unit_scene(graph: nx.DiGraph, width: float) -> Scene:
    """The picture of a graph made by `unit_flow`, so many points wide. Raises RenderError where it cannot be read."""
    if len(graph) > NODES:
        raise RenderError(
            f"too large to be read as strips: {len(graph)} nodes (at most {NODES}); keep fewer with a smaller share of "
            "nodes, draw nadhooks.collapse(graph), a band for each pair of sites, or render to .html"
        )
    return Strips(graph, width).scene()


def columns_of(graph: nx.DiGraph) -> list[list[str]]:
    """Sites by stage, in firing order; of a part of a graph, those that it has nodes of."""
    present = {data.get("site") for _, data in graph.nodes(data=True)}
    stages: dict[int, list[str]] = {}
    for name, data in graph.graph["sites"].items():
        if name in present:
            stages.setdefault(data["stage"], []).append(name)
    return [stages[stage] for stage in sorted(stages)]


class Strips:
    """Places strips and units, and turns them into shapes."""

    def __init__(self, graph: nx.DiGraph, width: float, tall: float = 0.0) -> None:
        self.graph, self.width = graph, width
        self.shapes: list[Shape] = []
        self.columns = columns_of(graph)
        self.lanes = max((len(column) for column in self.columns), default=1)
        self.pitch = (width - 2 * MARGIN - 2 * ENDS) / max(1, len(self.columns))
        if self.pitch < PITCH:
            raise RenderError(
                f"too large to be read at {width:.0f} points: {len(self.columns)} stages (room for "
                f"{int((width - 2 * MARGIN - 2 * ENDS) / PITCH)}); pass a larger width=, draw "
                "nadhooks.collapse(graph), or render to .html"
            )
        self.labels: Labels = label(self.columns, self.pitch)
        self.strip = min(9.0, 0.34 * self.pitch)
        self.tall = tall or max(130.0, min(260.0, 0.42 * width))
        self.most = max((abs(data["weight"]) for *_, data in graph.edges(data=True)), default=1.0) or 1.0
        strengths = [abs(data["attribution"]) for _, data in graph.nodes(data=True) if "attribution" in data]
        self.strongest = max(strengths, default=1.0) or 1.0
        self.boxes: dict[str, Box] = {}

    def scene(self) -> Scene:
        words, below = title(subtitle(self.graph), self.width)
        self.shapes += words
        strips = self.place(below)
        for name, strip in strips.items():
            self.shapes.append(Cells((strip,), FAINT, name))
        edges = sorted(self.graph.edges(data=True), key=lambda edge: abs(edge[2]["weight"]))
        for source, target, data in edges[-EDGES:]:  # the strongest last, above the others
            self._edge(source, target, data["weight"])
        self.grid()
        for name, data in self.graph.nodes(data=True):
            self.node(name, data)
        words, lowest = legend(self._items(), self.width, self.names(strips) + 9)
        self.shapes += words
        return Scene(self.width, lowest + MARGIN, subtitle(self.graph), self.shapes)

    # --- places ---

    def place(self, top: float = MARGIN) -> dict[str, Box]:
        """The boxes of all strips; `boxes` then has those of all nodes."""
        figures = self._figures_height()
        self.top = top + figures
        between = figures + self.labels.height + 6 if self.lanes > 1 else 0.0
        self.bottom = self.top + self.tall * (1 + 0.5 * (self.lanes - 1)) + between * (self.lanes - 1)
        strips = self._place(between)
        self._place_nodes(strips)
        return strips

    def _place(self, between: float) -> dict[str, Box]:
        strips = {}
        for number, column in enumerate(self.columns):
            x = MARGIN + ENDS + (number + 0.5) * self.pitch - self.strip / 2
            room = (self.bottom - self.top - between * (len(column) - 1)) / len(column)
            if self.lanes > 1 and len(column) == 1:
                room = min(room, self.tall)
            y = (self.top + self.bottom - room * len(column) - between * (len(column) - 1)) / 2
            for name in column:
                strips[name] = (x, y, self.strip, room)
                y += room + between
        return strips

    def _place_nodes(self, strips: dict[str, Box]) -> None:
        middle = (self.top + self.bottom) / 2
        side = min(30.0, ENDS - 8)
        for name, data in self.graph.nodes(data=True):
            kind = data["kind"]
            if kind == "unit":
                x, y, wide, tall = strips[data["site"]]
                each = tall / self.graph.graph["sites"][data["site"]]["units"]
                mark = max(LEAST, min(6.0, each * 0.9))
                self.boxes[name] = (x - 1.2, y + (data["unit"] + 0.5) * each - mark / 2, wide + 2.4, mark)
            elif kind == "bias":
                x, y, wide, tall = strips[data.get("site") or name.rpartition(":")[0]]
                fed = {self.graph.nodes[unit].get("site") for unit in self.graph.successors(name)}
                before = x - 0.5 * (self.pitch - wide)  # of what it feeds
                x = before if data.get("site") in fed else x + wide / 2 - 1.6
                self.boxes[name] = (x, y + tall + 2.2, 3.2, 3.2)
            elif kind == "input" and "row" in data:
                cell = side / max(data["rows"], data["columns"])
                top = middle - cell * data["rows"] / 2
                self.boxes[name] = (MARGIN + data["column"] * cell, top + data["row"] * cell, cell, cell)
            elif kind == "input":
                self.boxes[name] = (MARGIN + 12, middle - 20, 3.0, 40)
            else:
                self.boxes[name] = (self.width - MARGIN - 18, middle - 20, 3.0, 40)

    def _ends(self, source: str, target: str) -> tuple[Point, Point]:
        x, y, wide, tall = self.boxes[source]
        data = self.graph.nodes[source]
        right = x + wide * (data["columns"] - data["column"]) if "row" in data else x + wide  # regions: the grid's side
        start = (right, y + tall / 2)
        x, y, _, tall = self.boxes[target]
        return start, (x, y + tall / 2)

    # --- shapes ---

    def _edge(self, source: str, target: str, weight: float) -> None:
        share = abs(weight) / self.most
        about = f"{source} → {target}: {weight:+.4g}"
        start, end = self._ends(source, target)
        colour = POSITIVE if weight >= 0 else NEGATIVE
        width, opacity = max(THINNEST, WIDEST * share), round(0.18 + 0.67 * math.sqrt(share), 3)
        self.shapes.append(Stroke(swing(start, end), width, colour, opacity, about=about))

    def node(self, name: str, data: dict[str, Any]) -> None:
        kind, box = data["kind"], self.boxes[name]
        if kind == "unit":
            self.shapes.append(Cells((box,), self.fill(name), f"{name}: {data['attribution']:+.4g}"))
        elif kind == "bias":
            x, y, side, _ = box
            self.shapes.append(Disc(x + side / 2, y + side / 2, side / 2, PAPER, GREY))
        elif "row" in data:
            self.shapes.append(Cells((box,), self.fill(name), name))
            self.shapes.append(Stroke(_outline(box), 0.4, GREY))
        else:
            x, y, wide, tall = box
            self.shapes.append(Cells((box,), INK, name))
            text = name if kind == "input" else shortened(self._class_name(), SMALL + 0.5, self.tall)
            x = x - 2.5 if kind == "input" else x + wide + 8
            self.shapes.append(Text(x, y + tall / 2, text, SMALL + 0.5, INK, "middle", turned=True))

    def grid(self) -> None:
        """The image's regions, also those that nothing leaves."""
        first = next((name for name, data in self.graph.nodes(data=True) if "row" in data), None)
        if first is None:
            return
        data, (x, y, cell, _) = self.graph.nodes[first], self.boxes[first]
        x, y = x - data["column"] * cell, y - data["row"] * cell
        self.shapes.append(Text(x, y - 3, "input", SMALL + 0.5))
        places = [(row, column) for row in range(data["rows"]) for column in range(data["columns"])]
        for row, column in places:
            self.shapes.append(Stroke(_outline((x + column * cell, y + row * cell, cell, cell)), 0.4, GREY))

    def fill(self, name: str) -> str:
        """A unit's colour by its attribution, an image region's by the sum of its edges."""
        data = self.graph.nodes[name]
        if "row" in data:
            share = self.regions[name] / (max(map(abs, self.regions.values())) or 1.0)
            return mixed(PAPER, POSITIVE if share >= 0 else NEGATIVE, abs(share))
        if data["kind"] != "unit":
            return PAPER if data["kind"] == "bias" else INK
        strength = 0.3 + 0.7 * math.sqrt(abs(data["attribution"]) / self.strongest)
        return mixed(PAPER, POSITIVE if data["attribution"] >= 0 else NEGATIVE, strength)

    @cached_property
    def regions(self) -> dict[str, float]:
        return {
            name: sum(data["weight"] for *_, data in self.graph.out_edges(name, data=True))
            for name, node in self.graph.nodes(data=True)
            if "row" in node
        }

    def _class_name(self) -> str:
        return ", ".join(map(called, self.graph.graph.get("tasks", []))) or "output"

    # --- words ---

    def _figures(self, name: str) -> list[str]:
        data = self.graph.graph["sites"][name]
        shown = data.get("shown", sum(d.get("site") == name for _, d in self.graph.nodes(data=True)))
        lines = [f"{shown} / {data['kept']} / {data['units']}"]
        return [*lines, f"{data['coverage']:.0%}"] if "coverage" in data else lines

    def _figures_height(self) -> float:
        lines = [text for column in self.columns for name in column for text in self._figures(name)]
        self.size = min([6.0, *(self.pitch / (text_width(text, 1) + APART) for text in lines)])
        if self.size >= 4.4:
            return 2.4 * self.size + 2
        self.size = min(5.5, 0.62 * self.pitch)
        return max(text_width(" · ".join(self._figures(name)), self.size) for c in self.columns for name in c) + 4

    def names(self, strips: dict[str, Box]) -> float:
        lowest = self.bottom + (7 if any(d["kind"] == "bias" for _, d in self.graph.nodes(data=True)) else 2)
        for name, (x, y, wide, tall) in strips.items():
            self._figure(name, x + wide / 2, y)
            at = lowest if self.lanes == 1 else y + tall + 6
            lines, size = self.labels.lines[name], self.labels.size
            if self.labels.turned:
                self.shapes.append(Text(x + wide / 2 + 0.36 * size, at + 2, lines[0], size, INK, "end", turned=True))
            for number, text in enumerate([] if self.labels.turned else lines):
                place = at + size * (1 + 1.18 * number)
                self.shapes.append(Text(x + wide / 2, place, text, size, INK, "middle"))
        lowest += self.labels.height - (self.labels.figure + 3 if self.labels.turned else self.labels.small)
        words, lowest = headers(self.labels, lambda name: strips[name][0] + self.strip / 2, self.pitch, lowest)
        self.shapes += words
        return lowest

    def _figure(self, name: str, x: float, y: float) -> None:
        lines = self._figures(name)
        if self.size * max(text_width(text, 1) for text in lines) > self.pitch:
            self.shapes.append(Text(x + 0.36 * self.size, y - 3, " · ".join(lines), self.size, GREY, turned=True))
            return
        for number, text in enumerate(reversed(lines)):
            self.shapes.append(Text(x, y - 3 - 1.2 * self.size * number, text, self.size, GREY, "middle"))

    def _items(self) -> Iterable[Item]:
        yield swatch(POSITIVE, "raises the logit")
        yield swatch(NEGATIVE, "lowers it")
        yield (
            24.0,
            f"|effect| {self.most:.3g} and {self.most / 4:.2g}",
            lambda x, y: [
                Stroke(line((x, y - 2.2), (x + 9, y - 2.2)), WIDEST, POSITIVE, 0.85),
                Stroke(line((x + 11, y - 2.2), (x + 20, y - 2.2)), WIDEST / 4, POSITIVE, 0.52),
            ],
        )
        if any(data["kind"] == "bias" for _, data in self.graph.nodes(data=True)):
            yield 7.0, "bias", lambda x, y: [Disc(x + 2, y - 2.2, 1.6, PAPER, GREY)]
        if self.graph.number_of_edges() > EDGES:
            weights = sorted((abs(data["weight"]) for *_, data in self.graph.edges(data=True)), reverse=True)
            share = sum(weights[:EDGES]) / (sum(weights) or 1.0)
            yield remark(f"the {EDGES} strongest of {len(weights):,} edges, {share:.0%} of |effect|")
        facts = self.graph.graph
        known = [f"{key} {facts[key]}" for key in ("weighting", "reference", "estimator") if key in facts]
        known += [f"{facts['images']} images"] if "images" in facts else []
        yield remark("above: shown / kept / all units, share of |attribution| shown")
        if known:
            yield remark(", ".join(known))


def _outline(box: Box) -> tuple[Point, ...]:
    x, y, wide, tall = box
    return line((x, y), (x + wide, y), (x + wide, y + tall), (x, y + tall), (x, y))
