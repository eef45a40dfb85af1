"""Direct effects of units on units: the numbers of the unit-level flow graph, by gradients and by closing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import networkx as nx
import torch
from torch import Tensor

from .effects import Edge, Effects, Estimator, Setting, Weighting
from .joins import ATTENTION, PRODUCT
from .segments import Cut, Replay, unit_part
from .wiring import INPUT, OUTPUT

Choose = Callable[[Tensor, Tensor], Tensor]  # from (units,) strengths, and which units are kept, to units
BENT = 1 / 3  # where closing differs from first order by more than this share, every kept unit of a site is closed


def measure(
    found: Setting,
    choose: Choose,
    weighting: Weighting,
    estimator: Estimator | None,
    progress: Callable[[int, int], None] | None = None,
) -> Effects:
    """Attributions first; then the edges between the units that `choose` takes from each site's."""
    only = found.cut(found.batches[0]) if len(found.batches) == 1 else None
    attribution, logit = _attribution(found, only)
    shown = {name: choose(attribution[name].abs(), found.kept[name]) for name in found.sites}
    shown[INPUT], shown[OUTPUT] = torch.arange(found.regions[0] * found.regions[1]), torch.zeros(1, dtype=torch.long)
    edges = set(found.wiring.edges)
    effects = Effects.of(shown, attribution, logit, edges)
    closing = {edge for edge in edges if estimator_of(found.wiring, edge, estimator) == "midpoint"}
    steps = Steps(effects, edges - closing, closing, len(found.batches), progress)
    closings = Closings(found, effects, closing, weighting == "class" and closing == edges, steps)
    for images in found.batches:
        cut, only = only or found.cut(images), None
        prices = {name: _price(found, cut, name, weighting) for name in (*found.sites, OUTPUT)}
        if not closings.bending:
            for name in found.sites:
                value = found.difference(name, cut.entering[name].detach())
                worth = found.by_image(name, prices[name] * value, len(images)).sum(0)
                effects.bias[name] += worth[shown[name]] / found.images
        _by_gradient(found, cut, prices, effects, edges - closing, steps)
        del cut  # with the activations that its gradients need
        if closing:
            closings.add(images, prices)
    closings.choose(choose)
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
        logit += float(cut.entering[OUTPUT].detach().sum())
        for name in found.sites:
            if name in cut.gradient:
                value = found.difference(name, cut.leaving[name].detach())
                totals[name] += found.by_image(name, cut.gradient[name] * value, len(images)).sum(0)
    return {name: total / found.images for name, total in totals.items()}, logit / found.images


def _price(found: Setting, cut: Cut, name: str, weighting: Weighting) -> Tensor:
    """What a change at each position counts: its gradient, or as much as each other position of its unit."""
    entering = cut.entering[name].detach()
    if name == OUTPUT:
        return torch.ones_like(entering)
    if weighting == "class":
        return cut.gradient[name] if name in cut.gradient else torch.zeros_like(entering)
    batch = len(cut.leaving[INPUT])
    return torch.full_like(entering, batch * found.sites[name].units / entering.numel())


def _by_gradient(
    found: Setting, cut: Cut, prices: Mapping[str, Tensor], effects: Effects, edges: set[Edge], steps: Steps
) -> None:
    """One vector-Jacobian product for each shown unit, from the output down."""
    images = len(cut.leaving[INPUT])
    difference = {name: found.difference(name, leaf.detach()) for name, leaf in cut.leaving.items() if edges}
    for target in reversed(cut.entering):
        sources = [name for name in cut.leaving if (name, target) in edges]
        if not sources:
            continue
        for source, part in cut.product(target, found.of_kept(target, prices[target]), sources).items():
            sums = found.by_image(source, part * difference[source], images).sum(0) / found.images
            effects.outflow[source] += sums[effects.shown[source]]
        one = prices[target] if target == OUTPUT else torch.zeros_like(prices[target])
        for row, unit in enumerate(effects.shown[target].tolist()):
            if target != OUTPUT:
                site = found.sites[target]
                here = unit_part(site, one, unit)
                here.copy_(unit_part(site, prices[target], unit))
            for source, part in cut.product(target, one, sources).items():
                sums = found.by_image(source, part * difference[source], images).sum(0) / found.images
                effects.edges[source, target][row] += sums[effects.shown[source]]
                if target != OUTPUT:
                    effects.bias[target][row] -= sums.sum()
            if target != OUTPUT:
                here.zero_()
            steps.done(1)


# --- by closing ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pass:
    """Some images. beyond: {site: (images, units) what closing a unit does beyond first order}, as far as known."""

    replay: Replay
    prices: Mapping[str, Tensor]
    beyond: dict[str, Tensor]

    @property
    def images(self) -> int:
        return len(self.replay.leaving[INPUT])


@dataclass(frozen=True)
class Change:
    """What closing some units changes: {target: (shown,) averaged over all images}, and (images,) at all kept units."""

    at: Mapping[str, Tensor]
    total: Tensor


Close = Callable[[list[int]], Change]


class Closings:
    """Edges from units that are closed, one at a time, from the output down.

    A change at a unit counts by the logit's gradient there, which holds for small changes. What closing that unit does
    beyond it, b, is known by then, image by image; to a change that is the share t of the unit's own, t² b is added,
    which is exact where the logit is quadratic in the unit. For units that are not closed b is taken for zero, so where
    it is not small (`BENT`: before normalisations and attention, mostly) every kept unit of a site is closed, and the
    strongest are chosen by what that did. Pooled edges count by activations and need none of this; where some edges are
    found by gradients, all stay what they are to first order.
    """

    def __init__(self, found: Setting, effects: Effects, edges: set[Edge], bending: bool, steps: Steps):
        self.found, self.effects, self.edges, self.bending, self.steps = found, effects, edges, bending, steps
        self.whole: dict[str, bool] = {}  # {site: whether every kept unit is closed}

    def add(self, images: Tensor, prices: Mapping[str, Tensor]) -> None:
        with self.found.replaying(images) as replay:
            now = Pass(replay, prices, {})
            for source in reversed(list(replay.leaving)):
                targets = [target for target in replay.entering if (source, target) in self.edges]
                if targets:
                    self._close_each(now, source, self._closer(now, source, targets))

    def choose(self, choose: Choose) -> None:
        """What closing did is what units are worth; of sites that were closed as a whole, the strongest stay."""
        for name, whole in self.whole.items():
            units, worth = self.effects.shown[name], self.effects.attribution[name]
            worth[units] = self.effects.outflow[name]
            if whole:
                self.effects.narrow(name, torch.isin(units, choose(worth.abs(), self.found.kept[name])))

    def _closer(self, now: Pass, source: str, targets: list[str]) -> Close:
        found, images, own = self.found, now.images, {}
        for target in now.beyond.keys() & set(targets):
            value = found.difference(target, now.replay.leaving[target])
            square = found.by_image(target, value.square(), images)
            own[target] = value, square.clamp(min=torch.finfo(value.dtype).tiny)

        def close(units: list[int]) -> Change:
            value = found.closed(source, now.replay.leaving[source], torch.tensor(units))
            seen = now.replay.run(source, value, targets)
            at, total = {}, torch.zeros(images, dtype=torch.float64)
            for target in targets:
                change = now.replay.entering[target] - seen[target]
                counted = found.by_image(target, now.prices[target] * change, images)
                if target in own:
                    value, square = own[target]
                    share = (found.by_image(target, value * change, images) / square).clamp(-1, 1)
                    counted += share.square() * now.beyond[target]
                at[target] = counted.sum(0)[self.effects.shown[target]] / found.images
                total += (counted if target == OUTPUT else counted[:, found.kept[target]]).sum(1)
            return Change(at, total)

        return close

    def _close_each(self, now: Pass, source: str, close: Close) -> None:
        effects = self.effects
        changes = {unit: close([unit]) for unit in effects.shown[source].tolist()}
        if source != INPUT:
            if self.bending:
                self._look_beyond(now, source, close, changes)
            others = [unit for unit in _units(self.found.kept[source]) if unit not in changes]
            for target, change in (close(others).at if others else {}).items():
                if target != OUTPUT:
                    effects.bias[target] -= change
        for column, unit in enumerate(effects.shown[source].tolist()):
            out = changes[unit].total.sum() / self.found.images
            effects.outflow[source][column] += out
            if self.bending:
                effects.bias[source][column] += out
            for target, change in changes[unit].at.items():
                effects.edges[source, target][:, column] += change
                if target != OUTPUT:
                    effects.bias[target] -= change
        self.steps.done(len(changes))

    def _look_beyond(self, now: Pass, source: str, close: Close, changes: dict[int, Change]) -> None:
        """What closing did beyond first order; where that is much, the site's other kept units are closed too."""
        value = self.found.difference(source, now.replay.leaving[source])
        first = self.found.by_image(source, now.prices[source] * value, now.images)
        beyond = torch.zeros_like(first)
        for unit, change in changes.items():
            beyond[:, unit] = change.total - first[:, unit]
        if source not in self.whole:
            self.whole[source] = bool(beyond.abs().sum() > BENT * first[:, list(changes)].abs().sum())
            if self.whole[source]:
                others = [unit for unit in _units(self.found.kept[source]) if unit not in changes]
                self.steps.more(len(others))
                self.effects.look_at(source, torch.tensor(sorted([*changes, *others])))
                for unit in others:
                    changes[unit] = close([unit])
                    beyond[:, unit] = changes[unit].total - first[:, unit]
        now.beyond[source] = beyond


def _units(kept: Tensor) -> list[int]:
    return kept.nonzero()[:, 0].tolist()


class Steps:
    """Counts vector-Jacobian products and closings, of all batches."""

    def __init__(
        self,
        effects: Effects,
        by_gradient: set[Edge],
        by_closing: set[Edge],
        batches: int,
        report: Callable[[int, int], None] | None,
    ):
        asked = [*{target for _, target in by_gradient}, *{source for source, _ in by_closing}]
        self.batches, self.report = batches, report
        self.count, self.total = 0, batches * sum(len(effects.shown[name]) for name in asked)

    def more(self, steps: int) -> None:
        """Found in the first batch, asked in each."""
        self.total += steps * self.batches

    def done(self, steps: int) -> None:
        self.count += steps
        if self.report is not None:
            self.report(self.count, self.total)
