"""Losses and penalties, as plain callables over the outputs of the gated network (student) and the open one (teacher).

Every function gives one value per sample, (batch,): means are taken later and per task, so that a mixed batch gives
each task what it would get alone.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(outputs: Tensor, labels: Tensor) -> Tensor:
    """Logits (batch, classes), labels (batch,) -> (batch,)."""
    return F.cross_entropy(outputs, labels, reduction="none")


def binary_kl(outputs: Tensor, teacher: Tensor, classes: Tensor) -> Tensor:
    """KL divergence of "this class or any other", teacher from student; logits (batch, classes) -> (batch,).

    classes: (batch,) the one class that counts for each sample.
    """
    return (_binary_log(teacher, classes).exp() * (_binary_log(teacher, classes) - _binary_log(outputs, classes))).sum(
        1
    )


def _binary_log(outputs: Tensor, classes: Tensor) -> Tensor:
    """log p(class) and log p(any other), (batch, 2), without cancellation when p(class) is near 1."""
    own = outputs.gather(1, classes[:, None])
    others = outputs.scatter(1, classes[:, None], -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([own, others], 1) - torch.logaddexp(own, others)


def mse(activation: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over everything but the batch, (batch, …) -> (batch,)."""
    return (activation - teacher).square().flatten(1).mean(1)


def relative_mse(activation: Tensor, teacher: Tensor) -> Tensor:
    """`mse` as a share of the teacher's mean square, so that sites of any scale weigh alike."""
    return mse(activation, teacher) / teacher.square().flatten(1).mean(1).clamp(min=1e-12)


def squared_gates(gates: Mapping[str, Tensor]) -> Tensor:
    """{site: (tasks, units)} gates -> (tasks,): the mean over sites of the mean squared gate (Hu et al., ICCV 2021).

    The penalty that closes gates; weigh it against the loss: `loss + beta * squared_gates(gates.values()).mean()`.
    """
    return torch.stack([gate.square().mean(1) for gate in gates.values()]).mean(0)


def per_task(values: Tensor, rows: Tensor, tasks: int) -> Tensor:
    """Means per task: (samples,) values and task rows -> (tasks,), zero for tasks without samples."""
    sums = values.new_zeros(tasks).index_add(0, rows, values)
    counts = torch.bincount(rows, minlength=tasks).to(values.dtype)
    return sums / counts.clamp(min=1)
