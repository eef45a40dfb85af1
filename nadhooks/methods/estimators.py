"""From scores to gates and from gradients to scores: estimators, updates, first scores and schedules."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .parts import Estimator, Parted, Step, Table, Update, whole

ANNEALED = 0.7  # of the steps; what is left fits the gates that are kept in the end

# --- estimators: scores -> gates in [0, 1] ---------------------------------------------------------------------------


def sigmoid(scores: Table, step: Step) -> Table:
    """Soft gates, with no regard to any budget."""
    return {site: score.sigmoid() for site, score in scores.items()}


def straight_through_topk(scores: Table, step: Step) -> Table:
    """Hard gates of the highest scores within the budget; gradients pass to the scores unchanged."""
    return _straight_through(step.best(scores), scores)


def _straight_through(hard: Table, scores: Table) -> Table:
    score = whole(scores)
    return Parted(whole(hard) + (score - score.detach()), scores)


def perturbed_topk(noise: float = 1.0) -> Estimator:
    """`straight_through_topk` of scores with uniform noise, less and less of it over the first 70 % of the steps.

    Which units are within the budget varies, so that gradients are not those of one choice alone; without noise units
    once ahead stay there. noise: its standard deviation at first, as a multiple of that of a task's scores.
    """

    def estimator(scores: Table, step: Step) -> Table:
        size = noise * max(0.0, 1 - step.index / (ANNEALED * step.total))
        if size == 0:
            return straight_through_topk(scores, step)
        score = whole(scores).detach()  # (tasks, units)
        random = math.sqrt(12) * (whole(step.noise()) - 0.5)
        best = step.best(Parted(score + size * score.std(1, keepdim=True) * random, scores))
        return _straight_through(best, scores)

    return estimator


def hard_concrete(temperature: float = 2 / 3, stretch: tuple[float, float] = (-0.1, 1.1)) -> Estimator:
    """Random gates, many of them exactly 0 or 1 (Louizos et al., ICLR 2018), around the threshold that the budget sets.

    In the end the hard gates of the highest scores.
    """
    low, high = stretch

    def estimator(scores: Table, step: Step) -> Table:
        hard = step.best(scores)
        if step.final:
            return hard
        kept = whole(scores).detach().masked_fill(whole(hard) == 0, torch.inf)
        threshold = kept.amin(1, keepdim=True)  # (tasks, 1)
        gates = {}
        for site, noise in step.noise().items():
            u = noise.clamp(1e-6, 1 - 1e-6)
            soft = ((u.log() - (1 - u).log() + scores[site] - threshold) / temperature).sigmoid()
            gates[site] = (soft * (high - low) + low).clamp(0, 1)
        return gates

    return estimator


def ranking(scores: Table, step: Step) -> Table:
    """Open gates, exactly, while gradients are gathered in the scores; then the hard gates of the highest."""
    if step.final:
        return step.best(scores)
    return {site: 1 + (score - score.detach()) for site, score in scores.items()}


# --- updates: change scores in place ---------------------------------------------------------------------------------


def normalised_step(lr: float) -> Update:
    """scores −= lr · gradient / ‖gradient‖₂, the norm over one task's units of one site."""

    def update(scores: Table, gradients: Table, step: Step, state: Table) -> None:
        for site, gradient in gradients.items():
            scores[site] -= lr * F.normalize(gradient, dim=1)

    return update


def momentum_step(
    momentum: float, over: Literal["network", "site"] = "network", rate: float = 1.0, hold: float = 0.0
) -> Update:
    """m ← momentum · m + gradient per task; scores −= rate · ½(1 + cos(π s/S)) · √units · m / ‖m‖₂.

    Of one length whatever the loss (normalised gradient descent with momentum; Cutkosky and Mehta, ICML 2020). The
    gradients are added up as they are, so that a loss may show other parts of itself in other steps.
    over: units and norm are those of all sites, or those of each site, which then move alike whatever they count.
    hold: for what part of the steps their length stays `rate`; the cosine is over those that are left.
    """

    def scaled(m: Tensor, units: list[int]) -> Tensor:
        norm = torch.stack([torch.linalg.vector_norm(part, dim=1) for part in m.split(units, 1)], 1)  # (tasks, parts)
        norm = torch.where(norm > 1e-12, norm, torch.inf)  # rounding, of a student that is the full network still
        length = norm.reciprocal() * norm.new_tensor(units).sqrt()
        part_of = torch.arange(len(units)).repeat_interleave(torch.tensor(units))  # (units,)
        return length.index_select(1, part_of.to(m.device)) * m

    def update(scores: Table, gradients: Table, step: Step, state: Table) -> None:
        falling = max(0.0, step.index / step.total - hold) / (1 - hold)
        now = rate * (1 + math.cos(math.pi * falling)) / 2
        m, before = whole(gradients), state.get("momentum")
        m = state["momentum"] = m if before is None else m.add(before, alpha=momentum)
        units = [gradient.shape[1] for gradient in gradients.values()]
        directions = Parted(scaled(m, units if over == "site" else [sum(units)]), gradients)
        for site, direction in directions.items():
            scores[site].sub_(direction, alpha=now)

    return update


def averaged(update: Update, begin: float = ANNEALED, end: float = 1.0) -> Update:
    """As `update` until `end`, a part of the steps; scores are then their means since `begin`, and stay so.

    Steps after `end` are for what closed units put out; where that is not learnt, both are stretched to the whole run.

    An open unit's gate has less of a gradient than a closed one's, since what the unit puts out is as in the full
    network then. Without noise units at the edge of the budget therefore take turns, and which of them are kept in the
    last step is chance. (Averages of the last steps: Jain et al., JMLR 2018.)
    """

    def averaging(scores: Table, gradients: Table, step: Step, state: Table) -> None:
        total = step.total if step.closed == "optimal" else step.total / end
        first = min(round(begin * total), step.total - 1)
        last = max(first, round(end * total) - 1)
        if step.index > last:
            return
        update(scores, gradients, step, state)
        if step.index < first:
            return
        share = whole(scores) / (last - first + 1)
        state["average"] = state["average"] + share if "average" in state else share
        if step.index == last:
            for site, mean in Parted(state["average"], scores).items():
                scores[site].copy_(mean)

    return averaging


def gather(scores: Table, gradients: Table, step: Step, state: Table) -> None:
    """scores −= gradient: what the loss loses, to first order, when a gate closes."""
    for site, gradient in gradients.items():
        scores[site] -= gradient


# --- first scores: (units, the task's own randomness) -> (units,) ----------------------------------------------------


def normal(units: int, generator: torch.Generator) -> Tensor:
    return torch.randn(units, generator=generator, dtype=torch.float64)


def near_zero(units: int, generator: torch.Generator) -> Tensor:
    """Ties broken by chance: the first units to be closed would all be those of the last site."""
    return 1e-3 * normal(units, generator)


def zeros(units: int, generator: torch.Generator) -> Tensor:
    return torch.zeros(units, dtype=torch.float64)


# --- schedules: what part of that which is to be closed is open still ------------------------------------------------


def cubic(index: int, total: int) -> float:
    """From near 1 to 0 along a cubic over the first 70 % of the steps (Zhu and Gupta's pruning schedule, 2017).

    Never 1: with every gate open the loss has no gradient, and a normalised step would be one of rounding errors.
    """
    return (1 - min(1.0, (index + 1) / (ANNEALED * total))) ** 3
