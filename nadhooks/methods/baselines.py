"""What masks are worth that nobody learnt: rankings of units, to compare with and to start from."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import objectives
from .estimators import gather, normal, ranking, zeros
from .parts import Method, Output, Pass, Samples, Step, Table


def random() -> Method:
    """Units by chance."""

    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> Tensor:
        return torch.stack([0 * gate.sum(1) for gate in gates.values()]).sum(0)

    return _ranking("random", objective, initial=normal, steps=1, positives=1, images=32, compares=False, output="any")


def activation(*, images: int = 32) -> Method:
    """Units by the energy of their activation on the class's own samples: mean square, as a share of their site's mean.

    (As a share, or sites of large activations would be kept whole.)
    """

    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> Tensor:
        tasks = len(next(iter(gates.values())))
        gain = torch.zeros(tasks, device=samples.rows.device)
        for site, gate in gates.items():
            energy = teacher.sites[site].square().mean(2)  # (samples, units)
            mine = objectives.per_task(energy / energy.mean(1, keepdim=True).clamp(min=1e-12), samples.rows, tasks)
            gain = gain + (gate * mine).sum(1)
        return -gain

    return _ranking("activation", objective, *_draws(images), output="any", options={"images": images})


def taylor(*, images: int = 32, output: Output = "softmax") -> Method:
    """Units by what log p(class) loses on the class's samples, and gains on others, when they close: to first order.

    The gradient for the gate, which is activation × gradient (Molchanov et al., ICLR 2017), signed; with closed="mean"
    (activation − mean) × gradient. As many samples of others as of the class.
    """

    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> Tensor:
        tasks = len(next(iter(gates.values())))
        surprise = objectives.cross_entropy(student.outputs, samples.classes, output)
        no, yes = objectives.per_side(surprise, samples.rows, samples.positive, tasks).unbind(1)
        return yes - no

    steps, positives = _draws(images)
    options = {"images": images} | ({} if output == "softmax" else {"output": output})
    return _ranking(
        "taylor", objective, steps, positives, negatives=positives, compares=False, output=output, options=options
    )


def routing(*, images: int = 16, steps: int = 30, lr: float = 0.1, penalty: float = 0.05) -> Method:
    """Critical data routing paths (Wang et al., CVPR 2018): control gates for each sample, averaged over the class.

    For each of `images` samples: gates of at least 0 that start at 1, `steps` steps of SGD with momentum 0.9 on the
    cross-entropy with the full network's own prediction plus `penalty` × Σ gates. Units by their mean gate.
    """

    def objective(student: Pass, teacher: Pass, samples: Samples, gates: Table) -> dict[str, Tensor]:
        tasks = len(next(iter(gates.values())))
        predicted = teacher.outputs.argmax(1)
        entropy = objectives.cross_entropy(student.outputs, predicted)
        size = torch.stack([gate.sum(1) for gate in gates.values()]).sum(0)
        return {"cross-entropy": objectives.per_task(entropy, samples.rows, tasks), "gates": penalty * size}

    def estimator(scores: Table, step: Step) -> Table:
        return step.best(scores) if step.final else dict(scores)

    def update(scores: Table, gradients: Table, step: Step, state: Table) -> None:
        for site, gradient in gradients.items():
            state[site] = 0.9 * state[site] + gradient if site in state else gradient
            scores[site] -= lr * state[site]
            scores[site].clamp_(min=0)

    options = {"images": images, "steps": steps, "lr": lr, "penalty": penalty}
    return Method(
        "routing", objective, estimator, update, _ones, "each", "zero", 0.55,
        compares=False, steps=steps, positives=images, options=options,
    )  # fmt: skip


def _draws(images: int) -> tuple[int, int]:
    """(steps, positives) that show so many images, in draws of at most 8."""
    steps = max(1, -(-images // 8))
    return steps, -(-images // steps)


def _ranking(name: str, objective, steps: int, positives: int, *, initial=zeros, **more) -> Method:  # type: ignore[no-untyped-def]
    return Method(
        name,
        objective,
        ranking,
        gather,
        initial,
        "balanced",
        "mean",
        0.55,
        ranks=True,
        steps=steps,
        positives=positives,
        **more,
    )


def _ones(units: int, generator: torch.Generator) -> Tensor:
    return torch.ones(units, dtype=torch.float64)
