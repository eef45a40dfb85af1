"""How masks are learnt: a `Method` is an objective, an estimator and an update, plain callables each.

`nad` is the authors' algorithm; `class_only` and `contrastive` are the recipe that we measured to be better and faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from . import objectives
from .errors import LearningError

Table = dict[str, Tensor]  # {site: (tasks, units)}


@dataclass(frozen=True)
class Pass:
    """One forward pass: outputs (samples, classes) and what left each site, {site: (samples, elements)}."""

    outputs: Tensor
    sites: Mapping[str, Tensor]


@dataclass(frozen=True)
class Samples:
    """Which sample went through whose gates. All of shape (samples,).

    rows: the task's row. classes: the model output that this task is about. positive: the sample is of that class.
    """

    rows: Tensor
    classes: Tensor
    positive: Tensor


@dataclass(frozen=True)
class Step:
    """Where the learning stands: step number `index` of `total`, and the share of units kept at it."""

    index: int
    total: int
    keep: float


Objective = Callable[[Pass, Pass, Samples, Table], Tensor]  # student, teacher, samples, gates -> (tasks,) losses
Estimator = Callable[[Table, Step], Table]  # scores -> gates in [0, 1], through which gradients flow
Update = Callable[
    [Table, Table, Step, Table], None
]  # scores, gradients, step, state: changes scores and state in place


@dataclass(frozen=True)
class Method:
    """A way to learn masks. Samples come `epochs` times from the loader in batches of one task ("own"), or in `steps`
    draws of `positives` and `negatives` per task from images kept in memory ("balanced")."""

    name: str
    objective: Objective
    estimator: Estimator
    update: Update
    initial: Callable[[int, torch.Generator], Tensor]
    sampling: Literal["own", "balanced"]
    closed: Literal["zero", "mean"]
    keep: float | None  # None: how much is kept follows from the objective
    epochs: int = 1
    batch: int = 16
    steps: int = 0
    positives: int = 0
    negatives: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        needed = ("epochs", "batch") if self.sampling == "own" else ("steps", "positives")
        for name in needed:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise LearningError(f"{self.name}: expected {name} of at least 1, got {getattr(self, name)!r}")


# --- the authors' method ---------------------------------------------------------------------------------------------


def nad(*, beta: float = 0.2, lr: float = 0.1, epochs: int = 21, batch: int = 16) -> Method:
    """Hu et al., ICCV 2021, as in the authors' findpath.py.

    One logit per unit, standard normal at the start; gate = sigmoid(logit). Loss of a task over L sites, with S the
    samples that the open network classifies correctly (a batch without any is skipped):
    (1/L) [CE(all samples) + Σ_l MSE(gated_l[S], open_l[S])] + beta (1/L) Σ_l mean(gate_l²).
    Step: logits −= lr · gradient / ‖gradient‖₂, the norm over one site. Only the class's own images are seen.

    Kept as it is, faults of the idea included: gates are soft while learning and made hard (> 0.5) afterwards, which
    opens a gap, and nothing punishes a sub-architecture that answers its class to everything. beta does not carry
    over between networks; the authors' values for ImageNet are 4.5 (VGG16), 0.02 (ResNet50, DenseNet121), 0.45 (DARTS).
    """

    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> Tensor:
        tasks = len(next(iter(gates.values())))
        correct = (teacher.outputs.argmax(1) == samples.classes).nonzero()[:, 0]
        entropy = objectives.per_task(objectives.cross_entropy(student.outputs, samples.classes), samples.rows, tasks)
        distance = torch.zeros_like(entropy)
        for site, activation in student.sites.items():
            per_sample = objectives.mse(activation[correct], teacher.sites[site][correct])
            distance = distance + objectives.per_task(per_sample, samples.rows[correct], tasks)
        loss = (entropy + distance) / len(gates) + beta * objectives.squared_gates(gates)
        learns = torch.bincount(samples.rows[correct], minlength=tasks) > 0
        return torch.where(learns, loss, torch.zeros_like(loss))

    return Method(
        "nad", objective, sigmoid, normalised_step(lr), _normal, "own", "zero", None, epochs=epochs, batch=batch,
        options={"beta": beta, "lr": lr, "epochs": epochs, "batch": batch},
    )  # fmt: skip


def sigmoid(scores: Table, step: Step) -> Table:
    return {site: score.sigmoid() for site, score in scores.items()}


def normalised_step(lr: float) -> Update:
    """scores −= lr · gradient / ‖gradient‖₂, the norm over one task's units of one site."""

    def update(scores: Table, gradients: Table, step: Step, state: Table) -> None:
        for site, gradient in gradients.items():
            scores[site] -= lr * F.normalize(gradient, dim=1)

    return update


def _normal(units: int, generator: torch.Generator) -> Tensor:
    return torch.randn(units, generator=generator, dtype=torch.float64)


# --- ours ------------------------------------------------------------------------------------------------------------


def contrastive(
    *, steps: int = 180, positives: int = 4, negatives: int = 4, momentum: float = 0.8, activation: float = 0.1
) -> Method:
    """Keeps the units that a task needs to say yes to its own samples and no to others.

    Scores start near 0; each pass uses the hard gates of the highest scores over all sites, a share that falls from 1
    to `keep` along a cubic; gradients go straight through to the scores. Loss of a task: the KL divergence of "this
    class or another" from the full network, mean over positives plus mean over uniformly drawn negatives, plus
    `activation` × the mean over sites of the relative squared change of the activations, on positives.
    """
    return _straight_through("contrastive", steps, positives, negatives, momentum, activation)


def class_only(*, steps: int = 32, positives: int = 4, momentum: float = 0.9, activation: float = 1.0) -> Method:
    """As `contrastive`, but shown only the class's own samples, as the paper's method is."""
    return _straight_through("class-only", steps, positives, 0, momentum, activation)


def from_objective(objective: Objective) -> Method:
    """`contrastive` with another objective."""
    name = getattr(objective, "__name__", type(objective).__name__)
    return _straight_through(name, 180, 4, 4, 0.8, 0.1, objective)


def _straight_through(
    name: str,
    steps: int,
    positives: int,
    negatives: int,
    momentum: float,
    activation: float,
    objective: Objective | None = None,
) -> Method:
    options: dict[str, float] = {"steps": steps, "positives": positives, "negatives": negatives}
    options |= {"momentum": momentum, "activation": activation}
    objective = objective or _fidelity(activation)
    return Method(
        name, objective, straight_through_topk, momentum_step(momentum), _near_zero, "balanced", "mean", 0.55,
        steps=steps, positives=positives, negatives=negatives, options=options,
    )  # fmt: skip


def _fidelity(activation: float) -> Objective:
    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> Tensor:
        tasks = len(next(iter(gates.values())))
        yes, no = samples.positive.nonzero()[:, 0], (~samples.positive).nonzero()[:, 0]
        divergence = objectives.binary_kl(student.outputs, teacher.outputs, samples.classes)
        loss = sum(objectives.per_task(divergence[part], samples.rows[part], tasks) for part in (yes, no))
        change = torch.stack(
            [objectives.relative_mse(student.sites[site][yes], teacher.sites[site][yes]) for site in gates]
        ).mean(0)
        return loss + activation * objectives.per_task(change, samples.rows[yes], tasks)

    return objective


def straight_through_topk(scores: Table, step: Step) -> Table:
    """Hard gates of the highest scores over all sites, a share `step.keep` of all units; gradients pass unchanged."""
    everything = torch.cat(list(scores.values()), 1)  # (tasks, all units)
    kept = max(1, round(step.keep * everything.shape[1]))
    best = everything.detach().argsort(dim=1, descending=True, stable=True)[:, :kept]
    hard = torch.zeros_like(everything).scatter(1, best, 1.0)
    through = hard + (everything - everything.detach())
    return dict(zip(scores, through.split([score.shape[1] for score in scores.values()], 1), strict=True))


def momentum_step(momentum: float) -> Update:
    """m ← momentum · m + √units · gradient / ‖gradient‖₂ per task and site; scores −= ½(1 + cos(π s/S)) m."""

    def update(scores: Table, gradients: Table, step: Step, state: Table) -> None:
        rate = (1 + math.cos(math.pi * step.index / step.total)) / 2
        for site, gradient in gradients.items():
            direction = math.sqrt(gradient.shape[1]) * F.normalize(gradient, dim=1)
            state[site] = momentum * state[site] + direction if site in state else direction
            scores[site] -= rate * state[site]

    return update


def kept_share(index: int, total: int, target: float) -> float:
    """From near 1 to `target` along a cubic over the first 70 % of the steps (Zhu and Gupta's pruning schedule, 2017).

    Never 1: with every gate open the loss has no gradient, and a normalised step would be one of rounding errors.
    """
    left = 1 - min(1.0, (index + 1) / (0.7 * total))
    return target + (1 - target) * left**3


def _near_zero(units: int, generator: torch.Generator) -> Tensor:
    """Ties broken by chance: the first units to be closed would all be those of the last site."""
    return 1e-3 * _normal(units, generator)


METHODS: dict[str, Callable[[], Method]] = {"nad": nad, "class-only": class_only, "contrastive": contrastive}
