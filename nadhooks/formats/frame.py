"""What stands around the grids or strips of a picture: the title above, globs under columns, the legend at the bottom.

Every function gives shapes, and the height at which what comes next may begin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from .labels import Labels, header_lines
from .scene import GREY, INK, Cells, Shape, Stroke, Text, line, paragraph, shortened, text_width
from .site_layout import MARGIN

TITLE, SMALL = 8.0, 6.5
# Of a legend: how wide a sign is with the gap behind it, the words that follow, and the sign's shapes at (x, y).
Item = tuple[float, str, Callable[[float, float], list[Shape]]]


def title(text: str, width: float) -> tuple[list[Shape], float]:
    lines = paragraph(text, TITLE, width - 2 * MARGIN)
    shapes = [Text(MARGIN, MARGIN + TITLE * (1 + 1.25 * number), each, TITLE) for number, each in enumerate(lines)]
    return [*shapes], MARGIN + TITLE * 1.25 * len(lines) + 6


def headers(labels: Labels, middle: Callable[[str], float], pitch: float, y: float) -> tuple[list[Shape], float]:
    """Globs under the sites that they stand for, with a line over all of them. middle: of a site's column."""
    shapes: list[Shape] = []
    lowest = y
    for text, first, last in labels.headers:
        left, right = middle(first) - pitch / 2 + 1.2, middle(last) + pitch / 2 - 1.2
        shapes.append(Stroke(line((left, y + 1), (right, y + 1)), 0.6, GREY))
        size, lines = header_lines(text, max(12.0, right - left + 1))
        for number, each in enumerate(lines):
            at = y + 2.5 + size * (1 + 1.15 * number)
            lowest = max(lowest, at)
            shapes.append(Text((left + right) / 2, at, each, size, INK, "middle"))
    return shapes, lowest


def legend(items: Iterable[Item], width: float, y: float) -> tuple[list[Shape], float]:
    """Items side by side, in as many lines as they need; words that are wider than a line fold."""
    shapes: list[Shape] = []
    x = MARGIN
    for before, text, sign in items:
        lines = paragraph(text, SMALL, width - 2 * MARGIN - before) or [""]
        wide = before + max(text_width(each, SMALL) for each in lines)
        if x + wide > width - MARGIN and x > MARGIN:
            x, y = MARGIN, y + 11
        shapes += sign(x, y)
        for number, each in enumerate(lines):
            y += 8 if number else 0
            shapes.append(Text(x + before, y, each, SMALL, GREY))
        x += wide + 9
    return shapes, y + 3


def swatch(colour: str, text: str) -> Item:
    return 8.0, text, lambda x, y: [tile(x, y, colour)]


def remark(text: str) -> Item:
    return 0.0, text, lambda x, y: []


def tile(x: float, y: float, colour: str) -> Shape:
    return Cells(((x, y - 5, 5.5, 5.5),), colour)


def fitting(text: str, width: float, before: float = 0.0) -> str:
    """A text of a legend, shortened where it would not fit behind so many points of a line."""
    return shortened(text, SMALL, width - 2 * MARGIN - before)
