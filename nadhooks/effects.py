"""Direct effects of units on units: the numbers of the unit-level flow graph, by gradients and by closing."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import networkx as nx
import torch
from torch import Tensor, nn

from .errors import DataError, NadhooksError, TaskError
from .gates import attach
from .gating import gate, unit_sums
from .joins import ATTENTION, PRODUCT
from .masks import Masks
from .segments import Cut, Gated, Score, replaying, unit_part
from .sites import Site
from .tracing import frozen, logits_of
from .wiring import INPUT, OUTPUT

Weighting = Literal["class", "pooled"]
Reference = Literal["zero", "mean"]
Estimator = Literal["gradient", "midpoint"]
Edge = tuple[str, str]


@dataclass(frozen=True)
class Setting:
    """One task's sub-architecture on some images: everything that effects are measured in.

    gates: the task's hard gates, in force everywhere. kept: {site: (units,) bool}. references: {site: (units,)} what a
    unit is set to, under "input" a value for every channel. wiring: of this model, with joins.
    """

    model: nn.Module
    sites: Mapping[str, Site]
    wiring: nx.DiGraph
    gates: Gated
    kept: Mapping[str, Tensor]
    references: Mapping[str, Tensor]
    batches: tuple[Tensor, ...]
    label: int
    images: int
    regions: tuple[int, int]

    def score(self, outputs: Any) -> Tensor:
        """The class's logit, summed over the images."""
        return logits_of(outputs)[:, self.label].sum()

    def cut(self, images: Tensor) -> Cut:
        return Cut(self.model, list(self.sites.values()), self.gates, images, self.score)

    def replaying(self, images: Tensor, score: Score | None = None) -> Any:
        return replaying(self.model, list(self.sites.values()), self.gates, images, score or self.score)

    def closed(self, source: str, value: Tensor, units: Tensor) -> Tensor:
        """What leaves a source with these units (numbers; of the input: regions) at their reference."""
        if source == INPUT:
            shut = self.region_numbers(value).unsqueeze(-1).eq(units.to(value.device)).any(-1)
            return torch.where(shut, self.references[INPUT], value)
        site = self.sites[source]
        g = torch.ones(1, site.units, device=value.device, dtype=value.dtype)
        g[:, units] = 0
        return gate(value, g, site.axis, site.block, self.references[source], alternating=site.alternating)

    def difference(self, source: str, value: Tensor) -> Tensor:
        """Value − reference, zero for units that the mask drops."""
        if source == INPUT:
            return value - self.references[INPUT]
        site = self.sites[source]
        return _of_kept(self, source, value - self.closed(source, value, torch.arange(site.units)))

    def region_numbers(self, images: Tensor) -> Tensor:
        """(height, width) number of each pixel's region; one region for inputs that are not images."""
        rows, columns = self.regions
        if images.dim() != 4:
            return torch.zeros(images.shape[1:], dtype=torch.long, device=images.device)
        height, width = images.shape[2:]
        down = torch.arange(height, device=images.device) * rows // height
        across = torch.arange(width, device=images.device) * columns // width
        return down[:, None] * columns + across[None]

    def sums(self, name: str, x: Tensor) -> Tensor:
        """Sums over images and positions: (units,) float64; of the input (regions,), of the output (1,)."""
        if name == OUTPUT:
            return x.detach().double().reshape(1).cpu()
        if name != INPUT:
            return unit_sums(x, self.sites[name]).cpu()
        x = x.detach().double()
        numbers = self.region_numbers(x)
        by_position = x.sum((0, 1) if x.dim() == 4 else 0)
        total = torch.zeros(self.regions[0] * self.regions[1], dtype=torch.float64, device=x.device)
        return total.index_add(0, numbers.flatten(), by_position.flatten()).cpu()


@dataclass
class Effects:
    """Averages over the images. shown: {site: units that are looked at}, the input's regions, the output as unit 0.

    attribution: {site: (units,)} how much a unit's activity adds to the logit. edges: {(source, target): (targets
    shown, sources shown)}. bias: {site: (shown,)} what a unit has beyond all units upstream. outflow: {source:
    (shown,)} the sum of a unit's edges to everything behind it, shown or not.
    """

    shown: dict[str, Tensor]
    attribution: dict[str, Tensor]
    logit: float
    edges: dict[Edge, Tensor] = field(default_factory=dict)
    bias: dict[str, Tensor] = field(default_factory=dict)
    outflow: dict[str, Tensor] = field(default_factory=dict)


@contextmanager
def setting(
    model: nn.Module,
    masks: Masks,
    task: object,
    images: Tensor,
    reference: Reference | None,
    regions: int | tuple[int, int],
    batch: int,
) -> Iterator[Setting]:
    """The task's sub-architecture on the images; the model is in eval mode inside, its weights frozen."""
    if not isinstance(masks, Masks):
        raise NadhooksError(f"expected Masks, got {type(masks).__name__}; nadhooks.load(path) reads a file")
    if not isinstance(images, Tensor) or not images.is_floating_point() or not len(images):
        raise DataError("expected images of the task as a floating-point tensor (images, channels, height, width)")
    if reference not in (None, "zero", "mean"):
        raise NadhooksError(f"reference: expected 'zero' or 'mean', got {reference!r}")
    chosen = masks.select(task).hard()
    if len(chosen) != 1:
        raise TaskError(f"expected one task, got {len(chosen)}; draw one graph for each")
    grid = (regions, regions) if isinstance(regions, int) else tuple(regions)
    if len(grid) != 2 or min(grid) < 1:
        raise NadhooksError(f"regions: expected a number or (rows, columns) of at least 1, got {regions!r}")
    device = next((p.device for p in model.parameters()), images.device)
    images = images.to(device)
    with attach(model, masks.sites, example=images[:1]) as attached:
        sites = {site.name: site for site in attached.sites}
        wiring = nx.DiGraph(attached.wiring)  # with joins, and with what the masks know that one image does not show
        wiring.add_edges_from(edge for edge in masks.wiring.edges(data=True) if not wiring.has_edge(*edge[:2]))
    means = {name: mean.to(device) for name, mean in chosen.means.items()}
    gates = {name: (chosen[name].to(device), means[name] if chosen.closed == "mean" else None) for name in sites}
    with frozen(model), torch.inference_mode(False):
        found = Setting(
            model, sites, wiring, gates, {name: chosen[name][0] > 0.5 for name in sites}, {},
            tuple(images.split(batch)), _label(chosen), len(images),
            (grid[0], grid[1]) if images.dim() == 4 else (1, 1),
        )  # fmt: skip
        with torch.no_grad():
            outputs = logits_of(model(images[:1])).shape[1]
        if found.label >= outputs:
            raise TaskError(f"task {chosen.tasks[0]} is not an output of the model, which has 0 to {outputs - 1}")
        known = means if chosen.closed == "mean" else None
        yield _with_references(found, reference or chosen.closed, known)


def _label(masks: Masks) -> int:
    label = masks.labels[0]
    if not isinstance(label, int) or label < 0:
        raise TaskError(f"task {masks.tasks[0]}: expected a label that is an output of the model, got {label!r}")
    return label


def _with_references(found: Setting, reference: str, means: Mapping[str, Tensor] | None) -> Setting:
    """What a unit is set to: zero, or its mean: the masks' own, or where they have none that over these images."""
    first = found.batches[0]
    if reference == "zero":
        references = {name: torch.zeros(site.units, device=first.device) for name, site in found.sites.items()}
        references[INPUT] = torch.zeros((), device=first.device, dtype=first.dtype)
    else:
        pixels = torch.cat(found.batches)
        axes = (0, 2, 3) if pixels.dim() == 4 else (0,)
        references = dict(means) if means is not None else _means(found)
        references[INPUT] = pixels.mean(axes, keepdim=True)[0]
    return Setting(**{**vars(found), "references": references})


def _means(found: Setting) -> dict[str, Tensor]:
    sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), dtype=torch.float64))
    counts: dict[str, int] = defaultdict(int)
    for images in found.batches:
        with found.replaying(images) as replay:
            for name, site in found.sites.items():
                sums[name] = sums[name] + unit_sums(replay.leaving[name], site)
                counts[name] += replay.leaving[name].numel() // site.units
    dtype = found.batches[0].dtype
    return {name: (total / counts[name]).to(dtype) for name, total in sums.items()}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(
    found: Setting,
    choose: Callable[[Tensor, Tensor], Tensor],
    weighting: Weighting,
    estimator: Estimator | None,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Attributions first; then the edges between the units that choose(strengths, kept) takes from each site's."""
    only = found.cut(found.batches[0]) if len(found.batches) == 1 else None
    attribution, logit = _attribution(found, only)
    shown = {name: choose(attribution[name].abs(), found.kept[name]) for name in found.sites}
    shown[INPUT], shown[OUTPUT] = torch.arange(found.regions[0] * found.regions[1]), torch.zeros(1, dtype=torch.long)
    effects = Effects(shown, attribution, logit)
    closing = {edge for edge in found.wiring.edges if estimator_of(found.wiring, edge, estimator) == "midpoint"}
    for edge in found.wiring.edges:
        effects.edges[edge] = torch.zeros(len(shown[edge[1]]), len(shown[edge[0]]), dtype=torch.float64)
    for name in found.sites:
        effects.bias[name] = torch.zeros(len(shown[name]), dtype=torch.float64)
    effects.outflow = {name: torch.zeros(len(units), dtype=torch.float64) for name, units in shown.items()}
    counted = _Progress(found, shown, closing, progress)
    for images in found.batches:
        cut = only or found.cut(images)
        cotangents = {name: _cotangent(found, cut, name, weighting) for name in (*found.sites, OUTPUT)}
        for name in found.sites:
            value = cut.entering[name].detach()
            worth = found.sums(name, cotangents[name] * found.difference(name, value))
            effects.bias[name] += worth[shown[name]] / found.images
        _by_gradient(found, cut, cotangents, effects, set(found.wiring.edges) - closing, counted)
        if closing:
            _by_closing(found, images, cotangents, effects, closing, counted)
    return effects


def estimator_of(wiring: nx.DiGraph, edge: Edge, estimator: Estimator | None) -> Estimator:
    """The one asked for; None decides by what lies between: midpoint for products, and where no gradient passes."""
    if estimator is not None:
        return estimator
    data = wiring.edges[edge]
    return "midpoint" if data.get("join") in (PRODUCT, ATTENTION) or data.get("found") == "perturbation" else "gradient"


def _attribution(found: Setting, only: Cut | None) -> tuple[dict[str, Tensor], float]:
    totals = {name: torch.zeros(site.units, dtype=torch.float64) for name, site in found.sites.items()}
    logit = 0.0
    for images in found.batches:
        cut = only or found.cut(images)
        logit += float(cut.entering[OUTPUT].detach())
        for name in found.sites:
            if name in cut.gradient:
                value = cut.leaving[name].detach()
                totals[name] += found.sums(name, cut.gradient[name] * found.difference(name, value))
    return {name: total / found.images for name, total in totals.items()}, logit / found.images


def _cotangent(found: Setting, cut: Cut, name: str, weighting: Weighting) -> Tensor:
    """What a change at each position counts: its gradient, or as much as each other position of its unit."""
    entering = cut.entering[name].detach()
    if name == OUTPUT:
        return torch.ones_like(entering)
    if weighting == "class":
        return cut.gradient[name] if name in cut.gradient else torch.zeros_like(entering)
    batch = len(cut.leaving[INPUT])
    return torch.full_like(entering, batch * found.sites[name].units / entering.numel())


def _of_kept(found: Setting, name: str, x: Tensor) -> Tensor:
    """Without what belongs to units that the mask drops."""
    if name == OUTPUT:
        return x
    site = found.sites[name]
    return gate(x, found.kept[name][None].to(x), site.axis, site.block, None, alternating=site.alternating)


def _by_gradient(
    found: Setting, cut: Cut, cotangents: Mapping[str, Tensor], effects: Effects, edges: set[Edge], counted: _Progress
) -> None:
    """One vector-Jacobian product for each shown unit, from the output down."""
    difference = {name: found.difference(name, leaf.detach()) for name, leaf in cut.leaving.items()}
    for target in reversed(cut.entering):
        sources = [name for name in cut.leaving if (name, target) in edges]
        if not sources:
            continue
        for source, part in cut.product(target, _of_kept(found, target, cotangents[target]), sources).items():
            sums = found.sums(source, part * difference[source]) / found.images
            effects.outflow[source] += sums[effects.shown[source]]
        one = cotangents[target] if target == OUTPUT else torch.zeros_like(cotangents[target])
        for row, unit in enumerate(effects.shown[target].tolist()):
            if target != OUTPUT:
                site = found.sites[target]
                here = unit_part(site, one, unit)
                here.copy_(unit_part(site, cotangents[target], unit))
            for source, part in cut.product(target, one, sources).items():
                sums = found.sums(source, part * difference[source]) / found.images
                effects.edges[source, target][row] += sums[effects.shown[source]]
                if target != OUTPUT:
                    effects.bias[target][row] -= sums.sum()
            if target != OUTPUT:
                here.zero_()
            counted.step()


def _by_closing(
    found: Setting,
    images: Tensor,
    cotangents: Mapping[str, Tensor],
    effects: Effects,
    edges: set[Edge],
    counted: _Progress,
) -> None:
    """One pass through the segment for each shown source, and one for all others of its site together."""
    with found.replaying(images) as replay:
        for source in replay.leaving:
            targets = [target for target in replay.entering if (source, target) in edges]
            if not targets:
                continue

            def change(units: Tensor, source: str = source, targets: list[str] = targets) -> dict[str, Tensor]:
                seen = replay.run(source, found.closed(source, replay.leaving[source], units), targets)
                return {
                    name: found.sums(name, cotangents[name] * (replay.entering[name] - seen[name])) / found.images
                    for name in targets
                }

            shown = effects.shown[source]
            parts = [(slice(column, column + 1), change(shown[column : column + 1])) for column in range(len(shown))]
            counted.step(len(shown))
            others = torch.zeros(0, dtype=torch.long)
            if source != INPUT:
                left = found.kept[source].clone()
                left[shown] = False
                others = left.nonzero()[:, 0]
            parts += [(slice(0, 0), change(others))] if len(others) else []
            for columns, sums in parts:
                for target in targets:
                    there = sums[target][effects.shown[target]]
                    effects.edges[source, target][:, columns] += there[:, None]
                    counts = torch.ones(1, dtype=torch.bool) if target == OUTPUT else found.kept[target]
                    effects.outflow[source][columns] += sums[target][counts].sum()
                    if target != OUTPUT:
                        effects.bias[target] -= there


class _Progress:
    def __init__(
        self,
        found: Setting,
        shown: Mapping[str, Tensor],
        closing: set[Edge],
        report: Callable[[int, int], None] | None,
    ):
        by_gradient = {target for _, target in set(found.wiring.edges) - closing}
        by_closing = {source for source, _ in closing}
        each = sum(len(shown[name]) for name in by_gradient) + sum(len(shown[name]) for name in by_closing)
        self.done, self.total, self.report = 0, each * len(found.batches), report

    def step(self, steps: int = 1) -> None:
        self.done += steps
        if self.report is not None:
            self.report(self.done, self.total)
