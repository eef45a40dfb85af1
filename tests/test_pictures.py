"""Pictures of site-level and unit-level graphs: what stands where, in which colour, and in which file."""

from __future__ import annotations

import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import time
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import matplotlib
import networkx as nx
import pytest
import torch

import nadhooks
from nadhooks.demo import similarity_picture
from nadhooks.errors import RenderError
from nadhooks.formats import WRITERS, scene
from nadhooks.formats.html import to_html
from nadhooks.formats.labels import label
from nadhooks.formats.notebook import masks_table
from nadhooks.formats.scene import (
    BLUE,
    BOTH,
    FAINT,
    FONT,
    GREY,
    INK,
    ORANGE,
    SHADES,
    Cells,
    Disc,
    Scene,
    Stroke,
    Text,
    blended,
    families,
    text_width,
)
from nadhooks.formats.site_layout import DOUBLE, lay_out
from nadhooks.formats.site_scene import JOINS
from nadhooks.graphs import FlowGraph
from nadhooks.masks import Masks
from nadhooks.tasks import Tasks

from .graphs import chain, site_graph, unit_graph
from .test_masks import THREE

SVG = "{http://www.w3.org/2000/svg}"
BRANCHES = site_graph(
    {"stem": 4, "left": 4, "right": 4, "head": 8},
    {"cat": {"stem": [0, 1], "left": [0], "right": [3], "head": [7]}},
    [("input", "stem"), ("stem", "left"), ("stem", "right"), ("stem", "head", "sum"), ("left", "head", "sum"),
     ("right", "head", "sum"), ("head", "output")],
)  # fmt: skip
LONG = [
    "00001_Animalia_Annelida_Clitellata_Haplotaxida_Lumbricidae_Lumbricus_terrestris",
    "great white shark, " * 5 + "x",
]
FOLDER = Path(__file__).parent / "golden"
GOLDEN = {
    "sites.dot": BRANCHES,
    "sites.tex": BRANCHES,
    "units.dot": unit_graph(2, 4, 2, regions=2),
    "units.tex": unit_graph(2, 4, 2, regions=2),
}


def words(picture: Scene) -> list[str]:
    return [shape.text for shape in picture.shapes if isinstance(shape, Text)]


def squares(picture: Scene, site: str) -> dict[str, int]:
    """How many boxes of each colour a site has."""
    cells = [shape for shape in picture.shapes if isinstance(shape, Cells) and shape.about.startswith(f"{site}:")]
    return {shape.fill: len(shape.boxes) for shape in cells}


def bands(picture: Scene) -> dict[str, Stroke]:
    return {shape.about.split(":")[0]: shape for shape in picture.shapes if isinstance(shape, Stroke) and shape.about}


def test_every_unit_has_a_square_in_the_colour_of_its_fate() -> None:
    assert squares(scene(nadhooks.flow_graph(THREE, "t0")), "a") == {BLUE: 2, FAINT: 2}
    assert squares(scene(nadhooks.flow_graph(THREE, "t0")), "b@input") == {BLUE: 1, FAINT: 1}


def test_two_classes_over_each_other_mark_what_they_share() -> None:
    graph = site_graph({"a": 4}, {"cat": {"a": [0, 1]}, "dog": {"a": [1, 2]}}, [("input", "a"), ("a", "output")])
    assert squares(scene(graph), "a") == {BLUE: 1, BOTH: 1, ORANGE: 1, FAINT: 1}
    assert {"cat only", "dog only", "both", "kept by neither"} <= set(words(scene(graph)))


def test_many_classes_are_shades_by_how_many_keep_a_unit() -> None:
    kept = {f"c{task}": {"a": range(task + 1)} for task in range(5)}  # unit 0 by five, unit 4 by one, unit 5 by none
    graph = site_graph({"a": 6}, kept, [("input", "a"), ("a", "output")])
    assert squares(scene(graph), "a") == dict.fromkeys([*SHADES, FAINT], 1)


@pytest.mark.parametrize(("tasks", "shades"), [(3, [0, 2, 4]), (4, [0, 1, 3, 4])])
def test_of_few_classes_too_the_lightest_shade_is_one_and_the_darkest_all(tasks: int, shades: list[int]) -> None:
    kept = {f"c{task}": {"a": range(task + 1)} for task in range(tasks)}
    graph = site_graph({"a": tasks}, kept, [("input", "a"), ("a", "output")])
    assert squares(scene(graph), "a") == {SHADES[shade]: 1 for shade in shades}


def test_squares_of_several_kinds_of_units_mix_their_colours() -> None:
    half = range(0, 8192, 2)  # two classes that keep the same half; squares stand for several units
    kept = {"cat": {"a": half}, "dog": {"a": half}}
    graph = site_graph({"a": 8192}, kept, [("input", "a"), ("a", "output")])
    assert lay_out(graph, DOUBLE).each in (2, 4, 8)
    found = squares(scene(graph), "a")
    assert blended([BOTH, FAINT]) in found
    assert set(found) <= {blended([BOTH, FAINT]), FAINT}
    assert "of several kinds: their colours mixed" in words(scene(graph))
    assert blended([BLUE]) == BLUE


def test_pictures_of_two_classes_have_everything_in_the_same_place() -> None:
    first, second = (lay_out(nadhooks.flow_graph(THREE, task), DOUBLE) for task in ("t0", "t1"))
    assert first.places == second.places
    assert first.routes == second.routes
    assert first.labels == second.labels


def test_bands_are_as_wide_as_the_share_that_flows() -> None:
    drawn = bands(scene(BRANCHES))
    assert drawn["stem → left"].width == pytest.approx(drawn["input → stem"].width / 2)
    assert drawn["left → head"].width == pytest.approx(drawn["input → stem"].width / 4)


def test_joins_have_a_colour_a_sign_and_a_line_in_the_legend() -> None:
    kinds = ["sum", "concatenation", "product", "attention"]
    colours = set()
    for kind in kinds:
        edges = [("input", "a"), ("input", "b"), ("a", "c", kind), ("b", "c", kind), ("c", "output")]
        picture = scene(site_graph({"a": 4, "b": 4, "c": 4}, {"cat": {}}, edges))
        colours.add(bands(picture)["a → c"].colour)
        assert sum(isinstance(shape, Disc) for shape in picture.shapes) == 2  # at the site, and in the legend
        assert {"sequential", "residual sum" if kind == "sum" else kind} <= set(words(picture))
    assert len(colours) == 4


def test_bands_tell_what_lies_on_the_way_and_signs_what_comes_last() -> None:
    """A transformer's block is fed by attention and joined by a sum."""
    graph = site_graph({"a": 4, "b": 4}, {"cat": {}}, [("input", "a"), ("a", "b", "attention"), ("b", "output")])
    nx.set_node_attributes(graph, {"a": "sequential", "b": "sum", "output": "sequential"}, "join")
    picture = scene(graph)
    assert bands(picture)["a → b"].colour == JOINS["attention"][0]
    assert {shape.edge for shape in picture.shapes if isinstance(shape, Disc)} == {JOINS["sum"][0]}
    assert {"attention", "residual sum"} <= set(words(picture))


def test_sums_meet_in_one_point_and_concatenations_arrive_side_by_side() -> None:
    def arrivals(kind: str) -> list[float]:
        edges = [("input", "a"), ("input", "b"), ("a", "c", kind), ("b", "c", kind), ("c", "output")]
        layout = lay_out(site_graph({"a": 4, "b": 4, "c": 4}, {"cat": {}}, edges), DOUBLE)
        return [layout.routes[source, "c"][-1][1] for source in ("a", "b")]

    first, second = arrivals("sum")
    assert first == second
    first, second = arrivals("concatenation")
    assert second - first > 3


def test_joins_may_stand_as_nodes_of_their_own() -> None:
    graph = site_graph(
        {"a": 4, "b": 4, "sum 1": 0, "c": 4},
        {"cat": {}},
        [("input", "a"), ("a", "b"), ("a", "sum 1", "sum"), ("b", "sum 1", "sum"), ("sum 1", "c"), ("c", "output")],
    )
    picture = scene(graph)
    assert sum(isinstance(shape, Disc) for shape in picture.shapes) == 2  # the join, and the legend
    assert "sum 1" not in words(picture)


def test_edges_that_pass_over_sites_do_not_cross_them() -> None:
    layout = lay_out(BRANCHES, DOUBLE)
    start, *_, end = layout.routes["stem", "head"]
    assert start[0] < end[0]
    crossed = [layout.places[name] for name in ("left", "right")]
    assert all(place.y <= start[1] <= place.y + place.height for place in crossed) is False
    line = site_graph(
        {"a": 4, "b": 4, "c": 4}, {"cat": {}}, [("input", "a"), ("a", "b"), ("b", "c"), ("a", "c"), ("c", "output")]
    )
    layout = lay_out(line, DOUBLE)
    passed = layout.places["b"]
    over = [y for x, y in layout.routes["a", "c"] if passed.x <= x <= passed.x + passed.width]
    assert over
    assert all(y < passed.y for y in over)


def test_a_very_long_name_is_shortened_and_ends_above_the_legend() -> None:
    long = "b" * 200
    edges = [("input", "a"), ("a", long), (long, "output")]
    graph = site_graph({"a": 4, long: 4}, {"cat": {"a": [0]}}, edges, model="")
    picture = scene(graph, "double")
    assert picture.height < 400
    turned = [shape for shape in picture.shapes if isinstance(shape, Text) and shape.turned and "b…b" in shape.text]
    assert len(turned) == 1
    assert turned[0].y < min(shape.y for shape in picture.shapes if isinstance(shape, Text) and shape.text == "kept")


def test_nothing_leaves_the_sheet_and_labels_do_not_touch() -> None:
    two = site_graph(
        {"a": 4}, {name: {"a": [task]} for task, name in enumerate(LONG)}, [("input", "a"), ("a", "output")]
    )
    one = unit_graph(3, regions=2)
    one.graph["tasks"] = LONG[:1]
    crowd = [f"layer{n}.{part}" for n in range(24) for part in ("conv1", "downsample.0")]
    edges = [
        e for a, b in itertools.pairwise(zip(crowd[::2], crowd[1::2], strict=True)) for e in itertools.product(a, b)
    ]
    ends = [("input", crowd[0]), ("input", crowd[1]), (crowd[-2], "output"), (crowd[-1], "output")]
    branches = site_graph(dict.fromkeys(crowd, 64), {"cat": {name: range(32) for name in crowd}}, [*ends, *edges])
    plain = (BRANCHES, chain(1), chain(17, 2048), chain(60, 768, "stages.2.blocks.{}.attn.proj"), unit_graph(9))
    for graph in (*plain, two, one, branches):
        for width in ("single", "double") if len(graph) < 20 else ("double",):
            picture = scene(graph, width)
            spans: dict[float, list[tuple[float, float]]] = {}
            for shape in picture.shapes:
                if isinstance(shape, Text):
                    long = text_width(shape.text, shape.size)
                    start = shape.x - long * {"start": 0, "middle": 0.5, "end": 1}[shape.align]
                    if shape.turned:
                        tops = {"start": (long, 0.0), "middle": (long / 2, long / 2), "end": (0.0, long)}[shape.align]
                        assert shape.y - tops[0] >= 0, shape
                        assert shape.y + tops[1] <= picture.height, shape
                        assert 0 <= shape.x - shape.size <= picture.width, shape
                    else:
                        assert start >= 0, shape
                        assert start + long <= picture.width, shape
                        spans.setdefault(round(shape.y, 2), []).append((start, start + long))
                elif isinstance(shape, Cells):
                    assert all(x >= 0 and x + w <= picture.width for x, _, w, _ in shape.boxes)
                    assert all(y >= 0 and y + h <= picture.height for _, y, _, h in shape.boxes)
            for line in spans.values():
                line.sort()
                assert all(a[1] <= b[0] + 0.01 for a, b in itertools.pairwise(line)), line


def test_words_of_a_legend_fold_in_narrow_pictures() -> None:
    assert "flow: share of the source's units kept, 100% and 50%" in words(scene(chain(2), "single"))
    for graph in (chain(2), unit_graph(2), nadhooks.collapse(unit_graph(2))):
        said = words(scene(graph, 150))
        assert not any("…" in each for each in said), said
        texts = [shape for shape in scene(graph, 150).shapes if isinstance(shape, Text) and not shape.turned]
        assert len({(shape.x, shape.y) for shape in texts}) == len(texts)
        assert all(shape.x + text_width(shape.text, shape.size) <= 150 for shape in texts if shape.align == "start")


@pytest.mark.parametrize("number", range(9, 15))
@pytest.mark.parametrize("make", [lambda number: chain(number, 6), lambda number: unit_graph(number, 192)])
def test_figures_of_neighbours_stand_further_apart_than_their_own_parts(
    make: Callable[[int], nx.DiGraph], number: int
) -> None:
    texts = [s for s in scene(make(number), 252 if number < 14 else 516).shapes if isinstance(s, Text) and not s.turned]
    figures = [s for s in texts if re.fullmatch(r"\d+( / \d+)+", s.text)]
    for a, b in itertools.pairwise(figures):
        apart = b.x - a.x - (text_width(a.text, a.size) + text_width(b.text, b.size)) / 2
        assert apart > 1.9 * text_width(" ", a.size)


@pytest.mark.parametrize("number", range(12, 22))
def test_percentages_do_not_touch_where_all_is_kept(number: int) -> None:
    names = [f"block{n}" for n in range(number)]
    edges = itertools.pairwise(["input", *names, "output"])
    graph = site_graph(dict.fromkeys(names, 6), {"cat": dict.fromkeys(names, range(6))}, list(edges))
    figures = [s for s in scene(graph, "single").shapes if isinstance(s, Text) and s.text == "100%" and not s.turned]
    for a, b in itertools.pairwise(figures):
        assert b.x - a.x > 1.1 * text_width(a.text, a.size)


@pytest.mark.parametrize(("width", "points"), [("single", 252), ("double", 516), (400, 400)])
def test_pictures_are_as_wide_as_a_column(tmp_path: Path, width: str | float, points: int) -> None:
    nadhooks.render(chain(9), tmp_path / "flow.svg", width=width)
    root = ET.parse(tmp_path / "flow.svg").getroot()
    assert root.get("width") == f"{points}pt"


def test_the_svg_holds_words_and_the_pdf_a_true_type_font(tmp_path: Path) -> None:
    nadhooks.render(nadhooks.flow_graph(THREE, "t0"), tmp_path / "flow.svg")
    texts = ET.parse(tmp_path / "flow.svg").getroot().iter(f"{SVG}text")
    assert {"input", "a", "b@input", "output", "kept", "dropped"} <= {
        "".join(text.itertext()).strip() for text in texts
    }
    nadhooks.render(nadhooks.flow_graph(THREE, "t0"), tmp_path / "flow.pdf")
    data = (tmp_path / "flow.pdf").read_bytes()
    assert b"/FontFile2" in data
    assert b"/Type3" not in data


def test_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    odd = 'a<$x$>&"\\b_%'
    graph = site_graph({odd: 4}, {"<i>$": {odd: [0]}}, [("input", odd), (odd, "output")], model="")
    for suffix in ("svg", "png", "pdf", "tex"):
        nadhooks.render(graph, tmp_path / f"odd.{suffix}")
    texts = ET.parse(tmp_path / "odd.svg").getroot().iter(f"{SVG}text")
    assert {odd, "task <i>$: 1 of 4 units kept (25%)"} <= {"".join(text.itertext()).strip() for text in texts}


def test_a_style_of_the_users_changes_no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {format: WRITERS[f".{format}"](BRANCHES, "single", None) for format in ("png", "svg", "pdf")}
    before = similarity_picture(torch.eye(3), "abc")
    style: Any = {"text.usetex": True, "savefig.bbox": "tight", "savefig.facecolor": "black", "axes.linewidth": 5.0}
    with matplotlib.rc_context(style):
        for format, picture in expected.items():
            assert WRITERS[f".{format}"](BRANCHES, "single", None) == picture
        assert similarity_picture(torch.eye(3), "abc") == before
        assert matplotlib.rcParams["text.usetex"]


def test_letters_that_the_font_lacks_come_from_another_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["nadhooks.formats.scene"], "OTHER_FONTS", ())
    assert families("plain, é, ∑") == ((FONT,), "")
    assert families("⌕ and \U00013000") == ((FONT,), "⌕\U00013000")
    monkeypatch.setitem(matplotlib.rcParams, "font.sans-serif", ["nowhere", "STIXGeneral"])  # comes with matplotlib
    assert families("⌕ and \U00013000") == ((FONT, "STIXGeneral"), "\U00013000")
    assert text_width("⌕", 10) > 0
    graph = site_graph({"a": 4}, {"⌕": {"a": [0]}}, [("input", "a"), ("a", "output")], model="")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for suffix in ("png", "svg", "pdf"):
            nadhooks.render(graph, tmp_path / f"sign.{suffix}")
    assert b"STIXGeneral" in (tmp_path / "sign.pdf").read_bytes()


def test_letters_that_no_font_has_are_named_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["nadhooks.formats.scene"], "OTHER_FONTS", ())
    graph = site_graph({"a": 4}, {"\U00013000": {"a": [0]}}, [("input", "a"), ("a", "output")], model="")
    with pytest.warns(UserWarning, match="has the letters \U00013000: they are drawn as boxes") as told:
        nadhooks.render(graph, tmp_path / "flow.png")
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nadhooks.render(graph, tmp_path / "flow.svg")  # the viewer has fonts of its own


def test_the_page_of_a_unit_graph_without_units_is_written(tmp_path: Path) -> None:
    graph = unit_graph(2, 4, 2)
    graph = graph.subgraph(node for node, data in graph.nodes(data=True) if data["kind"] == "output")
    for suffix in ("html", "svg"):
        nadhooks.render(graph, tmp_path / f"none.{suffix}")


def test_the_same_graph_gives_the_same_bytes_in_any_process() -> None:
    program = "import tests.test_pictures as t; print(t.digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "SOURCE_DATE_EPOCH": "0"}
    other = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, check=True)
    assert other.stdout.decode().strip() == digests()


def digests() -> str:
    graphs = (BRANCHES, unit_graph(regions=2))
    return " ".join(sha256(write(graph, "double", None)).hexdigest() for write in WRITERS.values() for graph in graphs)


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_texts_are_those_of_the_golden_files(name: str) -> None:
    """After a change that is meant: `python -m tests.test_pictures` writes them anew."""
    assert golden(name) == (FOLDER / name).read_text()


def golden(name: str) -> str:
    return WRITERS[Path(name).suffix](GOLDEN[name], "single", None).decode()


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="no pdflatex on the PATH")
@pytest.mark.parametrize("graph", [BRANCHES, unit_graph(regions=2), chain(17, 64, 'a_b.$x$.{}&%#~^\\<|>"')])
def test_tikz_compiles(graph: nx.DiGraph, tmp_path: Path) -> None:
    nadhooks.render(graph, tmp_path / "flow.tex")
    paper = r"\documentclass{article}\usepackage{tikz}\begin{document}\input{flow}\end{document}"
    (tmp_path / "paper.tex").write_text(paper)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stdout.decode(errors="replace")[-2000:]
    assert (tmp_path / "paper.pdf").read_bytes().startswith(b"%PDF")


def test_long_names_become_globs_and_what_their_stars_stand_for() -> None:
    picture = scene(chain(24, name="backbone.stages.2.blocks.{}"), "double")
    assert {"backbone.stages.2.blocks.*", "0", "23"} <= set(words(picture))


def test_parts_of_names_that_do_not_fit_end_in_letters() -> None:
    names = [[f"layer{n}.{part}" for part in ("conv1", "downsample.0")] for n in range(24)]
    lines = [text for each in label(names, 10.0).lines.values() for text in each]
    assert any("…" in text for text in lines)
    assert not any("…" in text and text.endswith(".") for text in lines)


def test_graphs_too_large_to_be_read_say_so_and_offer_the_collapsed_view(tmp_path: Path) -> None:
    graph = chain(400, name="layer.{}")
    with pytest.raises(RenderError, match=r"400 stages .*nadhooks.collapse\(graph, 62\).*width="):
        nadhooks.render(graph, tmp_path / "flow.svg")
    assert not list(tmp_path.iterdir())
    nadhooks.render(nadhooks.collapse(graph), tmp_path / "flow.svg")
    with pytest.raises(RenderError, match=r"48 stages .*nadhooks.collapse\(graph, 24\)"):
        scene(nadhooks.collapse(chain(400, name="layer{}")), "single")
    assert words(scene(nadhooks.collapse(chain(400, name="layer{}"), 24), "single"))
    with pytest.raises(RenderError, match=r"\d+ nodes \(at most 500\)"):
        scene(unit_graph(100, 16, 6))
    assert words(scene(nadhooks.collapse(unit_graph(10, 16, 6))))


def test_joins_make_room_for_sites() -> None:
    """A join stands before each of 36 sites."""
    units: dict[str, int] = {}
    path = ["input"]
    for number in range(36):
        units |= {f"sum {number + 1}": 0, f"block.{number}": 64}
        path += [f"sum {number + 1}", f"block.{number}"]
    graph = site_graph(units, {"cat": {}}, list(itertools.pairwise([*path, "output"])))
    layout = lay_out(graph, DOUBLE)
    places = [layout.places[name] for name in path]
    assert all(a.x + a.width <= b.x for a, b in itertools.pairwise(places))
    with pytest.raises(RenderError, match=r"; leave the joins out, draw nadhooks.collapse\(graph, 18\)"):
        scene(graph, 380.0)
    assert words(scene(nadhooks.collapse(graph, 18), 380.0))


def test_differences_say_what_they_are() -> None:
    graph = site_graph({"a": 4}, {"3": {"a": [0]}, "8": {}}, [("input", "a"), ("a", "output")], combine="difference")
    assert "torchvision:net, task 3 without 8: 1 of 4 units kept" in words(scene(graph))


def test_widths_that_are_none_are_refused() -> None:
    for width in ("triple", 3, -1.0, math.nan, None):
        with pytest.raises(RenderError, match="width: expected 'single', 'double' or 100 to 10,000 points"):
            scene(chain(2), width)  # type: ignore[arg-type]


def test_circles_are_refused() -> None:
    graph = chain(2)
    graph.add_edge("layer.1", "layer.0", share=1.0)
    with pytest.raises(RenderError, match="without circles"):
        scene(graph)


# --- units -----------------------------------------------------------------------------------------------------------


def test_strips_show_units_in_their_place_and_figures_above() -> None:
    picture = scene(unit_graph(2, 8, 3))
    assert words(picture).count("3 / 4 / 8") == 2
    assert words(picture).count("80%") == 2
    marks = [shape.boxes[0] for shape in picture.shapes if isinstance(shape, Cells) and ":" in shape.about]
    strip = next(shape.boxes[0] for shape in picture.shapes if isinstance(shape, Cells) and shape.about == "layer.0")
    centres = [(y + h / 2 - strip[1]) / strip[3] for _, y, _, h in marks[:3]]
    assert centres == pytest.approx([0.5 / 8, 2.5 / 8, 4.5 / 8])


def test_strong_edges_lie_over_weak_ones_and_signs_have_colours() -> None:
    drawn = [s for s in scene(unit_graph(2, 8, 3)).shapes if isinstance(s, Stroke) and "→" in s.about]
    weights = [float(shape.about.rpartition(" ")[2]) for shape in drawn]
    assert [abs(weight) for weight in weights] == sorted(abs(weight) for weight in weights)
    assert len({shape.colour for shape, weight in zip(drawn, weights, strict=True) if weight > 0}) == 1
    assert len({shape.colour for shape in drawn}) == 2
    assert drawn[-1].width > drawn[0].width
    assert drawn[-1].opacity > drawn[0].opacity


def test_of_many_edges_the_strongest_are_drawn_and_the_legend_says_so() -> None:
    graph = unit_graph(3, 64, 16)
    picture = scene(graph)
    drawn = [float(s.about.rpartition(" ")[2]) for s in picture.shapes if isinstance(s, Stroke) and "→" in s.about]
    assert len(drawn) == 400
    left = sorted((abs(data["weight"]) for *_, data in graph.edges(data=True)), reverse=True)[400:]
    assert min(map(abs, drawn)) >= float(f"{left[0]:.4g}")
    assert any(text.startswith(f"the 400 strongest of {graph.number_of_edges()} edges, ") for text in words(picture))


def test_a_part_of_a_graph_has_the_strips_of_its_own_sites() -> None:
    graph = unit_graph(5)
    pair = graph.subgraph([name for name, data in graph.nodes(data=True) if data.get("site") in ("layer.2", "layer.3")])
    picture = scene(pair, "single")
    strips = [shape.about for shape in picture.shapes if isinstance(shape, Cells) and shape.fill == FAINT]
    assert strips == ["layer.2", "layer.3"]
    edges = [shape for shape in picture.shapes if isinstance(shape, Stroke) and "→" in shape.about]
    assert len(edges) == pair.number_of_edges() == 3 * 3 + 2
    assert to_html(pair)


def test_regions_of_the_image_are_a_grid_coloured_by_what_leaves_them() -> None:
    picture = scene(unit_graph(2, 8, 3, regions=3))
    cells = {s.about: s for s in picture.shapes if isinstance(s, Cells) and s.about.startswith("input:")}
    assert len(cells) == 9
    assert cells["input:0,0"].boxes[0][1] == cells["input:0,2"].boxes[0][1]
    assert cells["input:0,0"].fill != cells["input:2,2"].fill


def test_regions_that_nothing_leaves_are_in_the_grid_as_well() -> None:
    graph = unit_graph(2, 8, 3, regions=3)
    graph.remove_node("input:0,2")
    outlines = {s.colour for s in scene(graph).shapes if isinstance(s, Stroke) and s.width == 0.4}
    assert outlines == {GREY}


# --- collapsing ------------------------------------------------------------------------------------------------------


def test_collapsing_takes_sites_of_one_part_together() -> None:
    names = ["stem", "layer1.0", "layer1.1", "layer2.0", "layer2.1"]
    path = ["input", *names, "output"]
    kept = {"cat": {"layer1.0": [1], "layer1.1": [0, 3], "layer2.0": [2]}, "dog": {"stem": [0]}}
    graph = site_graph(dict.fromkeys(names, 4), kept, [(*edge, "sum") for edge in itertools.pairwise(path)])
    small = nadhooks.collapse(graph, 3)
    assert list(small) == ["input", "stem", "layer1.*", "layer2.*", "output"]
    node = small.nodes["layer1.*"]
    assert (node["units"], node["kept"], node["share"], node["stage"]) == (8, 3, 3 / 8, 2)
    assert node["members"] == ["layer1.0", "layer1.1"]
    assert node["kept_units"] == {"cat": [1, 4, 7], "dog": []}
    assert node["sharing"] == [0, 1, 0, 0, 1, 0, 0, 1]
    assert small.edges["layer1.*", "layer2.*"] == {"found": "autograd", "share": 3 / 8, "join": "sum"}
    assert list(graph) == path  # the graph itself stays


def test_collapsing_goes_by_stages_where_names_do_not_tell() -> None:
    small = nadhooks.collapse(chain(400, 4, "conv{}"), 20)
    assert len(small) == 22
    assert sum(data["units"] for _, data in small.nodes(data=True)) == 1600
    assert nx.is_directed_acyclic_graph(small)


def test_parts_that_feed_each_other_in_turn_become_one() -> None:
    path = ["input", "a.0", "b.0", "a.1", "b.1", "output"]
    graph = site_graph(dict.fromkeys(path[1:-1], 2), {"cat": {}}, list(itertools.pairwise(path)))
    small = nadhooks.collapse(graph, 2)
    assert nx.is_directed_acyclic_graph(small)
    assert list(small) == ["input", "a.0 … b.1", "output"]


def test_collapsed_units_are_bands_of_summed_effects() -> None:
    small = nadhooks.collapse(unit_graph(2, 8, 3))
    assert list(small) == ["input", "layer.0", "layer.1", "output"]
    assert small.nodes["layer.0"]["kept"] == 3
    assert small.edges["layer.1", "output"]["weight"] == pytest.approx(1.5)
    assert small.edges["layer.0", "layer.1"]["weight"] == pytest.approx((1 + 0.8 + 0.64) ** 2)
    assert small.edges["layer.0", "layer.1"]["share"] == 1


def test_collapsed_units_leave_out_sites_that_show_none() -> None:
    graph = unit_graph(3, 8, 3)
    graph.remove_nodes_from([name for name in graph if name.startswith("layer.1:")])
    assert list(nadhooks.collapse(graph)) == ["input", "layer.0", "layer.2", "output"]


def test_collapsing_other_things_is_refused() -> None:
    for graph in (nx.path_graph(3), "graph"):
        with pytest.raises(nadhooks.NadhooksError, match="expected a graph made by"):
            nadhooks.collapse(graph)
    with pytest.raises(nadhooks.NadhooksError, match="expected a number of sites from 1, got 0"):
        nadhooks.collapse(chain(2), 0)


def test_ink_is_dark_and_faint_is_light() -> None:
    assert re.fullmatch("#[0-3].[0-3].[0-3].", INK)
    assert re.fullmatch("#[c-f].[c-f].[c-f].", FAINT)


# --- notebooks -------------------------------------------------------------------------------------------------------


def test_a_graph_with_a_circle_shows_no_picture_and_is_not_collapsed() -> None:
    graph = nadhooks.flow_graph(THREE, "t0")
    assert isinstance(graph, FlowGraph)
    graph.add_edge("output", "input")
    assert graph._repr_svg_() is None
    with pytest.raises(nadhooks.NadhooksError, match="expected a graph made by"):
        nadhooks.collapse(graph)


def test_graphs_show_themselves_in_notebooks(tmp_path: Path) -> None:
    graph = nadhooks.flow_graph(THREE, "t0")
    assert isinstance(graph, FlowGraph)
    shown = graph._repr_svg_()
    assert shown is not None
    assert ET.fromstring(shown.encode()).tag == f"{SVG}svg"
    nadhooks.render(graph, tmp_path / "flow.json")
    for again in (graph.copy(), nadhooks.collapse(graph), nadhooks.read_graph(tmp_path / "flow.json")):
        assert type(again) is FlowGraph


def test_a_graph_of_400_sites_shows_its_collapsed_view_and_other_graphs_none() -> None:
    large = FlowGraph(chain(400))
    begun = time.monotonic()
    shown = large._repr_svg_()
    assert time.monotonic() - begun < 20
    assert shown is not None
    assert len(shown) < 300_000
    assert FlowGraph([(1, 2)])._repr_svg_() is None


def test_masks_have_a_table_of_what_each_task_keeps_of_each_site() -> None:
    table = masks_table(THREE)
    assert table.count("<tr>") == 1 + 3
    assert "<td>t0</td><td>0</td><td>50%</td>" in table
    assert 'y="8.0" width="5" height="8.0"' in table  # half of site a
    named = Masks(THREE.sites, THREE.values, Tasks.of(["<b>", "x", "y"]), THREE.wiring)
    assert "<td>&lt;b&gt;</td>" in masks_table(named)


if __name__ == "__main__":
    for name in GOLDEN:
        (FOLDER / name).write_text(golden(name))
