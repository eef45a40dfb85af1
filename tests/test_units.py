from __future__ import annotations

import json
import math
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks.errors import DataError, ModelError, NadhooksError, SiteError, TaskError
from nadhooks.masks import Masks
from nadhooks.tasks import Tasks

from .nets import Lean, Line, Split, images, seeded, vectors
from .test_wiring import Hard


class Planted(nn.Module):
    """Two linear layers and a head with weights that are known, ReLUs between, and a shortcut around the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 2)
        with torch.no_grad():
            self.a.weight.copy_(torch.tensor([[1.0, 0], [0, 2], [1, 1]]))
            self.a.bias.copy_(torch.tensor([0.5, 0, 0]))
            self.b.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 3], [0, -1, 0]]))
            self.b.bias.copy_(torch.tensor([0, 0.25, 10]))
            self.head.weight.copy_(torch.tensor([[1.0, 2, 0], [0, 1, -1]]))
            self.head.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        a = self.a(x).relu_()
        return self.head(self.b(a).relu() + a)


def masks_of(model: nn.Module, sites: object, example: Tensor, dropped: dict[str, list[int]] | None = None) -> Masks:
    """Masks of one task, label 0, that keep everything but the named units."""
    with nadhooks.attach(model, sites, example=example) as gates:  # type: ignore[arg-type]
        values = {site.name: torch.ones(1, site.units, dtype=torch.float64) for site in gates.sites}
        for name, units in (dropped or {}).items():
            values[name][0, units] = 0
        return gates.masks_of(Tasks.of(1), values, {"model": "test"})


def weights(graph: nx.DiGraph) -> dict[tuple[str, str], float]:
    return nx.get_edge_attributes(graph, "weight")


X = torch.tensor([[1.0, 2.0], [3.0, 1.0]], dtype=torch.float64)
EVERYTHING: dict[str, Any] = {"nodes": 1, "edges": 1}


def planted(dropped: dict[str, list[int]] | None = None, **more: Any) -> nx.DiGraph:
    model = Planted().double()
    return nadhooks.unit_flow(model, masks_of(model, ["a", "b"], X, dropped), 0, X, **EVERYTHING, **more)


def test_every_planted_edge_is_found_with_its_value_and_no_other() -> None:
    # a: (1.5, 4, 3) and (3.5, 2, 4), positive; b before its ReLU: a0, 3 a2 + 0.25 and 10 − a1, positive too, so that
    # the site b is those; logit 0 = (b0 + a0) + 2 (b1 + a1)
    found = weights(planted())
    expected = {
        ("input", "a:0"): 2 * 2.0,  # mean x0 = 2; to the logit through a0 with 1 (b0) and 1 (the shortcut) … class 0
        ("input", "a:1"): 2 * 2 * 1.5,
        ("input", "a:2"): 2 * 3 * (2 + 1.5),
        ("a:bias", "a:0"): 2 * 0.5,
        ("a:0", "b:0"): 2.5,
        ("a:2", "b:1"): 2 * 3 * 3.5,
        ("b:bias", "b:1"): 2 * 0.25,
        ("a:0", "output"): 2.5,
        ("a:1", "output"): 2 * 3.0,
        ("b:0", "output"): 2.5,
        ("b:1", "output"): 2 * (3 * 3.5 + 0.25),
    }
    assert found == pytest.approx(expected, abs=1e-12)


def test_pooled_edges_are_changes_of_the_mean_activation() -> None:
    found = weights(planted(weighting="pooled"))
    assert found["a:0", "b:0"] == pytest.approx(2.5)
    assert found["a:2", "b:1"] == pytest.approx(3 * 3.5)
    assert ("a:1", "b:2") not in found  # b:2 leads nowhere in class 0
    assert found["input", "a:2"] == pytest.approx(3.5)


def test_a_mask_takes_its_dropped_units_out_of_the_flow() -> None:
    graph = planted({"a": [2], "b": [0]})
    assert {"a:2", "b:0"}.isdisjoint(graph)
    found = weights(graph)
    assert found["a:0", "output"] == pytest.approx(2.5)
    assert ("a:0", "b:0") not in found
    assert found["b:bias", "b:1"] == pytest.approx(0.5)
    assert not list(graph.predecessors("b:bias"))
    assert graph.graph["sites"]["a"] == {"units": 3, "kept": 2, "stage": 1, "shown": 2, "coverage": 1.0}


def test_where_nothing_flows_a_warning_says_why_at_the_users_line() -> None:
    model = Planted().double()
    for dropped in ({"head": [0]}, {"a": [0, 1, 2], "b": [0, 1, 2]}):
        masks = masks_of(model, ["a", "b", "head"], X, dropped)
        with pytest.warns(UserWarning, match="no edges: .* adds nothing .* without the classifier") as said:
            graph = nadhooks.unit_flow(model, masks, 0, X, **EVERYTHING)
        assert not graph.number_of_edges()
        assert [each.filename for each in said] == [__file__]


@pytest.mark.filterwarnings("ignore:no edges")
def test_the_mean_as_reference_leaves_only_what_differs_from_it() -> None:
    found = weights(planted(reference="mean"))  # over the two images: every difference cancels in the average
    assert all(abs(weight) < 1e-12 for edge, weight in found.items() if "bias" not in edge[0])
    one = nadhooks.unit_flow(
        (model := Planted().double()), masks_of(model, ["a", "b"], X), 0, X[:1], reference="mean", **EVERYTHING
    )
    assert all(abs(weight) < 1e-12 for weight in weights(one).values())  # a single image is its own mean


def test_masks_whose_closed_units_put_out_means_refer_to_those() -> None:
    model = Planted().double()
    with nadhooks.attach(model, ["a", "b"], example=X) as gates:
        gates.calibrate([X, torch.zeros_like(X)])
        masks = gates.masks()
    graph = nadhooks.unit_flow(model, masks, 0, X, **EVERYTHING)
    assert graph.graph["reference"] == "mean"
    assert weights(graph)["a:0", "b:0"] == pytest.approx(2.5 - (2.5 + 0.5) / 2)


def test_masks_whose_closed_units_put_out_constants_of_the_tasks_own_refer_to_those() -> None:
    model = Planted().double()
    with nadhooks.attach(model, ["a", "b"], tasks=2, example=X) as gates:
        constants = {site.name: torch.tensor([[0.25], [9.0]]).expand(2, site.units) for site in gates.sites}
        zero = gates.masks()
        masks = gates.masks_of(zero.task_rows, zero.values, {}, constants)
    graph = nadhooks.unit_flow(model, masks, 0, X, **EVERYTHING)
    assert graph.graph["reference"] == "optimal"
    assert weights(graph)["a:0", "b:0"] == pytest.approx(2.5 - 0.25)
    with pytest.raises(NadhooksError, match="reference: expected 'zero', 'mean' or what closed units put out"):
        nadhooks.unit_flow(model, zero, 0, X, reference="optimal", **EVERYTHING)


def test_graphs_say_what_they_are_in_plain_values() -> None:
    graph = planted()
    json.dumps(nx.node_link_data(graph, edges="edges"))
    assert graph.graph["level"] == "unit"
    assert graph.graph["tasks"] == ["0"]
    assert graph.graph["logit"] == pytest.approx(2.5 + 2.5 + 2 * (10.75 + 3))
    assert graph.nodes["a:1"] == {
        "kind": "unit", "stage": 1, "site": "a", "unit": 1,
        "attribution": pytest.approx(6.0), "outflow": pytest.approx(6.0),
    }  # fmt: skip
    assert graph.nodes["output"] == {"kind": "output", "stage": 3}
    assert next(iter(graph)) == "input"
    assert list(graph)[-1] == "output"
    assert nx.is_directed_acyclic_graph(graph)


def test_what_flows_into_a_unit_is_what_it_is_worth() -> None:
    model = seeded(Line)
    masks = masks_of(model, ["act1", "act2"], images(), {"act1": [1]})
    for estimator in ("gradient", "midpoint"):
        graph = nadhooks.unit_flow(model, masks, 0, images(), estimator=estimator, **EVERYTHING)
        for node, data in graph.nodes(data=True):
            if data["kind"] == "unit":
                inflow = math.fsum(edge["weight"] for *_, edge in graph.in_edges(node, data=True))
                assert inflow == pytest.approx(data["attribution"], abs=1e-12)


@pytest.mark.parametrize("estimator", ["gradient", "midpoint"])
def test_what_flows_out_of_a_unit_is_its_attribution(estimator: Any) -> None:
    model = seeded(Split)
    masks = masks_of(model, ["stem", "left", "right"], vectors(), {"left": [1]})
    graph = nadhooks.unit_flow(model, masks, 0, vectors(), estimator=estimator, **EVERYTHING)
    pruned = nadhooks.unit_flow(model, masks, 0, vectors(), estimator=estimator, nodes=0.6, edges=0.6)
    for node, data in graph.nodes(data=True):
        if data["kind"] == "unit":
            outflow = math.fsum(edge["weight"] for *_, edge in graph.out_edges(node, data=True))
            assert outflow == pytest.approx(data["outflow"], abs=1e-12)
            if estimator == "gradient":
                assert outflow == pytest.approx(data["attribution"], abs=1e-12)
            if node in pruned:
                assert pruned.nodes[node]["outflow"] == pytest.approx(outflow, abs=1e-12)
    assert len(pruned) < len(graph)


def test_paths_through_other_sites_do_not_count() -> None:
    model = seeded(Split)
    masks = masks_of(model, ["stem", "left", "join"], vectors())
    found = weights(nadhooks.unit_flow(model, masks, 0, vectors(), estimator="midpoint", **EVERYTHING))
    x = model.stem(vectors()).detach()
    for unit in range(6):
        closed = x.clone()
        closed[:, unit] = 0
        left = model.left(x).relu()  # held
        change = model.join(left + model.right(x).relu() + x) - model.join(left + model.right(closed).relu() + closed)
        assert found[f"stem:{unit}", "join:0"] == pytest.approx(float(change[:, 0].mean().detach()), abs=1e-12)


class Gated(nn.Module):
    """A product of two branches, as in squeeze-and-excite."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.gate, self.out = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x * self.gate(x).sigmoid())


def test_products_take_the_midpoint_and_say_what_closing_does() -> None:
    model, x = seeded(Gated), vectors()
    masks = masks_of(model, ["stem"], x)
    graph = nadhooks.unit_flow(model, masks, 0, x, estimator=None, **EVERYTHING)
    assert graph.graph["estimator"] == "midpoint"
    line = nadhooks.unit_flow(seeded(Line), masks_of(seeded(Line), ["act1"], images()), 0, images(), estimator=None)
    assert line.graph["estimator"] == "gradient"
    with nadhooks.attach(model, ["stem"], example=x) as gates, torch.no_grad():
        for unit in range(5):
            before = model(x)[:, 0].mean()
            with gates.close("stem", unit):
                change = float(before - model(x)[:, 0].mean())
            assert weights(graph)[f"stem:{unit}", "output"] == pytest.approx(change, abs=1e-12)
    gradient = nadhooks.unit_flow(model, masks, 0, x, estimator="gradient", **EVERYTHING)
    assert gradient.graph["estimator"] == "gradient"
    assert weights(gradient)["stem:0", "output"] != pytest.approx(weights(graph)["stem:0", "output"], abs=1e-6)


class Square(nn.Module):
    """A logit of (a0 + a1)² + 14 a1, and another of nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.a.weight.copy_(torch.eye(2))
            self.b.weight.copy_(torch.tensor([[1.0, 1], [0, 1]]))

    def forward(self, x: Tensor) -> Tensor:
        b = self.b(self.a(x))
        return torch.stack([b[:, 0] ** 2 + 14 * b[:, 1], torch.zeros_like(b[:, 0])], 1)


def test_edges_hold_where_the_logit_bends() -> None:
    model = Square().double()  # b: (3, 2) and (4, 1), which adds 9 + 28 and 16 + 14; half of 2 b0² to first order
    graph = nadhooks.unit_flow(model, masks_of(model, ["a", "b"], X), 0, X, **EVERYTHING)
    found = weights(graph)
    assert found["b:0", "output"] == pytest.approx((9 + 16) / 2)
    assert found["a:0", "b:0"] == pytest.approx((9 - 4 + 16 - 1) / 2)
    assert found["a:1", "b:0"] == pytest.approx((9 - 1 + 16 - 9) / 2)
    assert graph.nodes["b:0"]["attribution"] == pytest.approx((9 + 16) / 2)
    proof = nadhooks.verify(model, masks_of(model, ["a", "b"], X), graph, X)
    assert proof.units.said == pytest.approx(proof.units.measured)
    assert proof.paths.said == pytest.approx(proof.paths.measured)
    pooled = nadhooks.unit_flow(model, masks_of(model, ["a", "b"], X), 0, X, weighting="pooled", **EVERYTHING)
    assert weights(pooled)["a:0", "b:0"] == pytest.approx((1 + 3) / 2)


def test_where_the_logit_bends_units_are_chosen_by_what_closing_them_did() -> None:
    model = Square().double()
    masks = masks_of(model, ["a", "b"], X)
    graph = nadhooks.unit_flow(model, masks, 0, X, nodes=0.5, edges=1, batch=1)
    assert {"b:0", "b:1"} & set(graph) == {"b:1"}  # b0 would be 25 to first order, and is 12.5; b1 is 21
    assert graph.graph["sites"]["b"]["coverage"] == pytest.approx(21 / 33.5)
    assert weights(graph)["a:1", "b:1"] == pytest.approx(21)
    whole = nadhooks.unit_flow(model, masks, 0, X, **EVERYTHING)
    for node in ("a:1", "b:1"):
        assert graph.nodes[node] == pytest.approx(whole.nodes[node])
    assert "b:bias" not in graph


def test_image_regions_feed_units_and_add_up_to_the_whole_input() -> None:
    model, x = seeded(Line), images()
    masks = masks_of(model, ["act1"], x)
    for estimator in ("gradient", "midpoint"):
        whole = weights(nadhooks.unit_flow(model, masks, 0, x, regions=1, estimator=estimator, **EVERYTHING))
        parts = nadhooks.unit_flow(model, masks, 0, x, regions=(3, 2), estimator=estimator, **EVERYTHING)
        place = parts.nodes["input:2,1"]
        assert [place[key] for key in ("row", "column", "rows", "columns", "kind", "stage")] == [2, 1, 3, 2, "input", 0]
        regions = [weight for (source, v), weight in weights(parts).items() if v == "act1:0" and "input" in source]
        if estimator == "gradient":
            assert math.fsum(regions) == pytest.approx(whole["input", "act1:0"], abs=1e-12)
    alone = x.clone()
    alone[..., :2, :3] = 0  # region 0,0
    change = (model.act1(model.conv1(x)) - model.act1(model.conv1(alone))).detach()
    pooled = nadhooks.unit_flow(model, masks, 0, x, regions=(3, 2), weighting="pooled", **EVERYTHING)
    assert weights(pooled)["input:0,0", "act1:0"] == pytest.approx(float(change[:, 0].mean()), abs=1e-12)


def test_batches_and_their_size_change_nothing() -> None:
    model, x = seeded(Line), images(7)
    masks = masks_of(model, ["act1", "act2"], x)
    for estimator in ("gradient", "midpoint"):
        one, many = (
            weights(nadhooks.unit_flow(model, masks, 0, x, estimator=estimator, batch=batch, **EVERYTHING))
            for batch in (7, 3)
        )
        assert one == pytest.approx(many, abs=1e-12)


def test_coverage_and_top_choose_the_strongest() -> None:
    model, x = seeded(Line), images()
    masks = masks_of(model, ["act1", "act2"], x)
    whole = nadhooks.unit_flow(model, masks, 0, x, **EVERYTHING)
    few = nadhooks.unit_flow(model, masks, 0, x, nodes=0.5, top=2)
    worth = {node: abs(data["attribution"]) for node, data in whole.nodes(data=True) if data["kind"] == "unit"}
    shown = {node for node, data in few.nodes(data=True) if data["kind"] == "unit" and data["site"] == "act2"}
    of_site = {node: value for node, value in worth.items() if node.startswith("act2")}
    assert min(of_site[node] for node in shown) >= max(of_site[node] for node in of_site.keys() - shown)
    covered = sum(of_site[node] for node in shown)
    assert covered - min(of_site[node] for node in shown) < 0.5 * sum(of_site.values()) <= covered
    assert max(degree for _, degree in few.in_degree()) == 2
    pruned = nadhooks.unit_flow(model, masks, 0, x, nodes=1, edges=0.6)
    for node in shown:
        into = sorted((abs(w) for (_, v), w in weights(whole).items() if v == node), reverse=True)
        kept = sorted((abs(w) for (_, v), w in weights(pruned).items() if v == node), reverse=True)
        assert kept == pytest.approx(into[: len(kept)])
        assert sum(kept[:-1]) < 0.6 * sum(into) <= sum(kept)


def test_the_strongest_path_is_listed_first_with_its_part_of_the_logit() -> None:
    graph = planted()
    first = graph.graph["paths"][0]
    assert first["nodes"] == ["input", "a:2", "b:1", "output"]
    assert first["weight"] == pytest.approx(21.5 * (21 / 21.5) * 1.0)
    strengths = [abs(path["weight"]) for path in graph.graph["paths"]]
    assert strengths == sorted(strengths, reverse=True)
    assert sum(path["weight"] for path in graph.graph["paths"]) == pytest.approx(graph.graph["logit"] - 0.5 - 1)


def test_the_model_is_left_as_found() -> None:
    model = Planted().double().train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    nadhooks.unit_flow(model, masks_of(model, ["a", "b"], X), 0, X, estimator="midpoint")
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def test_what_cannot_be_asked_is_said() -> None:
    model = Planted().double()
    masks = masks_of(model, ["a", "b"], X)
    with pytest.raises(ModelError, match=r"expected a torch.nn.Module, got NoneType"):
        nadhooks.unit_flow(None, masks, 0, X)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="images of the task"):
        nadhooks.unit_flow(model, masks, 0, [1, 2])  # type: ignore[arg-type]
    with pytest.raises(TaskError, match="unknown task 7"):
        nadhooks.unit_flow(model, masks, 7, X)
    for wrong in ({"nodes": 0}, {"edges": 2}, {"top": 0}, {"weighting": "sum"}, {"estimator": "ig"},
                  {"reference": "noise"}, {"regions": 0}):  # fmt: skip
        with pytest.raises(NadhooksError, match=f"^{next(iter(wrong))}: expected"):
            nadhooks.unit_flow(model, masks, 0, X, **wrong)
    with pytest.raises(DataError, match="finite numbers, got NaN or infinity"):
        nadhooks.unit_flow(model, masks, 0, X * torch.tensor([[1.0], [torch.nan]]))
    with nadhooks.attach(model, ["a"], tasks={9: "nine"}, example=X) as gates:
        other = gates.masks()
    with pytest.raises(TaskError, match="nine is not an output of the model, which has 0 to 1"):
        nadhooks.unit_flow(model, other, "nine", X)


def test_masks_of_another_model_with_the_same_sites_are_refused() -> None:
    x = images()
    model, other = seeded(Line), seeded(Lean)
    masks = masks_of(model, ["act1", "act2"], x)
    graph = nadhooks.unit_flow(model, masks, 0, x)
    told = r"do not fit this model: act1: expected .* behind 76 parameters, found 12 \(and 1 more\)"
    with pytest.raises(SiteError, match=told):
        nadhooks.unit_flow(other, masks, 0, x)
    with pytest.raises(SiteError, match=told):
        nadhooks.verify(other, masks, graph, x)


def test_sites_that_fire_twice_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(self.b(self.a(x)))

    model = Twice().double()
    with pytest.raises(SiteError, match="a: it fires more than once"):
        nadhooks.unit_flow(model, masks_of(model, ["a", "b"], vectors()), 0, vectors())


def test_closing_sees_through_what_no_gradient_passes() -> None:
    model, x = seeded(Hard), vectors()
    masks = masks_of(model, ["a", "b"], x)
    found = weights(nadhooks.unit_flow(model, masks, 0, x, estimator=None, **EVERYTHING))
    signs = model.a(x).detach() > 0
    for unit in range(4):
        closed = torch.where(signs, x, -x).index_copy(1, torch.tensor([unit]), -x[:, [unit]])  # 0 is not above 0
        change = (model.b(torch.where(signs, x, -x)) - model.b(closed))[:, 0].mean()
        assert found.get((f"a:{unit}", "b:0"), 0.0) == pytest.approx(float(change.detach()), abs=1e-12)
    assert any(source.startswith("a:") for source, _ in found)


def test_progress_ends_where_it_said() -> None:
    calls: list[tuple[int, int]] = []
    model, x = seeded(Line), images(5)
    masks = masks_of(model, ["act1", "act2"], x)
    for estimator in ("gradient", "midpoint"):
        calls.clear()
        nadhooks.unit_flow(
            model, masks, 0, x, batch=3, estimator=estimator, progress=lambda done, total: calls.append((done, total))
        )
        assert calls[-1][0] == calls[-1][1] > 0
        assert [done for done, _ in calls] == sorted(done for done, _ in calls)
