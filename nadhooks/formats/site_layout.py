"""Where everything of a site-level graph stands: stages left to right, sites as grids of units, edges as routes.

Places depend on sites and edges alone, never on what a task keeps: pictures of two classes lie over each other.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import networkx as nx

from ..errors import RenderError
from .labels import Labels, label
from .scene import Point, line, swing

SINGLE, DOUBLE = 252.0, 516.0  # points: 3.5 and 7.16 inches, the columns of most journals and conferences
MARGIN = 6.0
PITCH = 7.4  # the least width of a stage that can be read
LARGEST, SMALLEST = 5.0, 0.8  # sides of a unit's square
# squares beside each other: numbers of units divide by them
ACROSS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
BAND = 11.0  # the widest band
ROUTES = 900  # more edges would be a blot
TALL = 230.0  # of grids above each other


@dataclass(frozen=True)
class Place:
    """A node's box; of a site, squares of `cell` points in `columns`, `each` units sharing one."""

    x: float
    y: float
    width: float
    height: float
    columns: int = 0
    cell: float = 0.0

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2


@dataclass(frozen=True)
class Layout:
    """Points, y downwards, the first row of grids centred at y = 0; `band` is the width of a flow of 1."""

    width: float
    top: float
    bottom: float
    places: dict[str, Place]
    routes: dict[tuple[str, str], tuple[Point, ...]]
    band: float
    each: int
    lanes: int
    labels: Labels
    cell: float
    pitch: float  # from one stage to the next
    gap: float  # between the widest grids of two stages


def lay_out(graph: nx.DiGraph, width: float | None) -> Layout:
    """A layout that fills the width, or raises RenderError where it cannot; without one, a layout to move about in:
    as wide as it takes, and with a square for every unit.
    """
    columns = _columns(graph)
    wide = [number for number, column in enumerate(columns) if any(_is_site(graph, name) for name in column)]
    joins = [number for number, column in enumerate(columns) if _only_joins(graph, column)]
    ends = 20.0 * (len(columns) - len(wide) - len(joins))
    bounded, smallest = width is not None, SMALLEST if width is not None else 0.1
    if width is None:
        width = 2 * MARGIN + ends + 9.0 * len(joins) + 56.0 * max(1, len(wide))
    sign = max(4.5, min(9.0, 0.25 * (width - 2 * MARGIN - ends) / max(1, len(joins))))  # the width of a join's column
    room = width - 2 * MARGIN - ends - sign * len(joins)
    pitch = room / max(1, len(wide))
    if bounded and (pitch < PITCH or graph.number_of_edges() > ROUTES):
        fits = max(0, int((width - 2 * MARGIN - ends) / PITCH))  # without joins, which a collapsed graph has none of
        fewer = "leave the joins out, " if joins and len(wide) <= fits else ""
        raise RenderError(
            f"too large to be read in a picture {width:.0f} points wide: {len(wide)} stages and "
            f"{graph.number_of_edges()} edges (room for {fits} stages and {ROUTES} edges); {fewer}draw "
            f"nadhooks.collapse(graph, {max(1, min(fits, len(wide) // 2))}), choose fewer sites, pass a larger width=, "
            "or render to .html or .dot"
        )
    pitch = min(pitch, 92.0)
    lanes = max(len(column) for column in columns)
    grid = min(0.58 * pitch, 34.0)
    most = max([data["units"] for _, data in graph.nodes(data=True) if _is_site(graph, _)] or [1])
    tall = min(TALL / lanes, max(60.0, 0.34 * width)) if bounded else max(TALL, min(700.0, 0.4 * width)) / lanes
    cell, each = _cell(most, grid, tall, smallest)
    labels = label([[name for name in columns[number] if _is_site(graph, name)] for number in wide], pitch)
    below = labels.height
    x, places = MARGIN, {}
    spare = max(0.0, room - pitch * len(wide)) / max(1, len(columns) - 1)
    spare = min(spare, 24.0)
    for number, column in enumerate(columns):
        own = sign if number in joins else pitch if number in wide else 20.0
        sizes = [_size(graph, name, cell, each, grid, sign) for name in column]
        heights = [height for _, height, _ in sizes]
        step = below + 8.0 if lanes > 1 else 0.0
        y = -(sum(heights) + step * (len(column) - 1)) / 2
        for name, (wide_, tall, across) in zip(column, sizes, strict=True):
            places[name] = Place(round(x + (own - wide_) / 2, 1), round(y, 1), wide_, tall, across, cell)
            y += tall + step
        x += own + spare
    right = x - spare + MARGIN
    band = _band(graph, pitch - grid)
    routes, top = _routes(graph, columns, places, band, below if lanes > 1 else 0.0)
    bottom = max(place.y + place.height for place in places.values()) + below + 2
    lowest = max((y for route in routes.values() for _, y in route), default=0.0) + band / 2
    return Layout(right, top, max(bottom, lowest), places, routes, band, each, lanes, labels, cell, pitch, pitch - grid)


def _is_site(graph: nx.DiGraph, name: str) -> bool:
    return bool(graph.nodes[name]["kind"] == "site")


def _columns(graph: nx.DiGraph) -> list[list[str]]:
    """Nodes by their longest distance from the input, each column in the order that crosses least."""
    try:
        columns = [list(nodes) for nodes in nx.topological_generations(graph)]
    except nx.NetworkXUnfeasible:
        raise RenderError("expected a graph without circles, as nadhooks.flow_graph makes it") from None
    order = {name: number for number, name in enumerate(graph)}
    for column in columns:
        column.sort(key=order.__getitem__)
    place = {name: _middle(index, column) for column in columns for index, name in enumerate(column)}
    for sweep in range(6 if max(map(len, columns)) > 1 else 0):
        near = graph.predecessors if sweep % 2 == 0 else graph.successors
        for column in columns if sweep % 2 == 0 else reversed(columns):
            wish = {name: _mean([place[other] for other in near(name)], place[name]) for name in column}
            column.sort(key=lambda name: (wish[name], order[name]))
            place.update({name: _middle(index, column) for index, name in enumerate(column)})
    return columns


def _middle(index: int, column: list[str]) -> float:
    return index - (len(column) - 1) / 2


def _mean(values: list[float], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _only_joins(graph: nx.DiGraph, column: list[str]) -> bool:
    return all(graph.nodes[name]["kind"] == "join" for name in column)


def _cell(most: int, grid: float, tall: float, smallest: float) -> tuple[float, int]:
    """The side of a square, and how many units share one, so that the widest site fits."""
    for each in (2**power for power in range(32)):
        for across in ACROSS:
            cell = int(20 * min(LARGEST, grid / across)) / 20  # round numbers make short files
            if cell >= min(smallest, grid) and math.ceil(math.ceil(most / each) / across) * cell <= tall:
                return cell, each
    raise AssertionError("unreachable: a single square fits")


def _size(graph: nx.DiGraph, name: str, cell: float, each: int, grid: float, sign: float) -> tuple[float, float, int]:
    """Width, height, and columns of squares."""
    data = graph.nodes[name]
    if data["kind"] == "site":
        squares = math.ceil(data["units"] / each)
        wish = max(1.0, min(grid / cell + 1e-6, math.sqrt(squares / 2.5)))
        whole = [
            number
            for number in ACROSS
            if squares % number == 0 and 0.6 * wish <= number <= min(1.3 * wish, grid / cell + 1e-6)
        ]
        across = min(whole, key=lambda number: abs(math.log(number / wish))) if whole else int(wish)
        return across * cell, math.ceil(squares / across) * cell, across
    return (0.78 * sign, 0.78 * sign, 0) if data["kind"] == "join" else (2.6, 26.0, 0)


def _band(graph: nx.DiGraph, gap: float) -> float:
    """The width of a flow of 1: narrower where many arrive at one site."""
    crowd = max((degree for _, degree in graph.in_degree()), default=1)
    return max(1.0, min(BAND, max(6.0, 0.8 * gap), 30.0 / max(1, crowd)))


def _routes(
    graph: nx.DiGraph, columns: list[list[str]], places: dict[str, Place], band: float, below: float
) -> tuple[dict[tuple[str, str], tuple[Point, ...]], float]:
    """Every edge's way, and the highest point of all. Those that would cross a site's grid go above or below all."""
    stage = {name: number for number, column in enumerate(columns) for name in column}
    spans = [
        (min(places[name].y for name in column), max(places[name].y + places[name].height for name in column) + below)
        for column in columns
    ]
    tops = min(top for top, _ in spans)
    routes: dict[tuple[str, str], tuple[Point, ...]] = {}
    around: dict[bool, list[tuple[str, str]]] = {True: [], False: []}
    ports = _ports(graph, places, band)
    for source, target in graph.edges:
        start, end = ports[source, target]
        between = [places[name] for column in columns[stage[source] + 1 : stage[target]] for name in column]
        if _free(start, end, between, band):
            routes[source, target] = swing(start, end)
        else:
            above = len(columns[stage[source]]) == 1 or places[source].left[1] + places[target].left[1] <= 0
            around[above].append((source, target))
    for above, edges in around.items():
        tracks = _tracks({edge: (stage[edge[0]] + 1, stage[edge[1]] - 1) for edge in edges})
        step = min(0.5 * band + 1.2, 80.0 / max(1, max(tracks.values(), default=0)))
        for edge, track in tracks.items():
            first, last = stage[edge[0]] + 1, stage[edge[1]] - 1
            within, away = spans[first : last + 1], 4 + band / 2 + track * step
            level = min(top for top, _ in within) - away if above else max(low for _, low in within) + away
            routes[edge] = _over(*ports[edge], level, columns, places, first, last)
    highest = min([tops, *(y - band / 2 for route in routes.values() for _, y in route)])
    return {edge: routes[edge] for edge in graph.edges}, highest


def _tracks(passed: dict[tuple[str, str], tuple[int, int]]) -> dict[tuple[str, str], int]:
    """Of every edge that passes over columns, first and last, a track that it shares with none that it meets."""
    taken: list[list[tuple[int, int]]] = []
    tracks = {}
    for edge, (first, last) in sorted(passed.items(), key=lambda item: (item[1][1] - item[1][0], item[1])):
        free = (number for number, track in enumerate(taken) if all(last < a or first > b for a, b in track))
        tracks[edge] = next(free, len(taken))
        if tracks[edge] == len(taken):
            taken.append([])
        taken[tracks[edge]].append((first, last))
    return tracks


def _ports(graph: nx.DiGraph, places: dict[str, Place], band: float) -> dict[tuple[str, str], tuple[Point, Point]]:
    """Where edges leave and arrive. Sums meet in one point; what is concatenated arrives side by side."""
    ports = {}
    for target in graph:
        sources = sorted(graph.predecessors(target), key=lambda name: (places[name].left[1], -places[name].x))
        joins = arriving(graph, target)
        x, y = places[target].left
        apart = 0.0 if joins <= {"sum", "product"} or len(sources) == 1 else band
        apart = min(apart, max(places[target].height, 2 * band) / max(1, len(sources)))
        for number, source in enumerate(sources):
            ports[source, target] = (places[source].right, (x, y + apart * _middle(number, sources)))
    return ports


def join_of(graph: nx.DiGraph, source: str, target: str) -> str:
    """How the flow of an edge enters its target, in one word."""
    return str(graph.edges[source, target].get("join", "sequential"))


def arriving(graph: nx.DiGraph, target: str) -> set[str]:
    """What joins flows where they arrive: what the node says, else what its edges say; nothing behind a join node."""
    sources = list(graph.predecessors(target))
    if any(graph.nodes[source]["kind"] == "join" for source in sources):
        return {"sequential"}
    own = graph.nodes[target].get("join")
    return {own} if own else {join_of(graph, source, target) for source in sources}


def _free(start: Point, end: Point, between: Iterable[Place], band: float) -> bool:
    for place in between:
        share = (place.x + place.width / 2 - start[0]) / max(1e-9, end[0] - start[0])
        eased = share * share * (3 - 2 * share)  # what a swing does
        y = start[1] + (end[1] - start[1]) * eased
        if place.y - band / 2 - 1 <= y <= place.y + place.height + band / 2 + 1:
            return False
    return True


def _over(
    start: Point, end: Point, level: float, columns: list[list[str]], places: dict[str, Place], first: int, last: int
) -> tuple[Point, ...]:
    """Up to a level before the first column that is passed, along it, and down behind the last."""
    near = min(places[name].x for name in columns[first])
    far = max(places[name].x + places[name].width for name in columns[last])
    rise, fall = swing(start, (near, level)), swing((far, level), end)
    return (*rise, *line((near, level), (far, level))[1:], *fall[1:])
