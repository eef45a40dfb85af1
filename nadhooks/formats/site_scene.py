"""A site-level graph as a picture: grids of units in their task's colour, bands of flow, joins, a legend."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import networkx as nx

from .frame import SMALL, Item, fitting, headers, legend, swatch, tile, title
from .labels import APART
from .scene import (
    BLUE,
    BOTH,
    FAINT,
    GREEN,
    GREY,
    INK,
    ORANGE,
    PAPER,
    PURPLE,
    SHADES,
    TASKS,
    VERMILLION,
    Cells,
    Disc,
    Scene,
    Shape,
    Stroke,
    Text,
    blended,
    line,
    mixed,
    rows_of,
    text_width,
)  # fmt: skip
from .site_layout import MARGIN, Layout, Place, arriving, join_of, lay_out
from .words import called, headline

JOINS = {  # colour of the band and sign where it arrives
    "sequential": ("#8c8c8c", ""),
    "sum": (VERMILLION, "+"),
    "concatenation": (GREEN, "||"),
    "product": (PURPLE, "×"),
    "attention": (ORANGE, "A"),
}


def site_scene(graph: nx.DiGraph, width: float | None) -> Scene:
    """The picture of a graph made by `flow_graph`, so many points wide. Raises RenderError where it cannot fit."""
    layout = lay_out(graph, width)
    painter = SitePainter(graph, layout, max(layout.width, width or 0.0))
    return painter.scene()


def palette(graph: nx.DiGraph) -> list[tuple[str, str]]:
    """The colours of units and what they mean, the faint one of dropped units first."""
    tasks = graph.graph.get("tasks", [])
    if len(tasks) == 2 and _both_known(graph):
        return [
            (FAINT, "kept by neither"),
            (TASKS[0], f"{called(tasks[0])} only"),
            (TASKS[1], f"{called(tasks[1])} only"),
            (BOTH, "both"),
        ]
    if len(tasks) <= 1 or graph.graph.get("combine", "union") != "union":
        return [
            (FAINT, "others" if "counted" in graph.graph else "dropped"),
            (BLUE, graph.graph.get("counted", "kept")),
        ]
    return [(FAINT, "by none"), *((shade, "") for shade in SHADES)]


def colours_of(graph: nx.DiGraph, name: str) -> list[float]:
    """Of each unit, the place in the palette: 0 dropped; of many tasks, a share of them."""
    data = graph.nodes[name]
    tasks = graph.graph.get("tasks", [])
    if len(tasks) == 2 and _both_known(graph):
        first, second = (set(data["kept_units"][task]) for task in tasks)
        return [(unit in first) + 2 * (unit in second) for unit in range(data["units"])]
    return list(data["use"])


def _both_known(graph: nx.DiGraph) -> bool:
    sites = [data for _, data in graph.nodes(data=True) if data["kind"] == "site"]
    tasks = graph.graph.get("tasks", [])
    union = graph.graph.get("combine", "union") == "union"
    return union and all(set(tasks) <= set(data.get("kept_units") or ()) for data in sites)


class SitePainter:
    """Turns places into shapes; `down` and `left` move the layout onto the sheet."""

    def __init__(self, graph: nx.DiGraph, layout: Layout, width: float) -> None:
        self.graph, self.layout, self.width = graph, layout, width
        self.shapes: list[Shape] = []
        self.down = 0.0
        self.left = (width - layout.width) / 2
        sites = [data for _, data in graph.nodes(data=True) if data["kind"] == "site"]
        longest = max([text_width(f"{d['units']:,} / {d['units']:,}", layout.labels.small) for d in sites] or [0.0])
        longest += APART * layout.labels.small
        self.counts = longest <= layout.pitch  # else percentages; the same in the pictures of all tasks

    def scene(self) -> Scene:
        words, below = title(headline(self.graph), self.width)
        self.shapes += words
        self.down = below - self.layout.top
        for source, target in self.graph.edges:
            self._band(source, target)
        for name, data in self.graph.nodes(data=True):
            {"site": self._site, "join": self.join}.get(data["kind"], self.end)(name, data)
        for target in self.graph:
            self.sign(target)
        words, bottom = legend(self._items(), self.width, self.headers(self.down + self.layout.bottom) + 10)
        self.shapes += words
        return Scene(self.width, bottom + MARGIN, headline(self.graph), self.shapes)

    def _at(self, x: float, y: float) -> tuple[float, float]:
        return x + self.left, y + self.down

    # --- edges ---

    def _band(self, source: str, target: str) -> None:
        data = self.graph.edges[source, target]
        route = tuple(self._at(*point) for point in self.layout.routes[source, target])
        share = float(data.get("share", 1.0))
        colour, _ = JOINS.get(join_of(self.graph, source, target), JOINS["sequential"])
        crowd = self.graph.number_of_edges() / max(1, len(self.graph))
        opacity = 0.42 if crowd < 3 else 0.3
        about = f"{source} → {target}: {share:.0%}"
        self.shapes.append(Stroke(route, max(0.35, share * self.layout.band), colour, opacity, about=about))

    def sign(self, target: str) -> None:
        """How flows join, where they arrive."""
        if self.graph.nodes[target]["kind"] == "join":
            return
        kinds = arriving(self.graph, target) - {"sequential"}
        place = self.layout.places[target]
        for number, kind in enumerate(sorted(kinds)):
            colour, sign = JOINS.get(kind, JOINS["sequential"])
            radius = min(3.2, 0.3 * self.layout.gap)
            if radius < 1.0:  # too small to be read: the band's colour alone tells
                return
            x, y = self._at(place.x - radius - 0.3, place.left[1] + number * 2.4 * radius)
            self.shapes += _token(x, y, radius, colour, sign)

    # --- nodes ---

    def _site(self, name: str, data: dict[str, Any]) -> None:
        place, layout = self.layout.places[name], self.layout
        about = f"{name}: {data['kept']:,} of {data['units']:,} units kept"
        groups = grouped(self.graph, name, layout.each)
        if place.cell < 2:  # one box for all, under the others
            groups[FAINT] = list(range(math.ceil(data["units"] / layout.each)))
        for colour in sorted(groups, key=lambda colour: colour != FAINT):
            self.shapes.append(Cells(tuple(self._boxes(place, groups[colour])), colour, about))
        self.label(name, place, data)

    def _boxes(self, place: Place, squares: Sequence[int]) -> Iterable[tuple[float, float, float, float]]:
        x, y = self._at(place.x, place.y)
        cell = place.cell
        if cell < 2 and len(squares) == squares[-1] + 1:
            full, rest = divmod(len(squares), place.columns)
            yield x, y, place.columns * cell, full * cell
            if rest:
                yield x, y + full * cell, rest * cell, cell
        elif cell < 2:  # too small for gaps: neighbours in one box
            for row, column, length in rows_of(squares, place.columns):
                yield x + column * cell, y + row * cell, length * cell, cell
        else:
            gap = 0.14 * cell
            for square in squares:
                row, column = divmod(square, place.columns)
                yield x + column * cell + gap / 2, y + row * cell + gap / 2, cell - gap, cell - gap

    def label(self, name: str, place: Place, data: dict[str, Any]) -> None:
        layout, labels = self.layout, self.layout.labels
        lowest = place.y + place.height if layout.lanes > 1 else max(p.y + p.height for p in layout.places.values())
        x, y = self._at(place.x + place.width / 2, lowest + 3)
        lines, size, share = labels.lines[name], labels.size, f"{data['share']:.0%}"
        if labels.turned:
            y += labels.figure
            self.shapes.append(Text(x + 0.36 * size, y, share, size, GREY, "start", turned=True))
            self.shapes.append(Text(x + 0.36 * size, y + 0.6 * size, lines[0], size, INK, "end", turned=True))
            return
        figure = f"{data['kept']:,} / {data['units']:,}" if self.counts else share
        if layout.lanes > 1:  # bands may pass behind
            wide = max(*(text_width(text, size) for text in lines), text_width(figure, labels.small)) + 2
            self.shapes.append(Cells(((x - wide / 2, y - 1, wide, labels.height - 1),), PAPER, opacity=0.75))
        for number, text in enumerate(lines):
            self.shapes.append(Text(x, y + size * (0.9 + 1.18 * number), text, size, INK, "middle"))
        y += size * (0.9 + 1.18 * (len(lines) - 1)) + 1.15 * labels.small
        small = min(labels.small, layout.pitch / (text_width(figure, 1) + 0.3))  # 100% is wider than others
        self.shapes.append(Text(x, y, figure, round(small, 2), GREY, "middle"))

    def headers(self, y: float) -> float:
        """Globs under the sites that they stand for; the lowest point of all."""

        def middle(name: str) -> float:
            place = self.layout.places[name]
            return place.x + place.width / 2 + self.left

        words, lowest = headers(self.layout.labels, middle, self.layout.pitch, y)
        self.shapes += words
        return lowest

    def join(self, name: str, data: dict[str, Any]) -> None:
        place = self.layout.places[name]
        colour, sign = JOINS.get(data.get("join", ""), JOINS["sequential"])
        x, y = self._at(place.x + place.width / 2, place.y + place.height / 2)
        self.shapes += _token(x, y, place.width / 2, colour, sign)

    def end(self, name: str, data: dict[str, Any]) -> None:
        place = self.layout.places[name]
        x, y = self._at(place.x, place.y)
        self.shapes.append(Cells(((x, y, place.width, place.height),), INK, name))
        first = not any(True for _ in self.graph.predecessors(name))
        x = x - 2.5 if first else x + place.width + 2.5 + SMALL * 0.75
        self.shapes.append(Text(x, y + place.height / 2, name, SMALL, INK, "middle", turned=True))

    # --- legend ---

    def _items(self) -> Iterable[Item]:
        layout = self.layout
        shades = palette(self.graph)
        meanings = shades[1:] + shades[:1]
        if layout.each > 1 and len(shades) == 2:
            meanings.append((mixed(SHADES[0], BLUE, 0.5), "some of a square's units kept"))
        elif layout.each > 1 and len(shades) == 4:
            mean = blended([colour for colour, _ in shades])
            meanings.append((mean, "of several kinds: their colours mixed"))
        if len(shades) > 4:
            yield _ramp(shades)
        else:
            for colour, text in meanings:
                yield swatch(colour, fitting(text, self.width, 8))
        yield self._square()
        bands = {join_of(self.graph, *edge) for edge in self.graph.edges}
        signs = {data["join"] for _, data in self.graph.nodes(data=True) if data["kind"] == "join"}
        for name in self.graph:
            signs |= arriving(self.graph, name)
        known = [kind for kind in JOINS if kind in bands | (signs - {"sequential"})]
        yield self._scale()
        for kind in known if len(known) > 1 or known != ["sequential"] else []:
            yield _key(kind, kind in bands, kind in signs)

    def _square(self) -> Item:
        each, cell = self.layout.each, self.layout.cell
        across = 1 if cell >= 2 else 4 if cell >= 1.2 else 8  # a single small square could not be seen
        side, units = cell * across, each * across**2

        def sign(x: float, y: float) -> list[Shape]:
            top, bottom = y - 2.2 - side / 2, y - 2.2 + side / 2
            return [Stroke(line((x, top), (x + side, top), (x + side, bottom), (x, bottom), (x, top)), 0.5, GREY)]

        return side + 3, "1 unit" if units == 1 else f"{units} units", sign

    def _scale(self) -> Item:
        band = self.layout.band
        said = self.graph.graph.get("flow", "flow: share of the source's units kept")
        colour, _ = JOINS["sequential"]
        return (
            21.0,
            f"{said}, 100% and 50%",
            lambda x, y: [
                Stroke(line((x, y - 2.2), (x + 8, y - 2.2)), band, colour, 0.6),
                Stroke(line((x + 10, y - 2.2), (x + 18, y - 2.2)), 0.5 * band, colour, 0.6),
            ],
        )


def _ramp(shades: list[tuple[str, str]]) -> Item:
    """The shades from "kept by no task" to "by all"."""
    (none, _), *more = shades
    a, b = (text_width(text, SMALL) for text in ("kept by no task", "by one"))

    def sign(x: float, y: float) -> list[Shape]:
        return [
            tile(x, y, none),
            Text(x + 8, y, "kept by no task", SMALL, GREY),
            Text(x + a + 17, y, "by one", SMALL, GREY),
            *(tile(x + a + b + 19.5 + 7 * number, y, colour) for number, (colour, _) in enumerate(more)),
        ]

    return a + b + 21.5 + 7 * len(more), "by all", sign


def _key(kind: str, band: bool, signed: bool) -> Item:
    """A kind of join: its band, where one is drawn, and its sign, where one is drawn."""
    colour, mark = JOINS[kind]
    start = 12.0 if band else 3.0

    def sign(x: float, y: float) -> list[Shape]:
        drawn = [Stroke(line((x, y - 2.2), (x + 12, y - 2.2)), 3.2, colour, 0.5)] if band else []
        return [*drawn, *(_token(x + start, y - 2.2, 2.8, colour, mark) if mark and signed else [])]

    return start + 5, {"sum": "residual sum"}.get(kind, kind), sign


def _token(x: float, y: float, radius: float, colour: str, sign: str) -> list[Shape]:
    """The sign of a join in a circle."""
    r, stroke = 0.55 * radius, 0.26 * radius
    arms = {
        "+": [((x - r, y), (x + r, y)), ((x, y - r), (x, y + r))],
        "×": [((x - r * 0.75, y - r * 0.75), (x + r * 0.75, y + r * 0.75)),
              ((x - r * 0.75, y + r * 0.75), (x + r * 0.75, y - r * 0.75))],
        "||": [((x - r * 0.45, y - r), (x - r * 0.45, y + r)), ((x + r * 0.45, y - r), (x + r * 0.45, y + r))],
        "A": [((x - r, y - r * 0.8), (x + r, y - r * 0.8)), ((x - r, y), (x + r * 0.2, y)),
              ((x - r, y + r * 0.8), (x + r * 0.7, y + r * 0.8))],
    }.get(sign, [])  # fmt: skip
    return [Disc(x, y, radius, PAPER, colour), *(Stroke(line(start, end), stroke, colour) for start, end in arms)]


def grouped(graph: nx.DiGraph, name: str, each: int) -> dict[str, list[int]]:
    """Squares of a site by colour, each in ascending order."""
    values = colours_of(graph, name)
    shades = [colour for colour, _ in palette(graph)]
    tasks = len(graph.graph.get("tasks", []))
    groups: dict[str, list[int]] = {}
    for square in range(math.ceil(len(values) / each)):
        part = values[square * each : (square + 1) * each]
        groups.setdefault(_shade(part, shades, tasks), []).append(square)
    return groups


def _shade(part: Sequence[float], shades: list[str], tasks: int) -> str:
    if len(shades) == 4:  # two tasks, whose colours say which
        return blended([shades[round(value)] for value in part])
    share = sum(part) / len(part)
    if share <= 0:
        return shades[0]
    if len(shades) == 2:
        return shades[1] if share >= 1 else mixed(SHADES[0], shades[1], math.ceil(share * 4) / 4)
    levels = min(tasks, len(shades) - 1)  # the lightest means one task, the darkest all
    level = min(levels, math.ceil(round(share * levels, 6)))
    return shades[1 + round((level - 1) * (len(shades) - 2) / max(1, levels - 1))]
