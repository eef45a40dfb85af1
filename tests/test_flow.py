from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import networkx as nx
import pytest

import nadhooks
from nadhooks.errors import RenderError, TaskError
from nadhooks.formats.dot import to_dot
from nadhooks.masks import Masks

from .test_masks import THREE


def test_flow_graphs_say_what_a_task_keeps() -> None:
    graph = nadhooks.flow_graph(THREE, "t0")
    assert list(graph) == ["input", "a", "b@input", "output"]
    assert graph.nodes["a"] == {
        "kind": "site", "stage": 1, "module": "a", "units": 4, "kept": 2, "share": 0.5, "use": [1, 1, 0, 0],
    }  # fmt: skip
    assert graph.nodes["b@input"]["kept"] == 1
    assert [graph.nodes[node]["stage"] for node in graph] == [0, 1, 2, 3]
    assert graph.edges["a", "b@input"]["share"] == 0.5
    assert graph.graph["tasks"] == ["t0"]
    assert all({"units", "kept"} <= data.keys() for _, data in graph.nodes(data=True))


def test_all_tasks_over_each_other() -> None:
    graph = nadhooks.flow_graph(THREE)
    assert graph.nodes["a"]["kept"] == 3
    assert graph.nodes["a"]["use"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])


def test_a_task_that_keeps_nothing_still_has_a_graph() -> None:
    graph = nadhooks.flow_graph(THREE, 2)
    assert graph.nodes["a"]["kept"] == 0
    assert "0 of 6 units kept (0%)" in to_dot(graph)


def test_unknown_tasks_are_named() -> None:
    with pytest.raises(TaskError, match=r"unknown task 'cat': expected one of 0 \(t0\)"):
        nadhooks.flow_graph(THREE, "cat")


def test_flow_graphs_are_ordinary_graphs() -> None:
    graph = nadhooks.flow_graph(THREE)
    graph.add_edge("a", "output")  # the masks' wiring is frozen, its flow graphs are the user's
    assert not THREE.wiring.has_edge("a", "output")
    json.dumps(nx.node_link_data(graph, edges="edges"))


def test_png_and_dot_are_written(tmp_path: Path) -> None:
    graph = nadhooks.flow_graph(THREE)
    nadhooks.render(graph, tmp_path / "flow.png")
    assert (tmp_path / "flow.png").read_bytes().startswith(b"\x89PNG")
    nadhooks.render(graph, tmp_path / "flow.gv")
    assert (tmp_path / "flow.gv").read_text() == to_dot(graph)


def test_wide_sites_share_squares() -> None:
    wide = Masks(
        (nadhooks.Site("w", 1, 1000, "w"),),
        {"w": THREE["a"].repeat(1, 250)},
        THREE.task_rows,
        nx.DiGraph([("input", "w"), ("w", "output")]),
    )
    text = to_dot(nadhooks.flow_graph(wide, 0))
    assert "4 units a square" in text
    assert "some of a square's units kept" in text
    assert text.count("BGCOLOR") <= 256 + 3
    assert "some of a square" not in to_dot(nadhooks.flow_graph(THREE, 0))


def test_the_font_is_one_whose_letters_graphviz_can_measure() -> None:
    """It would take another font's widths, and long names would leave their nodes."""
    program = shutil.which("graphviz-pure") or shutil.which("graphviz-pure", path=sysconfig.get_path("scripts"))
    assert program is not None
    drawn = subprocess.run([program, "-Tsvg"], input=to_dot(nadhooks.flow_graph(THREE)).encode(), capture_output=True)
    assert (drawn.returncode, drawn.stderr) == (0, b"")
    assert b">b@input</text>" in drawn.stdout


def test_names_that_graphviz_would_read_as_markup_are_drawn(tmp_path: Path) -> None:
    odd = Masks(
        (nadhooks.Site('a<b>&"c:d', 1, 4, "a"),),
        {'a<b>&"c:d': THREE["a"]},
        nadhooks.tasks.Tasks.of(['<i>"&', "x", "y"]),
        nx.DiGraph([("input", 'a<b>&"c:d'), ('a<b>&"c:d', "output")]),
    )
    nadhooks.render(nadhooks.flow_graph(odd, '<i>"&'), tmp_path / "odd.dot")
    assert "a&lt;b&gt;&amp;&quot;c:d" in (tmp_path / "odd.dot").read_text()


def test_the_same_graph_gives_the_same_text_in_any_process() -> None:
    program = (
        "import nadhooks, tests.test_masks as t; from nadhooks.formats.dot import to_dot; "
        "print(to_dot(nadhooks.flow_graph(t.THREE)), end='')"
    )
    texts = [
        subprocess.run(
            [sys.executable, "-c", program], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("1", "2")
    ]
    assert texts[0] == texts[1] == to_dot(nadhooks.flow_graph(THREE)).encode()


def test_unknown_suffixes_are_refused(tmp_path: Path) -> None:
    graph = nadhooks.flow_graph(THREE)
    with pytest.raises(RenderError, match=r"ends in .svg, .png, .pdf, .html, .tex, .dot, .gv, got '.jpg'"):
        nadhooks.render(graph, tmp_path / "flow.jpg")
    with pytest.raises(RenderError, match="got 'no suffix'"):
        nadhooks.render(graph, tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_other_graphs_and_other_things_are_refused(tmp_path: Path) -> None:
    for graph in (nx.path_graph(3), "graph", None):
        with pytest.raises(RenderError, match=r"expected a graph made by nadhooks.flow_graph"):
            nadhooks.render(graph, tmp_path / "flow.svg")
    with pytest.raises(nadhooks.NadhooksError, match="expected Masks, got str"):
        nadhooks.flow_graph("masks.safetensors")  # type: ignore[arg-type]
    with pytest.raises(RenderError, match="expected a path, got None"):
        nadhooks.render(nadhooks.flow_graph(THREE), None)  # type: ignore[arg-type]


def test_titles_name_models_as_people_do() -> None:
    for given, shown in (
        ("timm:resnet50.a1_in1k,num_classes=3", "timm:resnet50.a1_in1k"),
        ("a/net.py:build", "net.py:build"),
        ("timm.models.vgg.VGG", "VGG"),
    ):
        graph = nadhooks.flow_graph(THREE.replaced(THREE.values, provenance={"model": given}))
        assert f">{shown}, 3 tasks" in to_dot(graph)


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=r"cannot write .*no/flow.svg: No such file or directory"):
        nadhooks.render(nadhooks.flow_graph(THREE), tmp_path / "no" / "flow.svg")
