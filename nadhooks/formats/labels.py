"""Names of sites under their grids: whole where there is room, else a glob for several and what its star stands for."""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from .scene import shortened, text_width, wrapped

SIZES = (7.5, 7.0, 6.5, 6.0)  # of letters, in points
SMALL_SIZES = (5.5, 5.0, 4.6)
HEADERS = (6.5, 6.0, 5.5, 5.0)
BREAKS = "._/-"
APART = 0.65  # between figures such as "3 / 6" of two sites, in sizes of their letters: twice what lies within one
LONGEST = 180.0  # of turned labels, in points


@dataclass(frozen=True)
class Labels:
    """lines: every site's label. headers: (glob, first site, last site), one for each run of columns."""

    lines: dict[str, list[str]]
    size: float
    turned: bool  # labels read upwards
    small: float  # the letters of figures under labels
    headers: tuple[tuple[str, str, str], ...] = ()

    @property
    def height(self) -> float:
        """Of the labels and the figures with them, without the headers."""
        if not self.lines:
            return 0.0
        if self.turned:
            return max(text_width(lines[0], self.size) for lines in self.lines.values()) + 6 + self.figure
        return self.size * 1.18 * max(map(len, self.lines.values())) + self.small * 1.2 + 3

    @property
    def figure(self) -> float:
        """The length that turned labels leave for the figure before them."""
        return text_width("100%", self.size)


def label(columns: list[list[str]], pitch: float) -> Labels:
    """Labels for columns of sites that stand `pitch` points apart."""
    names = [name for column in columns for name in column]
    if not names:
        return Labels({}, SIZES[0], False, SIZES[0])
    whole = {name: name for name in names}
    choices = [(whole, ())] + [split for depth in (1, 2, 3, 4) if (split := _split(columns, depth))]
    for sizes, most in ((SIZES, 1), (SIZES, 3), (SMALL_SIZES, 1)):
        for texts, headers in choices if most == 1 else choices[:1]:
            found = _level(texts, pitch, most, headers, sizes)
            if found:
                return found
    texts, headers = min(choices, key=lambda choice: max(map(len, choice[0].values())))
    size = min(6.5, max(4.6, 0.62 * pitch))
    if max(map(len, columns)) > 1:  # turned labels would part the branches
        lines = {
            name: [_fitted(one, 5.0, pitch - 1) for one in wrapped(texts[name], 5.0, pitch - 1, BREAKS)[:4]]
            for name in names
        }
        return Labels(lines, 5.0, False, min(4.4, (pitch - 1) / text_width("88%", 1)), headers)
    return Labels({name: [shortened(texts[name], size, LONGEST)] for name in names}, size, True, size, headers)


def _level(
    texts: dict[str, str], pitch: float, most: int, headers: tuple[tuple[str, str, str], ...], sizes: tuple[float, ...]
) -> Labels | None:
    """Level labels of at most so many lines, in the largest letters that fit."""
    small = (pitch - 1.2) / text_width("88%", 1)
    for size in sizes if small >= SMALL_SIZES[-1] else ():
        lines = {name: wrapped(text, size, pitch - 2, BREAKS) for name, text in texts.items()}
        if all(
            len(each) <= most and max(text_width(one, size) for one in each) <= pitch - 1 for each in lines.values()
        ):
            return Labels(lines, size, False, min(size - 1, small), headers)
    return None


def _fitted(part: str, size: float, width: float) -> str:
    """A part of a name, shortened where it is too wide, and then without the mark that it ends with."""
    return part if text_width(part, size) <= width else shortened(part.rstrip(BREAKS), size, width)


def _split(columns: list[list[str]], depth: int) -> tuple[dict[str, str], tuple[tuple[str, str, str], ...]] | None:
    """Labels below globs, for sites whose names agree in so many parts; nothing where such sites are not neighbours."""
    members: dict[str, list[str]] = {}
    spans: dict[str, tuple[int, int]] = {}
    for number, column in enumerate(columns):
        for name in column:
            parts = name.split(".")
            key = ".".join(parts[:depth]) if len(parts) > depth else name
            members.setdefault(key, []).append(name)
            spans[key] = (spans.get(key, (number, 0))[0], number)
    ordered = sorted(spans.values())
    if len(members) == sum(map(len, members.values())) or any(a[1] >= b[0] for a, b in itertools.pairwise(ordered)):
        return None
    texts, headers = {}, []
    for names in members.values():
        start, end = _ends(names)
        if len(names) == 1:
            alone = names[0].rpartition(".")[2]
            texts[names[0]] = names[0] if len(names[0]) <= 12 or alone == names[0] else f"…{alone}"
            continue
        texts.update({name: name[len(start) : len(name) - len(end)] for name in names})
        headers.append((f"{start}*{end}", names[0], names[-1]))
    return texts, tuple(headers)


def _ends(names: list[str]) -> tuple[str, str]:
    """What the names begin and end with in common, without breaking a number or a word."""
    start = _shared(names)
    if not all(re.fullmatch(r"\d.*", name[len(start) :]) for name in names) or start[-1:].isdigit():
        start = start[: max(start.rfind(mark) for mark in "./") + 1]
    rests = [name[len(start) :] for name in names]
    end = _shared([rest[::-1] for rest in rests])[::-1]
    places = [end.find(mark) for mark in ".@" if mark in end]
    return start, end[min(places) :] if places else ""


def _shared(words: list[str]) -> str:
    """What all words begin with."""
    first, last = min(words), max(words)
    same = next((place for place, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[:same]


def header_lines(text: str, width: float) -> tuple[float, list[str]]:
    """The size of letters and the lines of a glob over so many points, its middle left out where nothing helps."""
    for size in HEADERS:
        lines = wrapped(text, size, width, BREAKS)
        if len(lines) <= (1 if size > HEADERS[1] else 3) and all(text_width(line, size) <= width for line in lines):
            return size, lines
    lines = wrapped(text, HEADERS[-1], width, BREAKS)
    return HEADERS[-1], [shortened(line, HEADERS[-1], width) for line in lines]
