"""What a picture consists of, whatever writes it: shapes in points, y downwards; colours, and how wide words are."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

Point = tuple[float, float]
Box = tuple[float, float, float, float]  # x, y, width, height

FONT = "DejaVu Sans"  # comes with matplotlib: the same letters, and widths, on every machine
OTHER_FONTS = (  # for letters that it lacks, where they are installed
    *("Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans SC", "Source Han Sans SC", "WenQuanYi Micro Hei"),
    *("PingFang SC", "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic"),
    *("Arial Unicode MS", "Noto Sans", "Segoe UI"),
)
INK, GREY, FAINT, PAPER = "#1a1a1a", "#5f5f5f", "#e4e4e4", "#ffffff"
# Okabe and Ito's colours, which colour-blind eyes tell apart (https://jfly.uni-koeln.de/color/)
BLUE, ORANGE, GREEN, VERMILLION, PURPLE = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7"
TASKS = (BLUE, ORANGE)  # of one task, or of two over each other
BOTH = "#262626"
SHADES = ("#c3dcee", "#93c3e0", "#62a8d1", "#338dc1", "#0072b2")  # kept by ever more of many tasks
POSITIVE, NEGATIVE = VERMILLION, BLUE  # signs of unit-level edges


@dataclass(frozen=True)
class Cells:
    """Filled boxes of one colour; `about` is what a viewer may show of them."""

    boxes: tuple[Box, ...]
    fill: str
    about: str = ""
    opacity: float = 1.0


@dataclass(frozen=True)
class Stroke:
    """A line through (1 + 3 n) points: a start, then cubic Bézier curves as two controls and an end each."""

    points: tuple[Point, ...]
    width: float
    colour: str
    opacity: float = 1.0
    about: str = ""


@dataclass(frozen=True)
class Disc:
    x: float
    y: float
    radius: float
    fill: str
    edge: str


@dataclass(frozen=True)
class Text:
    """One line; (x, y) is the start, middle or end of its baseline. Turned text reads upwards."""

    x: float
    y: float
    text: str
    size: float
    colour: str = INK
    align: str = "start"
    turned: bool = False


@dataclass(frozen=True)
class Picture:
    """A PNG in a data URI, in a box."""

    box: Box
    data: str


Shape = Cells | Stroke | Disc | Text | Picture


@dataclass
class Scene:
    """Shapes in the order in which they are drawn, on a sheet of width × height points."""

    width: float
    height: float
    title: str = ""
    shapes: list[Shape] = field(default_factory=list)


@cache
def _font(families: tuple[str, ...]) -> Any:
    from matplotlib import font_manager

    names = [font_manager.FontProperties(family=family, weight="normal") for family in families]
    return font_manager.get_font([font_manager.findfont(name) for name in names])


def families(text: str) -> tuple[tuple[str, ...], str]:
    """The fonts for a text, the usual one first, and the letters that none of them has.

    Others are the user's (matplotlib.rcParams["font.sans-serif"]) and `OTHER_FONTS`, as far as installed.
    """
    found, lacking = [FONT], _lacking(text, FONT)
    if lacking:
        from matplotlib import font_manager, rcParams

        installed = set(font_manager.get_font_names())
        for name in (*rcParams["font.sans-serif"], *OTHER_FONTS):
            if lacking and name in installed and (still := _lacking(lacking, name)) != lacking:
                found.append(name)
                lacking = still
    return tuple(found), lacking


def _lacking(text: str, family: str) -> str:
    known = _charmap(family)
    return "".join(dict.fromkeys(letter for letter in text if ord(letter) not in known))


@cache
def _charmap(family: str) -> Collection[int]:
    return frozenset(_font((family,)).get_charmap())


@cache
def text_width(text: str, size: float) -> float:
    """In points."""
    from matplotlib.ft2font import LoadFlags

    named, lacking = families(text)
    font = _font(named)
    text = "".join("□" if letter in lacking else letter for letter in text)  # as they are drawn
    font.set_size(100, 72)  # large, then scaled; without hinting, which differs between versions
    font.set_text(text, 0.0, flags=LoadFlags.NO_HINTING)
    return round(float(font.get_width_height()[0]) / 64 * size / 100, 2)


def wrapped(text: str, size: float, width: float, breaks: str = " ") -> list[str]:
    """Lines that are at most so wide where the text can be broken behind one of the given characters."""
    parts, start = [], 0
    for place, letter in enumerate(text):
        if letter in breaks:
            parts.append(text[start : place + 1])
            start = place + 1
    lines = [""]
    for part in [*parts, text[start:]]:
        if lines[-1] and text_width((lines[-1] + part).rstrip(), size) > width:
            lines.append("")
        lines[-1] += part
    return [line.rstrip() for line in lines]


def paragraph(text: str, size: float, width: float) -> list[str]:
    """Lines broken between words; those that are wider still within words, and what cannot be broken is shortened."""
    lines = wrapped(text, size, width)
    parts = [part for each in lines for part in wrapped(each, size, width, " ._/-,") if part]
    return [shortened(part, size, width) for part in parts]


def shortened(text: str, size: float, width: float) -> str:
    """The text, its middle left out where it would be wider; at least the mark that says so."""
    short, keep = text, len(text)
    while keep > 0 and text_width(short, size) > width:
        keep -= 1
        front = 0 if keep == 1 and text[-1].isdigit() else (keep + 1) // 2  # of "conv1" and "conv2" what differs
        short = text[:front] + "…" + text[len(text) - (keep - front) :]
    return short


def line(*points: Point) -> tuple[Point, ...]:
    """Straight pieces as a stroke's points."""
    out = [points[0]]
    for before, after in itertools.pairwise(points):
        out += [before, after, after]
    return tuple(out)


def swing(start: Point, end: Point) -> tuple[Point, ...]:
    """A curve that leaves and arrives horizontally."""
    middle = (start[0] + end[0]) / 2
    return start, (middle, start[1]), (middle, end[1]), end


def mixed(low: str, high: str, share: float) -> str:
    """A colour between two."""
    parts = (round(int(low[i : i + 2], 16) * (1 - share) + int(high[i : i + 2], 16) * share) for i in (1, 3, 5))
    return "#" + "".join(f"{part:02x}" for part in parts)


def blended(colours: Sequence[str]) -> str:
    """The mean of some colours."""
    parts = [[int(colour[i : i + 2], 16) for colour in colours] for i in (1, 3, 5)]
    return "#" + "".join(f"{round(sum(part) / len(part)):02x}" for part in parts)


def rows_of(squares: Sequence[int], columns: int) -> Iterable[tuple[int, int, int]]:
    """Runs (row, first column, length) of neighbours among ascending places on a grid, in few boxes."""
    start = last = -2
    for place in [*squares, -1]:
        if place == last + 1 and place % columns:
            last = place
            continue
        if start >= 0:
            yield start // columns, start % columns, last - start + 1
        start = last = place
