"""Unit-level flow: which unit of one site feeds which of the next, and how much of a class's logit passes there."""

from __future__ import annotations

import heapq
import math
import warnings
from collections.abc import Callable
from typing import Any

import networkx as nx
from torch import Tensor, nn

from .default_device import made_on_cpu
from .effects import Effects, Estimator, Setting, Weighting, setting
from .errors import NadhooksError
from .gating import Closed
from .graphs import FlowGraph
from .masks import Masks
from .measuring import estimator_of, measure
from .wiring import INPUT, OUTPUT

Key = tuple[str, int]  # a site and a unit of it; the bias of a site is unit -1
BIAS = -1
ROUNDING = 1e-9  # a remainder below this share of what it remains of is none
NO_EDGES = (
    "no edges: what this mask lets through adds nothing to the logit on an average of the images; learn one that keeps "
    "more, or choose sites without the classifier, whose own unit for the task may be closed"
)


@made_on_cpu
def unit_flow(
    model: nn.Module,
    masks: Masks,
    task: object,
    images: Tensor,
    *,
    weighting: Weighting = "class",
    reference: Closed | None = None,
    estimator: Estimator | None = "midpoint",
    nodes: float = 0.8,
    edges: float = 0.98,
    top: int | None = None,
    regions: int | tuple[int, int] = 4,
    paths: int = 10,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> nx.DiGraph:
    """The flow of one class from unit to unit: direct effects in the class's sub-architecture, averaged over images.

    The task's hard gates are in force: units that its mask drops put out zero (or their mean) throughout and are no
    nodes, so the graph explains what the sub-architecture computes, not what the whole network does.

    images: (images, channels, height, width) of the task, as the model takes them. task: name or label, which is the
        model's output that is explained.
    weighting: "class", e(u→v) = Σ_p ∂logit/∂z_v(p) · Δ_u z_v(p), how much u adds to the logit through v; or "pooled",
        by how much u raises v's mean activation. Δ_u z_v is the change of v's activation when u goes from the reference
        to what it is, on direct ways: every other site keeps its value. The two hardly correlate. With the midpoint,
        class-weighted edges have a second-order term besides: t² · b_v, image by image, where b_v is what closing v
        does to the logit beyond ∂logit/∂z_v · Δz_v, and t the share that Δ_u z_v is of v's own Δz_v.
    reference: "zero", "mean" or, of masks that have it, "optimal"; by default what closed units of the masks put out.
        Where masks have no means, the units' means over `images`. Of the input: zero, or each channel's mean.
    estimator: "midpoint" (default), the difference quotient around gate ½ over the gate's whole range, which is what
        closing u changes, exactly, at one pass through the segment for each source; "gradient", Δ to first order, at
        one vector-Jacobian product for each target, a third faster and worst where flows are multiplied; None decides
        between sites: midpoint where flows are multiplied (gates, attention) or no gradient passes, else gradient.
    nodes: of each site, the strongest units that hold this share of its |attribution| (1: every kept unit). They are
        chosen to first order; but where closing those does much else (by more than a third, in the first batch),
        every kept unit of the site is closed and the strongest are chosen by that.
    edges: of each target, the strongest edges that hold this share of its inflow; `top` takes so many instead.
    regions: rows and columns of the grid of image regions that edges from the input begin at; 1 for a single "input".
    paths: how many strongest paths from the input to the output are listed.
    batch: images at a time; memory grows with it, the result depends on it only by what `nodes` says.
    progress: called with (steps done, steps).

    Nodes: "SITE:UNIT" (kind "unit"; site, unit, attribution: what it adds to the logit), "SITE:bias" (kind "bias": its
    edge to v is v's attribution beyond all kept units upstream, constants and interactions), "input:ROW,COLUMN" or
    "input", "output"; each with its stage. Units and regions also have outflow, the sum of all their edges, the pruned
    ones too. Attribution is that outflow where class-weighted edges were found by the midpoint, otherwise
    Σ_p ∂logit/∂z(p) · Δz(p), to first order. Edges: weight, signed. The graph:
    level, tasks, model, weighting, reference, estimator, images, logit (their mean), sites {site: units, kept, stage,
    shown, coverage}, paths [{nodes, weight}]. A path's weight is the share of the logit that takes it, each step being
    taken for its share of the target's inflow: the last edge's weight times e / Σ|e| of every edge before.
    Units from which no way leads to the output after pruning are left out. Where nothing is left, a warning says why.

    Raises TaskError for a task that is no output of the model, SiteError for masks of another model and sites
    that fire more than once, DataError for images that are none.
    """
    _check(weighting, estimator, nodes, edges, top)
    with setting(model, masks, task, images, reference, regions, batch) as found:
        effects = measure(
            found, lambda strength, kept: _strongest(strength, kept, nodes), weighting, estimator, progress
        )
        graph = _graph(found, effects, edges, top)
        graph.graph.update(
            level="unit",
            tasks=list(masks.select(task).tasks),
            model=str(masks.provenance.get("model", "")),
            weighting=weighting,
            reference=reference or masks.closed,
            estimator=_estimator(found, estimator),
            images=found.images,
            logit=effects.logit,
            paths=strongest_paths(graph, paths),
        )
    if not graph.number_of_edges():
        warnings.warn(NO_EDGES, stacklevel=3)
    return graph


def _check(weighting: object, estimator: object, nodes: object, edges: object, top: object) -> None:
    if weighting not in ("class", "pooled"):
        raise NadhooksError(f"weighting: expected 'class' or 'pooled', got {weighting!r}")
    if estimator not in (None, "gradient", "midpoint"):
        raise NadhooksError(f"estimator: expected 'gradient' or 'midpoint', got {estimator!r}")
    for name, share in (("nodes", nodes), ("edges", edges)):
        if not isinstance(share, (int, float)) or not 0 < share <= 1:
            raise NadhooksError(f"{name}: expected a share above 0 and at most 1, got {share!r}")
    if top is not None and (not isinstance(top, int) or top < 1):
        raise NadhooksError(f"top: expected a number of edges of at least 1, got {top!r}")


def _estimator(found: Setting, asked: Estimator | None) -> str:
    used = {estimator_of(found.wiring, edge, asked) for edge in found.wiring.edges}
    return "midpoint" if "midpoint" in used else "gradient"


def _strongest(strength: Tensor, kept: Tensor, share: float) -> Tensor:
    """The fewest of the kept units that hold this share of the (units,) strengths, in order of their numbers."""
    if share >= 1:
        return kept.nonzero()[:, 0]
    strength = strength * kept
    order = strength.argsort(descending=True, stable=True)
    held = strength[order].cumsum(0)
    number = int((held < share * held[-1]).sum()) + 1 if float(held[-1]) > 0 else 0
    return order[:number].sort().values


# --- from effects to a graph -----------------------------------------------------------------------------------------


def _graph(found: Setting, effects: Effects, share: float, top: int | None) -> nx.DiGraph:
    kept_edges: dict[Key, list[tuple[Key, float]]] = {}
    waiting: list[Key] = [(OUTPUT, 0)]
    reached = {(OUTPUT, 0)}
    while waiting:  # from the output down: what feeds nothing that is shown is not looked at
        key = waiting.pop()
        inflow = _inflow(effects, key, share, top)
        kept_edges[key] = inflow
        new = [source for source, _ in inflow if source not in reached]
        reached.update(new)
        waiting += [source for source in new if source[0] != INPUT and source[1] != BIAS]
    stages = {name: stage for stage, names in enumerate(nx.topological_generations(found.wiring)) for name in names}
    graph = FlowGraph(sites={})
    order = {name: place for place, name in enumerate((INPUT, *found.sites, OUTPUT))}
    for key in sorted(reached, key=lambda key: (order[key[0]], key[1] == BIAS, key[1])):
        graph.add_node(_name(found, key), **_attributes(found, effects, key, stages))
    for target, inflow in sorted(kept_edges.items(), key=lambda item: (order[item[0][0]], item[0][1])):
        for source, weight in sorted(inflow, key=lambda item: (order[item[0][0]], item[0][1])):
            graph.add_edge(_name(found, source), _name(found, target), weight=weight)
    for name, site in found.sites.items():
        strength = effects.attribution[name].abs() * found.kept[name]
        shown = [unit for place, unit in reached if place == name and unit != BIAS]
        total = float(strength.sum())
        graph.graph["sites"][name] = {
            "units": site.units,
            "kept": int(found.kept[name].sum()),
            "stage": stages[name],
            "shown": len(shown),
            "coverage": float(strength[shown].sum()) / total if total else 1.0,
        }
    return graph


def _inflow(effects: Effects, target: Key, share: float, top: int | None) -> list[tuple[Key, float]]:
    """The strongest edges into a unit, strongest first."""
    site, unit = target
    row = int((effects.shown[site] == unit).nonzero()[0, 0])
    found: list[tuple[Key, float]] = []
    for (source, to), weights in effects.edges.items():
        if to == site:
            units = effects.shown[source].tolist()
            found += [((source, u), w) for u, w in zip(units, weights[row].tolist(), strict=True) if w]
    bias = float(effects.bias[site][row]) if site in effects.bias else 0.0
    if abs(bias) > ROUNDING * math.fsum(abs(weight) for _, weight in found):
        found.append(((site, BIAS), bias))
    found.sort(key=lambda item: -abs(item[1]))
    if top is not None:
        return found[:top]
    left = share * math.fsum(abs(weight) for _, weight in found) * (1 - 1e-12)
    number = 0
    while number < len(found) and (left > 0 or share >= 1):
        left -= abs(found[number][1])
        number += 1
    return found[:number]


def _name(found: Setting, key: Key) -> str:
    site, unit = key
    if site == INPUT:
        columns = found.regions[1]
        return INPUT if found.regions == (1, 1) else f"{INPUT}:{unit // columns},{unit % columns}"
    if site == OUTPUT:
        return OUTPUT
    return f"{site}:bias" if unit == BIAS else f"{site}:{unit}"


def _attributes(found: Setting, effects: Effects, key: Key, stages: dict[str, int]) -> dict[str, Any]:
    site, unit = key
    if site == OUTPUT:
        return {"kind": OUTPUT, "stage": stages[OUTPUT]}
    if unit == BIAS:
        return {"kind": "bias", "stage": stages[site], "site": site}
    outflow = float(effects.outflow[site][effects.shown[site] == unit])
    if site == INPUT:
        rows, columns = found.regions
        place = {"row": unit // columns, "column": unit % columns, "rows": rows, "columns": columns}
        return {"kind": INPUT, "stage": 0, **place, "outflow": outflow}
    worth = float(effects.attribution[site][unit])
    return {
        "kind": "unit", "stage": stages[site], "site": site, "unit": unit, "attribution": worth, "outflow": outflow,
    }  # fmt: skip


def strongest_paths(graph: nx.DiGraph, number: int) -> list[dict[str, Any]]:
    """The strongest paths of a unit-level graph from the input to the output: [{"nodes": [...], "weight": float}].

    The weight of a path is its last edge's, times, for every edge u→v before, e(u→v) / Σ|e(·→v)| with the sign that v's
    inflow has as a whole: the part of the logit that arrives this way.
    """
    best: dict[str, list[tuple[float, tuple[str, ...]]]] = {}
    for node in nx.topological_sort(graph):
        if graph.nodes[node]["kind"] == INPUT:
            best[node] = [(1.0, (node,))]
            continue
        inflow = [(source, data["weight"]) for source, _, data in graph.in_edges(node, data=True)]
        total = math.fsum(abs(weight) for _, weight in inflow)
        scale = 1.0
        if node != OUTPUT and total:
            scale = math.copysign(1 / total, math.fsum(weight for _, weight in inflow))
        ways = (
            (weight * scale * before, (*nodes, node))
            for source, weight in inflow
            for before, nodes in best.get(source, ())
        )
        best[node] = heapq.nlargest(number, ways, key=lambda way: (abs(way[0]), way[1]))
    return [{"nodes": list(nodes), "weight": weight} for weight, nodes in best.get(OUTPUT, ())]
