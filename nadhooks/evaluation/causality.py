"""Whether a unit-level graph is causally true: single units and whole sites are closed, and edges patched."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
import torch
from torch import Tensor, nn

from ..default_device import made_on_cpu
from ..effects import Setting, setting
from ..errors import NadhooksError, SiteError
from ..flow_like import UNIT_FLOW, check_flow
from ..hooking import on_sites
from ..masks import Masks
from ..segments import Cut, Replay, gated, unit_part
from ..sites import Site
from ..tracing import call_model, logits_of
from ..wiring import INPUT, OUTPUT

Shut = Mapping[str, Tensor]  # {site: units that are closed}


@dataclass(frozen=True)
class Agreement:
    """What a graph says beside what was measured, for the same things in the same order.

    pearson, spearman: their correlations, NaN for fewer than two pairs or where all are the same.
    """

    said: tuple[float, ...] = field(repr=False)  # thousands of edges
    measured: tuple[float, ...] = field(repr=False)
    pearson: float
    spearman: float

    def __str__(self) -> str:
        return f"{told(self.spearman)} / {told(self.pearson)} ({len(self.said):,})"

    @classmethod
    def of(cls, said: Sequence[float], measured: Sequence[float]) -> Agreement:
        a, b = (torch.tensor(values, dtype=torch.float64) for values in (said, measured))
        return cls(tuple(said), tuple(measured), _correlation(a, b), _correlation(_ranks(a), _ranks(b)))


@dataclass(frozen=True)
class Removal:
    """The units of every site that add most to the logit closed at once, against random kept ones, as many of each.

    Shares of images still answered with the class (recall), and the class's mean logit.
    """

    units: int
    recall: float
    recall_without_strongest: float
    recall_without_random: float
    logit: float
    logit_without_strongest: float
    logit_without_random: float

    def __str__(self) -> str:
        return (
            f"recall {self.recall:.3f}; without the {self.units} units that add most "
            f"{self.recall_without_strongest:.3f}, without as many random ones {self.recall_without_random:.3f}"
        )


@dataclass(frozen=True, repr=False)
class Verification:
    """How far a unit-level graph says what happens.

    edges: each edge's weight beside the effect on its target when its source is closed and all other sites are held.
    paths: the same beside the change of the logit when only the target sees that its source is closed (path patching).
    units: the sum of a unit's edges (its outflow) beside the change of the logit when it is closed and everything
        behind follows. regions: the same for regions of the input.
    sites: the same for all shown units of a site at once. removal: the units that add most against random ones.
    """

    edges: Agreement
    paths: Agreement
    units: Agreement
    regions: Agreement
    sites: Mapping[str, tuple[float, float]]
    removal: Removal

    def __repr__(self) -> str:
        """A few lines, for people: every figure is in the fields."""
        sites = Agreement.of(*(tuple(zip(*self.sites.values(), strict=True)) or ((), ())))
        rows = {"edges": self.edges, "paths": self.paths, "units": self.units, "regions": self.regions, "sites": sites}
        return "\n".join((
            "Verification: what the graph says beside what was measured, rank correlation / Pearson (of how many)",
            *(f"  {name:<8} {agreement}" for name, agreement in rows.items()),
            f"  removal  {self.removal}",
        ))  # fmt: skip


@made_on_cpu
def verify(
    model: nn.Module,
    masks: Masks,
    graph: nx.DiGraph,
    images: Tensor,
    *,
    units: int = 16,
    patches: int = 64,
    share: float = 0.1,
    rounds: int = 5,
    batch: int = 8,
    seed: int = 0,
) -> Verification:
    """Measures what a graph of `unit_flow` says, by closing units of the live model.

    masks, images: those that the graph was made of; edges are averages, so other images of the class answer otherwise.
    units: sources closed at each site, spread over the ranks of |attribution|, and as many regions of the input.
    patches: edges patched, spread over the ranks of |weight|. share: of each site's kept units, removed at once.
    rounds: draws of random units, over which their figures are averaged.

    Of a pooled graph only `edges` are comparable: its weights are activations, not parts of the logit.

    Raises NadhooksError for a graph that `unit_flow` did not make, SiteError for masks of another model.
    """
    check_flow(graph, UNIT_FLOW)
    if graph.graph.get("level") != "unit":
        raise NadhooksError(f"expected a graph made by {UNIT_FLOW}, got one of whole sites")
    for name, number, least in (("units", units, 1), ("patches", patches, 0), ("rounds", rounds, 1)):
        if not isinstance(number, int) or number < least:
            raise NadhooksError(f"{name}: expected a whole number of at least {least}, got {number!r}")
    if not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise NadhooksError(f"share: expected a share above 0 and at most 1, got {share!r}")
    task, reference = graph.graph["tasks"][0], graph.graph["reference"]
    grid = next(
        ((data["rows"], data["columns"]) for _, data in graph.nodes(data=True) if data["kind"] == INPUT), (1, 1)
    )
    with setting(model, masks, task, images, reference, grid, batch) as found, torch.no_grad():
        if other := set(graph.graph["sites"]) - set(found.sites):
            raise SiteError(
                f"the graph has the site {min(other)!r}, which the masks have not; pass those it was made of"
            )
        sources = _spread_out(_sources(graph), units)
        patched = _patches(graph, patches)
        totals: dict[Any, float] = {}
        for images in found.batches:
            with torch.enable_grad():
                cut = found.cut(images)
            with found.replaying(images) as replay:
                for key, value in _measured(found, cut, replay, graph, sources, patched):
                    totals[key] = totals.get(key, 0.0) + value / found.images
        removal = _removal(found, graph, share, rounds, seed)
    weights = nx.get_edge_attributes(graph, "weight")
    edges = [key for key in totals if key[0] == "edge"]
    paths = [key for key in totals if key[0] == "path"]
    regions = [key for key in totals if key[0] == "unit" and graph.nodes[key[1]]["kind"] == INPUT]
    single = [key for key in totals if key[0] == "unit" and key not in regions]
    out = nx.get_node_attributes(graph, "outflow")
    whole = {
        key[1]: (sum(out[node] for node in _sources(graph)[key[1]]), totals[key]) for key in totals if key[0] == "site"
    }
    return Verification(
        Agreement.of([weights[key[1:]] for key in edges], [totals[key] for key in edges]),
        Agreement.of([weights[key[1:]] for key in paths], [totals[key] for key in paths]),
        Agreement.of([out[key[1]] for key in single], [totals[key] for key in single]),
        Agreement.of([out[key[1]] for key in regions], [totals[key] for key in regions]),
        whole,
        removal,
    )


# --- what is asked ---------------------------------------------------------------------------------------------------


def _sources(graph: nx.DiGraph) -> dict[str, list[str]]:
    """{site: its unit nodes, strongest first}, the input's regions under "input"."""
    found: dict[str, list[str]] = {}
    for node, data in graph.nodes(data=True):
        if data["kind"] in (INPUT, "unit"):
            found.setdefault(data.get("site", INPUT), []).append(node)
    for nodes in found.values():
        nodes.sort(key=lambda node: -abs(graph.nodes[node].get("attribution", 0.0)))
    return found


def _spread_out(sources: Mapping[str, list[str]], number: int) -> dict[str, list[str]]:
    """So many of each, evenly over the ranks, the first and the last included."""
    return {site: [nodes[place] for place in _places(len(nodes), number)] for site, nodes in sources.items()}


def _places(length: int, number: int) -> list[int]:
    if length <= number:
        return list(range(length))
    return [round(place * (length - 1) / max(1, number - 1)) for place in range(number)]


def _patches(graph: nx.DiGraph, number: int) -> list[tuple[str, str]]:
    """Edges between units, evenly over the ranks of |weight|. An edge to the output has nothing behind it to patch."""
    edges = [
        (u, v) for u, v in graph.edges if graph.nodes[u]["kind"] in (INPUT, "unit") and graph.nodes[v]["kind"] == "unit"
    ]
    edges.sort(key=lambda edge: -abs(graph.edges[edge]["weight"]))
    return [edges[place] for place in _places(len(edges), number)]


def _key(graph: nx.DiGraph, node: str) -> tuple[str, int]:
    data = graph.nodes[node]
    if data["kind"] == INPUT:
        return INPUT, data["row"] * data["columns"] + data["column"]
    return (OUTPUT, 0) if data["kind"] == OUTPUT else (data["site"], data["unit"])


# --- measuring -------------------------------------------------------------------------------------------------------


def _measured(
    found: Setting,
    cut: Cut,
    replay: Replay,
    graph: nx.DiGraph,
    sources: Mapping[str, list[str]],
    patched: Sequence[tuple[str, str]],
) -> Iterator[tuple[tuple[str, ...], float]]:
    """(what, sum over these images): ("edge", u, v), ("path", u, v), ("unit", u), ("site", name)."""
    pooled = graph.graph["weighting"] == "pooled"
    everything = _sources(graph)
    for site, nodes in sources.items():
        for node in nodes:
            shut = torch.tensor([_key(graph, node)[1]])
            targets = sorted({_key(graph, v)[0] for v in graph.successors(node)})
            for target, change in _closed(found, replay, site, shut, targets).items():
                for v in graph.successors(node):
                    if _key(graph, v)[0] == target:
                        yield ("edge", node, v), _counted(found, cut, target, _key(graph, v)[1], change, pooled)
            yield ("unit", node), float(_closed(found, replay, site, shut, [OUTPUT], free=True)[OUTPUT].sum())
        units = torch.tensor([_key(graph, node)[1] for node in everything[site]])
        yield ("site", site), float(_closed(found, replay, site, units, [OUTPUT], free=True)[OUTPUT].sum())
    for u, v in patched:
        (source, number), (target, unit) = _key(graph, u), _key(graph, v)
        change = _closed(found, replay, source, torch.tensor([number]), [target])[target]
        value = replay.leaving[target].clone()
        part = unit_part(found.sites[target], value, unit)
        part -= unit_part(found.sites[target], change, unit)
        after = replay.run(target, value, [OUTPUT], free=True)[OUTPUT]
        yield ("path", u, v), float((replay.entering[OUTPUT] - after).sum())


def _closed(
    found: Setting, replay: Replay, site: str, units: Tensor, targets: Sequence[str], *, free: bool = False
) -> dict[str, Tensor]:
    """What the targets lose when these units of a site are at their reference."""
    seen = replay.run(site, found.closed(site, replay.leaving[site], units), targets, free=free)
    return {name: replay.entering[name] - seen[name] for name in targets}


def _counted(found: Setting, cut: Cut, target: str, unit: int, change: Tensor, pooled: bool) -> float:
    if target == OUTPUT:
        return float(change.sum())
    site = found.sites[target]
    part = unit_part(site, change, unit)
    if pooled:
        return float(part.sum()) * len(cut.leaving[INPUT]) / part.numel()
    if target not in cut.gradient:  # it leads to the logit by a way that gradients do not take
        return 0.0
    return float((part * unit_part(site, cut.gradient[target], unit)).sum())


def _removal(found: Setting, graph: nx.DiGraph, share: float, rounds: int, seed: int) -> Removal:
    random = torch.Generator().manual_seed(seed)
    strongest: dict[str, Tensor] = {}
    for site, nodes in _sources(graph).items():
        if site != INPUT:
            number = max(1, round(share * int(found.kept[site].sum())))
            nodes = sorted(nodes, key=lambda node: -graph.nodes[node]["attribution"])
            strongest[site] = torch.tensor([graph.nodes[node]["unit"] for node in nodes[:number]])
    draws = []
    for _ in range(rounds):
        drawn = {}
        for site, units in strongest.items():
            kept = found.kept[site].nonzero()[:, 0]
            drawn[site] = kept[torch.randperm(len(kept), generator=random)[: len(units)]]
        draws.append(_answers(found, drawn))
    before, without = _answers(found, {}), _answers(found, strongest)
    recall, logit = (sum(figures) / rounds for figures in zip(*draws, strict=True))
    return Removal(sum(map(len, strongest.values())), before[0], without[0], recall, before[1], without[1], logit)


def _answers(found: Setting, shut: Shut) -> tuple[float, float]:
    """(recall, mean logit) with these units closed on top of those that the mask drops."""
    right, total = 0, 0.0

    def change(site: Site, x: Tensor) -> Tensor:
        x = gated(site, x, found.gates)
        return found.closed(site.name, x, shut[site.name]) if site.name in shut else x

    for images in found.batches:
        with on_sites(found.model, found.sites.values(), change):
            outputs = logits_of(call_model(found.model, images))
        right += int(outputs.argmax(1).eq(found.label).sum())
        total += float(outputs[:, found.label].sum())
    return right / found.images, total / found.images


def told(correlation: float) -> str:
    """For people: "none" where there was nothing to compare."""
    return "none" if math.isnan(correlation) else f"{correlation:.3f}"


def _ranks(values: Tensor) -> Tensor:
    """Ranks, those of ties averaged."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0).double()
    return (ends - (counts - 1) / 2)[inverse]


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 2 or bool((a == a[0]).all()) or bool((b == b[0]).all()):
        return float("nan")
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])
