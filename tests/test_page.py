"""The HTML page: what is in it, and what a reader can do with it."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import pytest

import nadhooks
from nadhooks.formats.html import to_html

from .browser import act, needs_browser
from .graphs import chain, site_graph, unit_graph
from .test_masks import THREE

SVG = "{http://www.w3.org/2000/svg}"
PETS = site_graph(
    {"stem": 8, "layer1.0": 8, "layer1.1": 8, "head": 8},
    {
        "cat": {"stem": range(8), "layer1.0": [0, 1, 2], "layer1.1": [4], "head": [0]},
        "dog": {"stem": range(4), "layer1.0": [2, 3], "layer1.1": [5], "head": [0]},
        "eel": {"stem": [7]},
    },
    [("input", "stem"), ("stem", "layer1.0"), ("layer1.0", "layer1.1", "sum"), ("layer1.1", "head"),
     ("stem", "head", "concatenation"), ("head", "output")],
)  # fmt: skip


def test_the_page_asks_no_network_for_anything() -> None:
    for graph in (PETS, unit_graph()):
        page = to_html(graph)
        assert not re.search(r"<link|<script[^>]*src|@import|url\(|fetch\(|XMLHttpRequest|<img [^>]*src", page)
        assert len(page) < 200_000
        assert "Permission to use, copy, modify" in page  # d3's licence goes where d3 goes


def test_names_cannot_leave_the_data() -> None:
    graph = site_graph({"a": 4}, {"</script><script>alert(1)": {"a": [0]}}, [("input", "a"), ("a", "output")], "@JS@")
    page = to_html(graph)
    assert "</script><script>alert" not in page
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data[1])["graph"]["graph"]["tasks"] == ["</script><script>alert(1)"]


def test_masks_bring_all_their_tasks_into_the_page(tmp_path: Path) -> None:
    nadhooks.render(THREE, tmp_path / "flow.html")
    data = re.search(r'id="data">(.*?)</script>', (tmp_path / "flow.html").read_text(), re.S)
    assert data is not None
    assert json.loads(data[1])["bits"] == {"a": "wKAA", "b@input": "gAAA"}  # 1100, 1010, 0000 and 10, 00, 00 in bytes
    nadhooks.render(THREE, tmp_path / "flow.svg")
    nadhooks.render(nadhooks.flow_graph(THREE), tmp_path / "same.svg")
    assert (tmp_path / "flow.svg").read_bytes() == (tmp_path / "same.svg").read_bytes()


def test_graphs_of_hundreds_of_sites_have_a_page() -> None:
    assert to_html(chain(400, 16, "layer.{}"))


@needs_browser
def test_classes_are_switched_and_combined(tmp_path: Path) -> None:
    script = """
    const kept = () => Number(/: (\\d+) of 32 units/.exec(text("headline"))[1]);
    found.all = kept();
    set("mode", "one");
    found.cat = kept();
    set("first", "1");
    found.dog = kept();
    for (const mode of ["over", "union", "intersection", "difference"]) {
      set("mode", mode);
      set("first", "0");
      set("second", "1");
      found[mode] = kept();
    }
    found.legend = text("legend");
    set("mode", "over");
    found.over_legend = text("legend");
    found.colours = drawn.get("layer1.0").paths.map((each) => (each.getAttribute("d").match(/M/g) || []).length);
    found.figure = drawn.get("layer1.0").figure.textContent;
    found.signs = [...layers.marks.querySelectorAll("circle")].map((sign) => sign.getAttribute("stroke"));
    """
    found = act(to_html(PETS), script, tmp_path)
    assert (found["all"], found["cat"], found["dog"]) == (8 + 4 + 2 + 1, 8 + 3 + 1 + 1, 4 + 2 + 1 + 1)
    assert (found["over"], found["union"]) == (15, 15)
    assert found["intersection"] == 4 + 1 + 0 + 1
    assert found["difference"] == 4 + 2 + 1 + 0
    assert "residual sum" in found["legend"]
    assert "cat only" in found["over_legend"]
    assert found["colours"][:4] == [4, 2, 1, 1]  # none, cat only, dog only, both
    assert found["figure"] == "4 / 8"
    assert sorted(found["signs"]) == ["#009e73", "#d55e00"]  # a concatenation and a sum


@needs_browser
def test_two_classes_have_a_colour_each_from_the_beginning(tmp_path: Path) -> None:
    kept = {"cat": {"a": [0, 1, 2]}, "dog": {"a": [2, 3]}}
    graph = site_graph({"a": 8}, kept, [("input", "a"), ("a", "output")])
    script = """
    found.headline = text("headline");
    found.legend = text("legend");
    found.colours = drawn.get("a").paths.map((each) => (each.getAttribute("d").match(/M/g) || []).length);
    """
    found = act(to_html(graph), script, tmp_path)
    assert found["headline"].startswith("cat over dog: 4 of 8 units kept")
    assert "cat only" in found["legend"]
    assert found["colours"][:4] == [4, 2, 1, 1]  # none, cat only, dog only, both


@needs_browser
def test_units_are_hovered_clicked_and_named_and_names_come_back(tmp_path: Path) -> None:
    script = """
    at("layer1.0:2", "pointermove");
    found.tip = text("tip");
    at("layer1.0:2", "click");
    found.card = text("card");
    $("name").value = "whiskers";
    key("Enter", $("name"));
    at("layer1.1:4", "click", { shiftKey: true });
    $("group").value = "pet parts";
    $("keep-group").click();
    found.graph = JSON.parse(graphText());
    found.svg = svgText();
    takeNames(JSON.stringify({ graph: { unit_names: { "head:0": "pet" } } }));
    found.labels = [...layers.light.querySelectorAll("text")].map((each) => each.textContent);
    """
    found = act(to_html(PETS), script, tmp_path)
    assert found["tip"] == "layer1.0:2\nkept by 2 of 3 classes"
    assert "cat, dog" in found["card"]
    assert found["labels"] == ["whiskers", "pet"]
    back = nx.node_link_graph(found["graph"], edges="edges")
    assert back.graph["unit_names"] == {"layer1.0:2": "whiskers"}
    assert back.graph["groups"] == {"pet parts": ["layer1.0:2", "layer1.1:4"]}
    assert back.nodes["stem"] == PETS.nodes["stem"]
    texts = {text.text for text in ET.fromstring(found["svg"].encode()).iter(f"{SVG}text")}
    assert {"whiskers", "stem", "input"} <= texts
    again = act(
        to_html(back),
        'type("search", "whisk"); found.card = text("card"); found.group = Object.keys(groups);',
        tmp_path,
    )
    assert again["card"].startswith("layer1.0:2")
    assert again["group"] == ["pet parts"]


@needs_browser
def test_search_slider_and_keys_lead_through_the_graph(tmp_path: Path) -> None:
    script = """
    type("search", "layer1");
    found.search = text("card");
    set("mode", "one");
    found.edges = visible();
    type("threshold", "50");
    found.strong = visible();
    type("threshold", "0");
    svg.focus();
    key("Escape", document.activeElement);
    for (const name of ["ArrowRight", "ArrowRight", "ArrowRight", "ArrowDown", "ArrowDown"]) key(name, svg);
    found.walked = state.chosen;
    key("/", svg);
    found.focus = document.activeElement.id;
    key("Escape", document.activeElement);
    found.nothing = state.chosen;
    const scale = () => d3.zoomTransform(svg).k;
    found.before = scale();
    key("+", svg);
    found.after = scale();
    key("0", svg);
    found.fitted = scale();
    send(svg, new WheelEvent("wheel", { deltaY: -200, clientX: 400, clientY: 300, cancelable: true, view: window }));
    found.wheeled = scale();
    """
    found = act(to_html(PETS), script, tmp_path)
    assert found["search"].startswith("layer1.0")
    assert (found["edges"], found["strong"]) == (6, 3)  # the cat keeps 1, 3/8, 1/8, 1/8 of the sites in a row
    assert found["walked"] == ["layer1.0:1"]
    assert found["focus"] == "search"
    assert found["nothing"] == []
    assert found["after"] == pytest.approx(1.4 * found["before"])
    assert found["fitted"] == pytest.approx(found["before"])
    assert found["wheeled"] > found["fitted"]


@needs_browser
def test_units_of_a_unit_graph_show_their_edges(tmp_path: Path) -> None:
    graph = unit_graph(3, 8, 3, regions=2)
    graph.nodes["layer.1:2"].update(
        sees=[{"image": 7, "label": "cat", "activation": 1.5, "crop": "data:image/png;base64,iVBORw0KGgo="}],
        activation={"cat": 1.0, "dog": -0.25},
    )
    script = """
    at("layer.1:2", "click");
    found.card = text("card");
    found.images = $("card").querySelectorAll("img").length;
    found.lit = layers.light.querySelectorAll(".edge").length;
    found.headline = text("headline");
    type("threshold", "90");
    found.fewer = text("headline");
    key("ArrowDown", svg);
    found.next = state.chosen;
    at("input:1,1", "pointermove");
    found.tip = text("tip");
    """
    found = act(to_html(graph), script, tmp_path)
    assert "attribution" in found["card"]
    assert "mean activation by class" in found["card"]
    assert found["images"] == 1
    assert found["lit"] == 3 + 3
    assert "36 of 36 edges shown" in found["headline"]
    assert "3 of 36 edges shown" in found["fewer"]
    assert found["next"] == ["layer.1:4"]
    assert found["tip"] == "input:1,1"


@needs_browser
def test_graphs_of_what_one_class_has_and_another_lacks_say_so(tmp_path: Path) -> None:
    graph = site_graph({"a": 4}, {"3": {"a": [0, 1]}, "8": {}}, [("input", "a"), ("a", "output")], combine="difference")
    script = """
    found.headline = text("headline");
    found.colours = drawn.get("a").paths.map((each) => (each.getAttribute("d").match(/M/g) || []).length);
    """
    found = act(to_html(graph), script, tmp_path)
    assert found["headline"] == "torchvision:net, task 3 without 8: 2 of 4 units kept"
    assert found["colours"][0] == 2
    assert found["colours"][5] == 2
