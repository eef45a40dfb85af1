"""Scenes as TikZ: pure text, a picture in the document's own letters. `\\input` it; it needs the package tikz."""

from __future__ import annotations

from collections.abc import Sequence

from .scene import Cells, Disc, Picture, Point, Scene, Shape, Stroke, Text

SPECIAL = {
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", '"': r"\char34{}", "…": r"\ldots{}", "→": r"$\to$", "×": r"$\times$", "−": r"$-$",
    "·": r"$\cdot$", "Σ": r"$\Sigma$",
}  # fmt: skip


def to_tikz(scene: Scene) -> str:
    """A tikzpicture, in points; every colour is defined inside it."""
    colours = sorted({colour for shape in scene.shapes for colour in _colours(shape)})
    names = {colour: f"nad{colour[1:]}" for colour in colours}
    lines = [f"% {scene.title}", r"\begin{tikzpicture}[x=1bp,y=-1bp,inner sep=0pt,outer sep=0pt]"]
    lines += [rf"\definecolor{{{name}}}{{HTML}}{{{colour[1:].upper()}}}" for colour, name in names.items()]
    lines.append(rf"\useasboundingbox (0,0) rectangle ({_number(scene.width)},{_number(scene.height)});")
    for shape in scene.shapes:
        lines += _lines(shape, names)
    return "\n".join([*lines, r"\end{tikzpicture}", ""])


def _colours(shape: Shape) -> Sequence[str]:
    if isinstance(shape, Picture):
        return []
    if isinstance(shape, Cells):
        return [shape.fill]
    return [shape.fill, shape.edge] if isinstance(shape, Disc) else [shape.colour]


def _lines(shape: Shape, names: dict[str, str]) -> list[str]:
    if isinstance(shape, Picture):
        return ["% an image: TikZ has no pixels"]
    if isinstance(shape, Cells):
        fill = f"{names[shape.fill]}{_opacity('fill opacity', shape.opacity)}"
        boxes = [f"{_at((x, y))} rectangle {_at((x + width, y + height))}" for x, y, width, height in shape.boxes]
        # in pieces: TeX reads a path into memory as a whole
        return [rf"\fill[{fill}] {' '.join(boxes[i : i + 200])};" for i in range(0, len(boxes), 200)]
    if isinstance(shape, Stroke):
        start, *rest = shape.points
        curves = "".join(
            f" .. controls {_at(rest[i])} and {_at(rest[i + 1])} .. {_at(rest[i + 2])}" for i in range(0, len(rest), 3)
        )
        return [
            rf"\draw[{names[shape.colour]},line width={_number(shape.width)}bp"
            rf"{_opacity('draw opacity', shape.opacity)}] {_at(start)}{curves};"
        ]
    if isinstance(shape, Disc):
        look = f"fill={names[shape.fill]},draw={names[shape.edge]},line width=0.5bp"
        return [rf"\filldraw[{look}] {_at((shape.x, shape.y))} circle[radius={_number(shape.radius)}bp];"]
    return [_text(shape, names)]


def _text(shape: Text, names: dict[str, str]) -> str:
    anchor = {"start": "base west", "middle": "base", "end": "base east"}[shape.align]
    turned = ",rotate=90" if shape.turned else ""
    size = rf"\fontsize{{{_number(shape.size)}bp}}{{{_number(1.2 * shape.size)}bp}}\selectfont\sffamily"
    words = "".join(SPECIAL.get(letter, letter) for letter in shape.text)
    look = rf"anchor={anchor}{turned},text={names[shape.colour]}"
    return rf"\node[{look}] at {_at((shape.x, shape.y))} {{{size} {words}}};"


def _opacity(kind: str, value: float) -> str:
    return f",{kind}={_number(value)}" if value < 1 else ""


def _at(point: Point) -> str:
    return f"({_number(point[0])},{_number(point[1])})"


def _number(value: float) -> str:
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text
