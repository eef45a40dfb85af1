"""Our methods: hard gates from the first step on, learnt to stay close to the full network."""

from __future__ import annotations

from torch import Tensor

from .. import objectives
from .estimators import cubic, momentum_step, near_zero, straight_through_topk
from .parts import Method, Objective, Output, Pass, Samples, Table


def contrastive(
    *,
    steps: int = 180,
    positives: int = 4,
    negatives: int = 4,
    momentum: float = 0.8,
    activation: float = 0.1,
    images: int | None = None,
    output: Output = "softmax",
) -> Method:
    """Keeps the units that a task needs to say yes to its own samples and no to others.

    Scores start near 0; each pass uses the hard gates of the highest scores over all sites, a share that falls from 1
    to `keep` along a cubic; gradients go straight through to the scores. Loss of a task: the KL divergence of "this
    class or another" from the full network, mean over positives plus mean over uniformly drawn negatives, plus
    `activation` × the mean over sites of the relative squared change of the activations, on positives.
    """
    return _straight_through("contrastive", steps, positives, negatives, momentum, activation, images, output)


def class_only(
    *,
    steps: int = 32,
    positives: int = 4,
    momentum: float = 0.9,
    activation: float = 1.0,
    images: int | None = None,
    output: Output = "softmax",
) -> Method:
    """As `contrastive`, but shown only the class's own samples, as the paper's method is."""
    return _straight_through("class-only", steps, positives, 0, momentum, activation, images, output)


def from_objective(objective: Objective) -> Method:
    """`contrastive` with another objective, for models of any output."""
    name = getattr(objective, "__name__", type(objective).__name__)
    return _straight_through(name, 180, 4, 4, 0.8, 0.1, None, "any", objective)


def _straight_through(
    name: str,
    steps: int,
    positives: int,
    negatives: int,
    momentum: float,
    activation: float,
    images: int | None,
    output: Output,
    objective: Objective | None = None,
) -> Method:
    options: dict[str, float | str] = {"steps": steps, "positives": positives, "negatives": negatives}
    options |= {"momentum": momentum, "activation": activation}
    options |= ({} if images is None else {"images": images}) | ({} if output == "softmax" else {"output": output})
    return Method(
        name, objective or _fidelity(activation, output), straight_through_topk, momentum_step(momentum), near_zero,
        "balanced", "mean", 0.55, schedule=cubic, output=output, compares=objective is not None or activation > 0,
        steps=steps, positives=positives, negatives=negatives, images=images, options=options,
    )  # fmt: skip


def _fidelity(activation: float, output: Output) -> Objective:
    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> dict[str, Tensor]:
        tasks = len(next(iter(gates.values())))
        yes, no = samples.positive.nonzero()[:, 0], (~samples.positive).nonzero()[:, 0]
        divergence = objectives.binary_kl(student.outputs, teacher.outputs, samples.classes, output)
        terms = {
            name: objectives.per_task(divergence[part], samples.rows[part], tasks)
            for name, part in (("positives", yes), ("negatives", no))
            if len(part)
        }
        if activation and len(yes):
            before, after = teacher.take(yes), student.take(yes)
            changes = [objectives.relative_mse(after.sites[site], before.sites[site]) for site in gates]
            mean = sum(changes[1:], changes[0]) / len(changes)
            terms["activation"] = activation * objectives.per_task(mean, samples.rows[yes], tasks)
        return terms

    return objective
