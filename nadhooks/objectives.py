"""Losses and penalties, as plain callables over the outputs of the gated network (student) and the open one (teacher).

Every function gives one value per sample, (batch,): means are taken later and per task, so that a mixed batch gives
each task what it would get alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .batching import few

Output = Literal["softmax", "sigmoid", "any"]


def cross_entropy(outputs: Tensor, classes: Tensor, output: Output = "softmax") -> Tensor:
    """−log p(class): logits (batch, classes) -> (batch,).

    classes: (batch,) labels, or (batch, classes) booleans where several outputs mean one answer. output: "softmax", or
    "sigmoid" where every output is a yes or no of its own; of several, the strongest counts.
    """
    if output == "softmax" and classes.dim() == 1:
        return F.cross_entropy(outputs, classes, reduction="none")
    return -_binary_log(outputs, classes, output)[:, 0]


def correct(outputs: Tensor, classes: Tensor, output: Output = "softmax") -> Tensor:
    """Whether the answer is the class, (batch,) bool: the largest logit, or with "sigmoid" one above 0."""
    if output == "sigmoid":
        return _own(outputs, classes).amax(1) > 0
    best = outputs.argmax(1)
    return best == classes if classes.dim() == 1 else classes.gather(1, best[:, None])[:, 0]


def binary_kl(outputs: Tensor, teacher: Tensor, classes: Tensor, output: Output = "softmax") -> Tensor:
    """KL divergence of "this class or any other", teacher from student; logits (batch, classes) -> (batch,).

    classes, output: as for `cross_entropy`.
    """
    before, after = _binary_log(teacher, classes, output), _binary_log(outputs, classes, output)
    least = torch.finfo(before.dtype).min / 4  # a probability of 0 counts for nothing where the teacher has it
    before, after = before.clamp(min=least), after.clamp(min=least)
    return (before.exp() * (before - after)).sum(1)


def spread(outputs: Tensor, classes: Tensor, output: Output = "softmax") -> Tensor:
    """How far apart a sample's logits are, squared: (batch, classes) -> (batch,).

    Their variance, those at −∞ left out; with "sigmoid" the square of the class's own logit. classes: as for
    `cross_entropy`.
    """
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    if output == "sigmoid":
        return _own(outputs, classes).amax(1).to(dtype).square()
    finite = outputs.to(dtype).masked_fill(outputs.isinf(), torch.nan)
    return (finite - finite.nanmean(1, keepdim=True)).square().nanmean(1)


def log_odds(outputs: Tensor, classes: Tensor, output: Output = "softmax") -> Tensor:
    """log p(class) − log p(any other), (batch,); classes, output: as for `cross_entropy`."""
    own, others = _binary_log(outputs, classes, output).unbind(1)
    return own - others


def log_probability(outputs: Tensor, classes: Tensor, output: Output = "softmax") -> Tensor:
    """log p(class), (batch,)."""
    return _binary_log(outputs, classes, output)[:, 0]


def _binary_log(outputs: Tensor, classes: Tensor, output: Output) -> Tensor:
    """log p(class) and log p(any other), (batch, 2), without cancellation when p(class) is near 1."""
    if output == "sigmoid":
        logit = _own(outputs, classes).amax(1)
        return torch.stack([F.logsigmoid(logit), F.logsigmoid(-logit)], 1)
    if classes.dim() == 1:
        own = outputs.gather(1, classes[:, None])
        others = outputs.scatter(1, classes[:, None], -torch.inf).logsumexp(1, keepdim=True)
    else:
        own = _own(outputs, classes).logsumexp(1, keepdim=True)
        others = outputs.masked_fill(classes, -torch.inf).logsumexp(1, keepdim=True)
    return torch.cat([own, others], 1) - torch.logaddexp(own, others)


def _own(outputs: Tensor, classes: Tensor) -> Tensor:
    """The logits of the class's outputs, (batch, …), -inf elsewhere."""
    return outputs.gather(1, classes[:, None]) if classes.dim() == 1 else outputs.masked_fill(~classes, -torch.inf)


def mse(activation: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference over everything but the batch, (batch, …) -> (batch,)."""
    return cast(Tensor, _SquaredDistance.apply(activation, teacher)) / max(1, teacher[:1].numel())


def relative_mse(activation: Tensor, teacher: Tensor) -> Tensor:
    """`mse` as a share of the teacher's mean square, so that sites of any scale weigh alike."""
    positions = max(1, teacher[:1].numel())
    distance = cast(Tensor, _SquaredDistance.apply(activation, teacher))
    return distance / _sum_of_squares(teacher.detach()).clamp(min=1e-12 * positions)


class _SquaredDistance(torch.autograd.Function):
    """Σ (a − b)² over everything but the batch, (batch, …) -> (batch,).

    Sites are large, and `nad` compares all of them at once: what is kept for the way back is there anyway, and the
    difference is taken of some samples after others.
    """

    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        some = few(a)
        return torch.cat([_sum_of_squares(x - y) for x, y in zip(a.split(some), b.split(some), strict=True)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        a, b = ctx.saved_tensors
        slope = (a - b).mul_((2 * grad).to(a.dtype).reshape(-1, *[1] * (a.dim() - 1)))
        return slope, -slope if ctx.needs_input_grad[1] else None


def _sum_of_squares(x: Tensor) -> Tensor:
    dtype = torch.promote_types(x.dtype, torch.float32)  # bfloat16 is too coarse for sums
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), dtype=dtype).square()


def squared_gates(gates: Mapping[str, Tensor]) -> Tensor:
    """{site: (tasks, units)} gates -> (tasks,): the mean over sites of the mean squared gate (Hu et al., ICCV 2021).

    The penalty that closes gates; weigh it against the loss: `loss + beta * squared_gates(gates.values()).mean()`.
    """
    return torch.stack([gate.square().mean(1) for gate in gates.values()]).mean(0)


def per_task(values: Tensor, rows: Tensor, tasks: int) -> Tensor:
    """Means per task: (samples, …) values and task rows -> (tasks, …), zero for tasks without samples."""
    sums = values.new_zeros(tasks, *values.shape[1:]).index_add(0, rows, values)
    counts = torch.bincount(rows, minlength=tasks).to(values.dtype).clamp(min=1)
    return sums / counts.reshape(-1, *[1] * (values.dim() - 1))


def per_side(values: Tensor, rows: Tensor, positive: Tensor, tasks: int) -> Tensor:
    """Means of a task's negatives and of its positives: (samples, …) values, task rows, booleans -> (tasks, 2, …)."""
    return per_task(values, 2 * rows + positive, 2 * tasks).unflatten(0, (tasks, 2))
