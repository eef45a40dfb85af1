from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

import nadhooks
from nadhooks import analysis
from nadhooks.errors import RenderError, TaskError
from nadhooks.formats import mask_file
from nadhooks.formats.dot import to_dot
from nadhooks.formats.scene import BOTH, FAINT, TASKS
from nadhooks.masks import Masks

from .strangers import encoded, header_and_tensors
from .test_masks import THREE, masks


def test_flow_graphs_say_what_a_task_keeps() -> None:
    graph = nadhooks.flow_graph(THREE, "t0")
    assert list(graph) == ["input", "a", "b@input", "output"]
    assert graph.nodes["a"] == {
        "kind": "site", "stage": 1, "module": "a", "units": 4, "kept": 2, "share": 0.5, "use": [1, 1, 0, 0],
        "sharing": [1, 1, 0, 0], "kept_units": {"t0": [0, 1]}, "join": "sequential",
    }  # fmt: skip
    assert graph.graph == {"level": "site", "tasks": ["t0"], "combine": "union", "model": ""}
    assert graph.nodes["b@input"]["kept"] == 1
    assert [graph.nodes[node]["stage"] for node in graph] == [0, 1, 2, 3]
    assert graph.edges["a", "b@input"]["share"] == 0.5
    assert graph.graph["tasks"] == ["t0"]
    assert all({"units", "kept"} <= data.keys() for _, data in graph.nodes(data=True))


def test_all_tasks_over_each_other() -> None:
    graph = nadhooks.flow_graph(THREE)
    assert graph.nodes["a"]["kept"] == 3
    assert graph.nodes["a"]["use"] == pytest.approx([2 / 3, 1 / 3, 1 / 3, 0])


def test_several_tasks_are_united_intersected_and_subtracted() -> None:
    def kept(*tasks: str, combine: Any) -> list[float]:
        return nadhooks.flow_graph(THREE, list(tasks), combine=combine).nodes["a"]["use"]

    assert kept("t0", "t1", combine="union") == [1, 0.5, 0.5, 0]
    assert kept("t0", "t1", combine="intersection") == [1, 0, 0, 0]
    assert kept("t0", "t1", combine="difference") == [0, 1, 0, 0]
    assert kept("t1", "t0", combine="difference") == [0, 0, 1, 0]
    assert kept("t0", "t1", "t2", combine="intersection") == [0, 0, 0, 0]
    assert kept("t0", combine="difference") == [1, 1, 0, 0]
    graph = nadhooks.flow_graph(THREE, ["t1", "t0"], combine="difference")
    assert graph.nodes["a"]["kept"] == 1
    assert graph.nodes["a"]["sharing"] == [2, 1, 1, 0]
    assert graph.nodes["a"]["kept_units"] == {"t1": [0, 2], "t0": [0, 1]}
    assert graph.graph["tasks"] == ["t1", "t0"]
    with pytest.raises(nadhooks.NadhooksError, match="combine: expected 'union'"):
        nadhooks.flow_graph(THREE, combine="sum")  # type: ignore[arg-type]


def test_graphs_of_many_tasks_do_not_list_every_unit_of_each() -> None:
    many = masks([[1, 0, 0, 1]] * 33, [[1, 0]] * 33)
    assert "kept_units" not in nadhooks.flow_graph(many).nodes["a"]
    assert "kept_units" in nadhooks.flow_graph(many, list(range(32))).nodes["a"]
    assert nadhooks.flow_graph(many).nodes["a"]["sharing"] == [33, 0, 0, 33]


def joined(wiring: nx.DiGraph) -> Masks:
    sites = tuple(nadhooks.Site(name, 1, 2, name) for name in wiring if name not in ("input", "output"))
    values = {site.name: THREE["b@input"][:1] for site in sites}
    return Masks(sites, values, nadhooks.tasks.Tasks.of(1), wiring)


def test_joins_stand_before_what_they_feed_and_are_shared() -> None:
    wiring = nx.DiGraph()
    wiring.add_nodes_from(["input", "a", "b", "c", "d", "output"])
    plain = {"join": "sequential", "arrives": "sequential", "found": "autograd"}
    summed = {"join": "sum", "arrives": "sum", "found": "autograd"}
    gated = {"join": "product", "arrives": "sum", "found": "autograd"}
    wiring.add_edge("input", "a", **plain)
    wiring.add_edge("a", "b", **plain)
    wiring.add_edges_from([("a", "c", summed), ("b", "c", gated), ("a", "d", summed), ("b", "d", summed)])
    wiring.add_edges_from([(node, "output", summed) for node in ("a", "b", "c")])
    wiring.add_edge("d", "output", **{**summed, "arrives": "sum"})
    graph = nadhooks.flow_graph(joined(wiring), joins=True)
    assert set(graph.edges) == {
        ("input", "a"), ("a", "b"), ("a", "sum 1"), ("b", "sum 1"), ("sum 1", "c"), ("sum 1", "d"),
        ("sum 1", "sum 2"), ("c", "sum 2"), ("d", "sum 2"), ("sum 2", "output"),
    }  # fmt: skip
    assert graph.edges["b", "sum 1"]["join"] == "product"
    assert graph.nodes["sum 1"] == {
        "kind": "join", "join": "sum", "units": 0, "kept": 0, "share": 0.5, "stage": 3,
    }  # fmt: skip
    assert graph.edges["sum 1", "c"] == {"found": "join", "join": "sum", "share": 0.5}
    assert [graph.nodes[node]["stage"] for node in ("a", "b", "sum 1", "c", "sum 2", "output")] == [1, 2, 3, 4, 5, 6]
    without = nadhooks.flow_graph(joined(wiring))
    assert list(without) == ["input", "a", "b", "c", "d", "output"]
    assert without.nodes["c"]["join"] == "sum"
    assert without.edges["b", "c"] == {"found": "autograd", "join": "product", "share": 0.5}


def test_joins_keep_residual_graphs_linear() -> None:
    for number in (20, 100):
        names = [f"b{index}" for index in range(number)]
        wiring = nx.DiGraph()
        wiring.add_nodes_from(["input", *names, "output"])
        wiring.add_edge("input", "b0")
        for index in range(1, number + 1):
            target = "output" if index == number else names[index]
            wiring.add_edges_from([(source, target, {"join": "sum", "arrives": "sum"}) for source in names[:index]])
        assert nadhooks.flow_graph(joined(wiring)).number_of_edges() > number * number / 2
        assert nadhooks.flow_graph(joined(wiring), joins=True).number_of_edges() <= 3 * number


def test_wiring_from_before_joins_were_known_still_makes_graphs() -> None:
    wiring = nx.DiGraph([("input", "a"), ("input", "b"), ("a", "c"), ("b", "c"), ("c", "output")])
    graph = nadhooks.flow_graph(joined(wiring), joins=True)
    assert set(graph.edges) == set(wiring.edges)
    assert {data["join"] for *_, data in graph.edges(data=True)} == {"sequential"}


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


def test_two_classes_have_a_colour_each_in_dot_too() -> None:
    text = to_dot(nadhooks.flow_graph(THREE, ["t0", "t1"]))  # a: {0,1} and {0,2}; b: {0} and {}
    assert [text.count(f'BGCOLOR="{colour}"') for colour in (*TASKS, BOTH, FAINT)] == [1 + 2, 1 + 1, 1 + 1, 1 + 2]
    assert all(f">{words}</FONT>" in text for words in ("t0 only", "t1 only", "both", "kept by neither"))
    assert ">dropped</FONT>" in to_dot(nadhooks.flow_graph(THREE, ["t0", "t1"], combine="difference"))


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
    with pytest.raises(RenderError, match=r"ends in .svg, .png, .pdf, .html, .tex, .dot, .gv, .json, .*, got '.jpg'"):
        nadhooks.render(graph, tmp_path / "flow.jpg")
    with pytest.raises(RenderError, match="got 'no suffix'"):
        nadhooks.render(graph, tmp_path / "flow")
    assert not list(tmp_path.iterdir())


def test_other_graphs_and_other_things_are_refused(tmp_path: Path) -> None:
    others: list[tuple[Any, str]] = [
        (nx.path_graph(3), "got a Graph"),
        (nx.path_graph(3, nx.DiGraph), "got one whose node 0 has no 'kind'"),
        (nx.DiGraph(), "got an empty one"),
        ("graph", "got a str"),
        (None, "got a NoneType"),
    ]
    for graph, got in others:
        for suffix in ("svg", "html", "dot"):
            with pytest.raises(RenderError, match=rf"expected a graph made by nadhooks.flow_graph, {got}$"):
                nadhooks.render(graph, tmp_path / f"flow.{suffix}")
        for analyse in (analysis.bottlenecks, analysis.hubs, analysis.max_flow, nadhooks.collapse):
            with pytest.raises(nadhooks.NadhooksError, match=f"{got}$"):
                analyse(graph)
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


def test_words_that_a_file_has_for_edges_of_its_own_are_no_obstacle(tmp_path: Path) -> None:
    header, tensors = header_and_tensors(mask_file.to_bytes(THREE.parts()))
    header["wiring"][0] |= {"u_of_edge": "x", "v_of_edge": "y", "arrives": "weird", "join": "odd", "weight": "abc"}
    (tmp_path / "odd").write_bytes(encoded(header, tensors))
    graph = nadhooks.flow_graph(nadhooks.load(tmp_path / "odd"), "t0", joins=True)
    assert graph.edges["input", "a"]["join"] == graph.nodes["a"]["join"] == "sequential"
    for suffix in ("svg", "html", "mmd", "dot", "csv", "graphml"):
        nadhooks.render(graph, tmp_path / f"odd.{suffix}")
