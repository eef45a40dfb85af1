"""Scenes as SVG, PNG and PDF through matplotlib: the same scene gives the same bytes."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .scene import FONT, Cells, Disc, Picture, Scene, Stroke, Text, families

DPI = 300
SETTINGS: dict[str, Any] = {
    "svg.hashsalt": "nadhooks",  # ids that are the same in every process
    "svg.fonttype": "none",  # words stay words: found by a search, and by a reader program
    "pdf.fonttype": 42,  # TrueType, as publishers ask for
    "font.family": [FONT, "sans-serif"],
    "text.parse_math": False,  # a dollar in a name is a dollar
    "path.simplify": False,
}
PIXELS: dict[str, Any] = {"interpolation": "nearest", "resample": False}
UNDATED: dict[str, dict[str, Any]] = {
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None, "Creator": None, "Producer": None},
    "png": {"Software": None},
}


@contextmanager
def settings(**more: Any) -> Iterator[None]:
    """Inside, matplotlib's defaults and these, whatever a style of the user's says; fonts are the user's."""
    import matplotlib

    with matplotlib.rc_context():
        kept: Any = {"font.sans-serif": matplotlib.rcParams["font.sans-serif"]}  # a type that lists all settings
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(kept | more)
        yield


def draw(scene: Scene, format: str) -> bytes:
    """The bytes of an "svg", "pdf" or "png" file (300 dots per inch)."""
    import matplotlib
    from matplotlib.figure import Figure

    with settings(**SETTINGS):
        figure = Figure(figsize=(scene.width / 72, scene.height / 72), dpi=DPI, facecolor="white")
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set_xlim(0, scene.width)
        axes.set_ylim(scene.height, 0)  # y downwards
        axes.axis("off")
        for order, shape in enumerate(scene.shapes):
            _add(axes, shape, order)
        data = io.BytesIO()
        named = {"Title": scene.title} if scene.title else {}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")  # one for each letter, and word of it
            figure.savefig(data, format=format, dpi=DPI, metadata=UNDATED[format] | named)
    lacking = {letter for shape in scene.shapes if isinstance(shape, Text) for letter in families(shape.text)[1]}
    if lacking and format != "svg":  # where words stay words, a viewer has letters of its own
        letters, cache = "".join(sorted(lacking)), matplotlib.get_cachedir()
        warnings.warn(
            f"no font that matplotlib knows has the letters {letters}: they are drawn as boxes. Install one, such as "
            f'Noto Sans CJK, and empty {cache}, or name one of yours in matplotlib.rcParams["font.sans-serif"]',
            stacklevel=2,
        )
    return data.getvalue()


def _add(axes: Any, shape: Any, order: int) -> None:
    from matplotlib.image import imread
    from matplotlib.patches import Circle, PathPatch
    from matplotlib.path import Path

    limits = axes.get_xlim(), axes.get_ylim()
    if isinstance(shape, Cells):
        corners: list[tuple[float, float]] = []
        for x, y, width, height in shape.boxes:
            corners += [(x, y), (x + width, y), (x + width, y + height), (x, y + height), (x, y)]
        codes = [Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY] * len(shape.boxes)
        if corners:
            look: dict[str, Any] = {"facecolor": shape.fill, "edgecolor": "none", "alpha": shape.opacity}
            axes.add_patch(PathPatch(Path(corners, codes), zorder=order, **look))
    elif isinstance(shape, Stroke):
        codes = [Path.MOVETO] + [Path.CURVE4] * (len(shape.points) - 1)
        style: dict[str, Any] = {"linewidth": shape.width, "edgecolor": shape.colour, "alpha": shape.opacity}
        axes.add_patch(PathPatch(Path(shape.points, codes), facecolor="none", capstyle="butt", zorder=order, **style))
    elif isinstance(shape, Disc):
        axes.add_patch(
            Circle(
                (shape.x, shape.y),
                shape.radius,
                facecolor=shape.fill,
                edgecolor=shape.edge,
                linewidth=0.5,
                zorder=order,
            )
        )
    elif isinstance(shape, Picture):
        x, y, width, height = shape.box
        pixels = imread(io.BytesIO(base64.b64decode(shape.data.partition(",")[2])), format="png")
        extent = (x, x + width, y + height, y)
        axes.imshow(pixels, extent=extent, cmap="gray", vmin=0, vmax=1, aspect="auto", zorder=order, **PIXELS)
        axes.set_xlim(*limits[0])
        axes.set_ylim(*limits[1])
    elif isinstance(shape, Text):
        named, _ = families(shape.text)
        axes.text(
            shape.x,
            shape.y,
            shape.text,
            fontsize=shape.size,
            color=shape.colour,
            ha={"start": "left", "middle": "center", "end": "right"}[shape.align],
            va="baseline",
            rotation=90 if shape.turned else 0,
            rotation_mode="anchor",
            fontweight="normal",
            fontfamily=None if named == (FONT,) else [*named, "sans-serif"],
            zorder=order,
        )
