"""As little as fidelity allows: masks at many shares, and of each task the smallest that is close enough."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import objectives
from .learner import Found, Learner, by_sample, on_device, terms_of
from .sampling import SAMPLES_PER_PASS, balanced_batches
from .teaching import Teacher

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)
REFINED = 2  # shares between the last that is faithful enough and the first that is not


def faithful(learner: Learner, bound: float) -> tuple[Found, dict[str, Any]]:
    """For each task the fewest units with which its held-out divergence is at most `bound`, and all that was tried.

    Masks are learnt at shares from much to little, and then between the smallest that does and the next. A task for
    which two shares in a row do not is done; one for which none does keeps all.
    """
    assert learner.selection is not None  # without a budget there is no `fidelity`
    selection = learner.selection
    tasks = len(learner.tasks)
    best = learner.everything()
    good, bad = torch.ones(tasks), torch.zeros(tasks)  # the smallest share that does, the next one that does not
    failed = torch.zeros(tasks)  # shares in a row
    shares: list[Tensor] = []
    divergences: list[Tensor] = []

    def attempt(share: Tensor, several: bool = False) -> None:
        learnt = learner.learnt(selection.at(share), several)
        found = divergence(learner, learnt)
        does = (found <= bound) & (failed < 2)
        better = does & (share < good)
        for mine, other in zip(best, learnt, strict=True):
            for name, value in other.items():
                mine[name] = torch.where(better[:, None], value, mine[name])
        good.copy_(torch.where(better, share, good))
        bad.copy_(torch.where(~does & (share < good), torch.maximum(bad, share), bad * (bad < good)))
        failed.copy_(torch.where(does, 0, failed + 1))
        shares.append(share)
        divergences.append(found)

    for share in SHARES:
        attempt(torch.full((tasks,), share))
        if bool((failed >= 2).all()):
            break
    failed.zero_()
    for _ in range(REFINED):
        attempt((good + bad) / 2, several=True)
    curve = {
        "keep": [[round(float(x), 4) for x in row] for row in shares],
        "divergence": [[round(float(x), 6) for x in row] for row in divergences],
    }
    return best, curve


def divergence(learner: Learner, learnt: Found) -> Tensor:
    """(tasks,) how far these gates are from the full network on held-out samples."""
    assert learner.held is not None  # `read` made it
    method = learner.measuring()
    teacher = Teacher(learner.teacher.forward, 0, method.compares)
    size = max(1, SAMPLES_PER_PASS // (method.positives + method.negatives))
    parts = []
    for rows in torch.arange(len(learner.tasks)).split(size):
        tasks = learner.tasks.select(rows.tolist())
        table, constants = (
            {name: value[rows].to(learner.gates.logits[name]) for name, value in part.items()} for part in learnt
        )
        found = []
        for batch in balanced_batches(learner.held, learner.data, tasks, method, learner.seed):
            moving = on_device(batch.samples, teacher.forward.device)
            answers = teacher.of(batch.inputs, batch.keys)
            handed = by_sample(table, moving.rows), by_sample(constants, moving.rows)
            with torch.no_grad(), learner.gates.apply(*handed):
                student = teacher.forward(batch.inputs, len(batch.keys))
                if method.output == "any":
                    terms = terms_of(method.objective(student, answers, moving, table), len(tasks), learns=False)
                else:
                    far = objectives.binary_kl(student.outputs, answers.outputs, moving.classes, method.output)
                    no, yes = objectives.per_side(far, moving.rows, moving.positive, len(tasks)).unbind(1)
                    terms = {"positives": yes, "negatives": no}
            found.append(torch.stack(list(terms.values())).sum(0))
        parts.append(torch.stack(found).mean(0).cpu())
    return torch.cat(parts)
