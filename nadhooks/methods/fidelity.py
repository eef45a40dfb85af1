"""Our methods: hard gates from the first step on, learnt to stay close to the full network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import objectives
from .estimators import ANNEALED, averaged, cubic, momentum_step, near_zero, perturbed_topk, straight_through_topk
from .parts import Method, Objective, Output, Pass, Samples, Table

PACE = {"contrastive": 3.72, "class-only": 1.0}  # 82 steps for a share of 0.55 and 782 for one of 0.3 came out well
TURNS = {"contrastive": 6, "class-only": 3}  # steps in which each site is compared with the open network's once
# by what closed units put out: the share closed from which on activations weigh as much as `activation` says, and how
# many times as much at most where less is
EMPHASIS = {"optimal": (0.39, 400.0), "mean": (0.5, 400.0), "zero": (0.57, 4.5)}
FEW = 0.25  # the share kept below which the order of samples counts
SURE = 1e4  # log-odds; of logits at −∞ they are infinite
TINY = 1e-12  # a square; logits that hardly differ differ by rounding


def contrastive(
    *,
    steps: int | None = None,
    positives: int = 3,
    negatives: int = 3,
    momentum: float = 0.8,
    activation: float = 2.75,
    contrast: float = 0.85,
    order: float = 0.7,
    noise: float = 1.0,
    floor: float = 0.25,
    shallow: float = 0.31,
    constants: float = 0.0015,
    images: int = 64,
    output: Output = "softmax",
) -> Method:
    """Keeps the units that a task needs to say yes to its own samples and no to others.

    Scores start near 0; each pass uses the hard gates of the highest scores over all sites, a share that falls from 1
    to `keep` along a cubic, with noise of `noise` times their standard deviation at first and none in the end;
    gradients go straight through to the scores, in steps of one length for each task. From 65 % of the steps to 90 %
    scores are averaged; the averages' best units are kept, and the last steps are for what closed units put out. That
    is learnt along with the scores, in steps of `constants` standard deviations of each unit, from its mean on, or from
    beside it where a ReLU would stop the gradients (`nadhooks.starting`). Loss of a task:
    −log p(class), mean over positives, plus `contrast` × the KL divergence of "this class or another" from the full
    network, mean over uniformly drawn negatives, both of logits brought to the spread of the full network's, plus
    `activation` × the mean over sites of the relative squared change of the activations, on positives and on negatives;
    a sixth of the sites in each step, by turns. Where less than 0.39 of the units is closed, activations weigh more:
    (0.39 / share closed)³ times as much, 400 times at most. In a part of the steps, `shallow`, no gradient leads back
    to the first quarter of the sites; in the others theirs is larger instead (see `Method`). Where less than a quarter
    is kept, by few = 0.25 / share − 1, negatives count 1 + few / 5 times as much, and
    `order` × few × log(1 + exp(−difference of log-odds)) is added, mean over pairs of a positive and a negative.

    With `closed` "zero" or "mean", which leave nothing else to be learnt, scores have all the steps, of which there are
    more (`Method.paced`), and activations weigh more, by a like cube, where less than 0.5 is closed to the mean, or
    less than 0.57 to zero, 4.5 times at most for zero.

    floor: what every site keeps at least, as a part of `keep`; a site that closed altogether would let nothing through,
        and no gradient either, so that it stayed closed.
    steps: by default 82 for a `keep` of 0.55, and more for less (see `Method.pace`). images: of each label, in memory;
        more of them as there are more steps, unless `steps` is given.
    """
    objective = _Fidelity(TURNS["contrastive"], output, activation, contrast, order)
    method = _straight_through("contrastive", steps, 82, positives, negatives, momentum, objective, constants, images)
    options = {**method.options, "noise": noise, "floor": floor, "shallow": shallow}
    update = averaged(momentum_step(momentum), 0.65, 0.9)  # from when units are furthest apart; then constants alone
    estimator = perturbed_topk(noise)
    return replace(
        method, estimator=estimator, update=update, floor=floor, shallow=shallow, closed="optimal", options=options
    )


def class_only(
    *,
    steps: int | None = None,
    positives: int = 2,
    momentum: float = 0.6,
    activation: float = 3.0,
    constants: float = 0.0005,
    images: int = 32,
    output: Output = "softmax",
) -> Method:
    """As `contrastive`, but shown only the class's own samples, as the paper's method is.

    They are held to the full network's answer by the same KL divergence: to ask for the class, with nothing to say no
    to, would be to ask for a network that answers it to everything. There is no noise; activations are compared at a
    third of the sites in each step, and scores averaged over the last 30 % of the steps. steps: by default 40 for a
    `keep` of 0.55.
    """
    objective = _Fidelity(TURNS["class-only"], output, activation)
    return _straight_through("class-only", steps, 40, positives, 0, momentum, objective, constants, images)


def from_objective(objective: Objective) -> Method:
    """`contrastive` with another objective, for models of any output.

    Every site moves as far, for an objective that says nothing of the sites may have nearly all its gradient in one;
    in every step, for one that is about the first sites alone says nothing in a shallow one.
    """
    name = getattr(objective, "__name__", type(objective).__name__)
    draws = {"steps": 0, "positives": 0, "negatives": 0, "images": 0}
    method = replace(contrastive(output="any", shallow=0.0), name=name, objective=objective, options=draws)
    return replace(method, compares=True, update=averaged(momentum_step(0.8, over="site")), closed="mean")


def _straight_through(
    name: str,
    steps: int | None,
    usual: int,
    positives: int,
    negatives: int,
    momentum: float,
    objective: _Fidelity,
    constants: float,
    images: int,
) -> Method:
    pace = PACE[name] if steps is None else 0.0
    steps = usual if steps is None else steps
    options: dict[str, float | str] = {"steps": steps, "positives": positives, "negatives": negatives}
    options |= {"momentum": momentum, "activation": objective.activation, "constants": constants, "images": images}
    options |= {"contrast": objective.contrast, "order": objective.order} if negatives else {}
    options |= {} if objective.output == "softmax" else {"output": objective.output}
    return Method(
        name, objective, straight_through_topk, averaged(momentum_step(momentum)), near_zero, "balanced", "mean", 0.55,
        schedule=cubic, output=objective.output, compares=objective.activation > 0, steps=steps, pace=pace,
        positives=positives, negatives=negatives, images=images, options=options,
        closing=momentum_step(0.8, over="site", rate=constants, hold=ANNEALED),
    )  # fmt: skip


@dataclass(frozen=True)
class _Fidelity:
    """The objective of both; without `contrast` there are own samples alone, which have nothing to be told from."""

    turns: int
    output: Output
    activation: float
    contrast: float = 0.0
    order: float = 0.0

    def __call__(self, student: Pass, teacher: Pass, samples: Samples, gates: Table) -> dict[str, Tensor]:
        tasks = len(next(iter(gates.values())))
        outputs = student.outputs
        if self.contrast:
            outputs = _to_scale(outputs, teacher.outputs, samples, tasks, self.output)
        divergence = objectives.binary_kl(outputs, teacher.outputs, samples.classes, self.output)
        surprise = objectives.cross_entropy(outputs, samples.classes, self.output) if self.contrast else divergence
        change = self._change(student, teacher, samples.step, list(gates)) if self.activation else divergence
        values = torch.stack([surprise, divergence, change], 1)  # (samples, 3)
        others, own = objectives.per_side(values, samples.rows, samples.positive, tasks).unbind(1)  # (tasks, 3) each
        terms = {"positives": own[:, 0]}
        if self.contrast:
            few = _few(samples)
            weight = self.contrast * (1 + few / 5)  # or order would be had by saying yes to nearly all
            terms["negatives"] = weight * others[:, 1]
            if self.order and bool((few > 0).any()):
                misordered = _misordered(student.outputs, teacher.outputs, samples, tasks, self.output)
                terms["order"] = self.order * few * misordered
        if self.activation:
            emphasis = _emphasis(samples) if self.contrast else 1
            terms["activation"] = self.activation * emphasis * (others[:, 2] + own[:, 2])
        return terms

    def _change(self, student: Pass, teacher: Pass, step: int, sites: Sequence[str]) -> Tensor:
        """How far activations are from the full network's, (samples,), at those sites whose turn it is."""
        apart = min(self.turns, len(sites))
        turn = sites[step % apart :: apart]
        change = [objectives.relative_mse(student.sites[site], teacher.sites[site]) for site in turn]
        return apart / len(sites) * torch.stack(change).sum(0)


def _few(samples: Samples) -> Tensor:
    """How far below a quarter the share is that is kept, (tasks,): 0 from there on, 1 at an eighth."""
    return torch.zeros(()) if samples.keep is None else (FEW / samples.keep - 1).clamp(min=0)


def _emphasis(samples: Samples) -> Tensor | float:
    """How many times as much activations weigh where less is closed than usual, (tasks,).

    They change less there, and what else the loss asks for leaves open which units do it.
    """
    if samples.keep is None:
        return 1.0
    closed, most = EMPHASIS[samples.closed]
    return (closed / (1 - samples.keep).clamp(min=TINY)).pow(3).clamp(1, most)


def _misordered(outputs: Tensor, teacher: Tensor, samples: Samples, tasks: int, output: Output) -> Tensor:
    """log(1 + exp(another's log-odds − own sample's)), mean over a task's pairs (RankNet; Burges et al., ICML 2005).

    Log-odds brought to the spread over the task's samples that the full network's have: where so few units are left
    that every sample is answered alike, the other terms ask for another answer to all, and only this one for different
    ones.
    """
    now, before = (objectives.log_odds(x, samples.classes, output).clamp(-SURE, SURE) for x in (outputs, teacher))

    def variance(x: Tensor) -> Tensor:
        mean = objectives.per_task(x, samples.rows, tasks)
        return objectives.per_task((x - mean[samples.rows]).square(), samples.rows, tasks)

    now = now * _factor(variance(before), variance(now.detach()), 1e4)[samples.rows]
    together = samples.rows[:, None] == samples.rows
    own, others = (together & samples.positive[:, None] & ~samples.positive).nonzero(as_tuple=True)
    return objectives.per_task(F.softplus(now[others] - now[own]), samples.rows[own], tasks)


def _to_scale(outputs: Tensor, teacher: Tensor, samples: Samples, tasks: int, output: Output) -> Tensor:
    """Logits brought to the spread that the full network's have, by one factor for all of a task's samples.

    Closing units shrinks logits, and where all are small every sample pulls alike, however easy to tell. No gradient
    leads through the factor, so that to be larger counts still. (Logits standardised for distillation, each sample's
    for itself and with the gradient: Sun et al., CVPR 2024.)
    """
    both, classes = torch.cat([teacher, outputs.detach()]), torch.cat([samples.classes] * 2)
    spread = objectives.spread(both, classes, output).unflatten(0, (2, -1)).T  # (samples, 2)
    before, after = objectives.per_task(spread, samples.rows, tasks).unbind(1)
    return outputs * _factor(before, after, 100.0)[samples.rows][:, None]


def _factor(before: Tensor, after: Tensor, largest: float) -> Tensor:
    """What brings values of one variance to another, at most `largest`."""
    least = (before / largest**2).clamp(min=TINY)
    return (before.clamp(min=TINY) / torch.maximum(after, least)).sqrt()
