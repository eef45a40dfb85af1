from __future__ import annotations

import csv
import io
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import networkx as nx
import pytest

import nadhooks
from nadhooks.errors import GraphFileError, RenderError
from nadhooks.formats.gexf import to_gexf
from nadhooks.formats.graphml import from_graphml, to_graphml
from nadhooks.formats.mermaid import to_mermaid
from nadhooks.formats.node_link import from_node_link, to_node_link
from nadhooks.formats.table import to_csv, to_rows

from .test_masks import THREE
from .test_units import planted

GOLDEN = Path(__file__).parent / "golden"


def site_level() -> nx.DiGraph:
    return nadhooks.flow_graph(THREE, ["t0", "t1"])


def odd() -> nx.DiGraph:
    """Names with every sign that a format could take for its own."""
    graph = nx.DiGraph(level="site", tasks=["<i>&\"'", "[not json", "ü,;"], model="#1;")
    graph.add_node("input", kind="input", units=0, kept=0, share=1.0)
    graph.add_node('a<b>&"c:d', kind="site", units=2, kept=1, share=0.5, use=[1.0, 0.0], kept_units={"x": [0]})
    graph.add_edge("input", 'a<b>&"c:d', found="autograd", share=1.0)
    return graph


@pytest.mark.parametrize(
    ("name", "write"), [("graphml", to_graphml), ("json", to_node_link), ("mmd", to_mermaid), ("csv", to_csv)]
)
@pytest.mark.parametrize("level", ["site", "unit"])
def test_texts_are_what_they_were(level: str, name: str, write: object) -> None:
    """The files are read by others; look at what changed, then write them anew with `python -m tests.golden`."""
    graph = site_level() if level == "site" else planted()
    assert write(graph) == (GOLDEN / f"{level}.{name}").read_text(encoding="utf-8")  # type: ignore[operator]


@pytest.mark.parametrize(("write", "read"), [(to_graphml, from_graphml), (to_node_link, from_node_link)])
@pytest.mark.parametrize("make", [site_level, planted, odd])
def test_readers_give_back_what_writers_were_given(write: object, read: object, make: object) -> None:
    graph = make()  # type: ignore[operator]
    again = read(write(graph))  # type: ignore[operator]
    assert again.graph == graph.graph
    assert list(again.nodes(data=True)) == list(graph.nodes(data=True))
    assert list(again.edges(data=True)) == list(graph.edges(data=True))


def test_render_writes_and_read_graph_reads(tmp_path: Path) -> None:
    for suffix in (".json", ".graphml"):
        nadhooks.render(site_level(), tmp_path / f"flow{suffix}")
        assert nx.utils.graphs_equal(nadhooks.read_graph(tmp_path / f"flow{suffix}"), site_level())
    for suffix in (".gexf", ".mmd", ".csv"):
        nadhooks.render(planted(), tmp_path / f"flow{suffix}")
        assert (tmp_path / f"flow{suffix}").read_text()
        with pytest.raises(GraphFileError, match=r"ends in .json, .graphml"):
            nadhooks.read_graph(tmp_path / f"flow{suffix}")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nodes": 3}', "<html/>", '{"nodes": [], "multigraph": true}'])
@pytest.mark.parametrize("suffix", [".json", ".graphml"])
def test_what_is_no_graph_is_refused(tmp_path: Path, suffix: str, text: str) -> None:
    path = tmp_path / f"flow{suffix}"
    path.write_text(text)
    with pytest.raises(GraphFileError, match=r"flow.*expected (node-link JSON|GraphML)"):
        nadhooks.read_graph(path)
    with pytest.raises(GraphFileError, match="cannot read it: No such file"):
        nadhooks.read_graph(tmp_path / f"none{suffix}")


def test_neither_a_deep_text_nor_no_path_ends_in_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "flow.json").write_text("[" * 100_000)
    with pytest.raises(GraphFileError, match="expected node-link JSON"):
        nadhooks.read_graph(tmp_path / "flow.json")
    with pytest.raises(GraphFileError, match="expected the path of"):
        nadhooks.read_graph(None)  # type: ignore[arg-type]


def test_gexf_is_what_gephi_reads_and_the_same_on_any_day() -> None:
    text = to_gexf(planted())
    assert "lastmodified" not in text
    root = ET.fromstring(text)
    space = {"g": root.tag.partition("}")[0][1:]}
    assert len(root.findall(".//g:node", space)) == len(planted())
    weights = [float(edge.get("weight", "nan")) for edge in root.findall(".//g:edge", space)]
    assert weights == pytest.approx([weight for *_, weight in planted().edges(data="weight")])
    nx.read_gexf(io.BytesIO(to_gexf(odd()).encode()))


def test_tables_have_a_row_for_each_node_and_edge() -> None:
    graph = planted()
    rows = list(csv.DictReader(io.StringIO(to_csv(graph))))
    assert len(rows) == len(graph) + graph.number_of_edges() == len(to_rows(graph))
    edge = next(row for row in rows if row["source"] == "a:2" and row["target"] == "b:1")
    assert float(edge["weight"]) == graph.edges["a:2", "b:1"]["weight"]
    assert edge["name"] == ""
    site = next(row for row in csv.DictReader(io.StringIO(to_csv(site_level()))) if row["name"] == "a")
    assert json.loads(site["kept_units"]) == {"t0": [0, 1], "t1": [0, 2]}


def test_mermaid_shows_signs_joins_and_odd_names() -> None:
    text = to_mermaid(planted())
    assert text.startswith("flowchart LR\n")
    assert 'subgraph s0["a"]' in text
    graph = planted()
    u, v = next(iter(graph.edges))
    graph.edges[u, v]["weight"] = -30.0
    assert "linkStyle 0 stroke:#0072b2,stroke-width:6.0px" in to_mermaid(graph)
    assert 'n1["a#60;b#62;#38;#34;c:d<br/>1 / 2"]' in to_mermaid(odd())
    joined = nx.DiGraph()
    joined.add_node("sum 1", kind="join", join="sum")
    assert 'n0(("+"))' in to_mermaid(joined)


def test_mermaid_refuses_more_than_it_draws() -> None:
    graph = nx.complete_graph(40, nx.DiGraph)
    with pytest.raises(RenderError, match="Mermaid draws at most 500 edges, and this graph has 1,560"):
        to_mermaid(graph)


def test_other_graphs_are_refused_by_suffix(tmp_path: Path) -> None:
    with pytest.raises(RenderError, match=r"expected a graph made by nadhooks.flow_graph"):
        nadhooks.render(nx.path_graph(3, nx.DiGraph), tmp_path / "flow.mmd")
