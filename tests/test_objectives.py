from __future__ import annotations

import math

import pytest
import torch

from nadhooks import objectives


def test_distances_are_their_formulas() -> None:
    a = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    b = torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[2.0, 0.0], [0.0, 0.0]]], dtype=torch.float64)
    assert objectives.mse(a, b).tolist() == [(0 + 1 + 4 + 9) / 4, 4 / 4]
    torch.testing.assert_close(objectives.relative_mse(a, b), torch.tensor([14 / 4, 4 / 4], dtype=torch.float64))


def test_distances_have_right_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 4, 5, dtype=torch.float64, generator=generator).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(objectives.mse, (a, b))
    assert torch.autograd.gradcheck(lambda a: objectives.relative_mse(a, b.detach()), a)


def test_distances_of_half_precision_are_summed_in_full() -> None:
    a, b = (torch.full((1, 4096), value, dtype=torch.bfloat16) for value in (1.0, 0.0))
    distance = objectives.mse(a, b)
    assert distance.dtype == torch.float32
    assert distance.tolist() == [1.0]


def test_spread_is_the_variance_of_what_is_finite_or_the_own_logit_squared() -> None:
    outputs = torch.tensor([[1.0, 3.0, -torch.inf], [2.0, 2.0, 2.0]], dtype=torch.float64)
    classes = torch.tensor([1, 0])
    assert objectives.spread(outputs, classes).tolist() == [1, 0]
    assert objectives.spread(outputs, classes, "sigmoid").tolist() == [9, 4]
    pairs = torch.tensor([[True, True, False], [False, True, True]])
    assert objectives.spread(outputs, pairs, "sigmoid").tolist() == [9, 4]
    assert objectives.spread(outputs.bfloat16(), classes).dtype == torch.float32


def test_a_class_that_is_ruled_out_for_both_is_no_divergence() -> None:
    outputs = torch.tensor([[1.0, 3.0, -torch.inf], [1.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    teacher = torch.tensor([[0.0, 1.0, -torch.inf], [0.0, 1.0, -torch.inf]], dtype=torch.float64)
    far = objectives.binary_kl(outputs, teacher, torch.tensor([2, 2]))
    assert far[0] == 0
    assert float(far[1].detach()) == pytest.approx(-math.log1p(-float(outputs.detach().softmax(1)[1, 2])))
    (gradient,) = torch.autograd.grad(far.sum(), outputs)
    assert bool(gradient.isfinite().all())


def test_sides_of_a_task_have_means_of_their_own() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True)
    rows, positive = torch.tensor([0, 2, 0, 0, 2]), torch.tensor([True, False, False, False, False])
    found = objectives.per_side(values, rows, positive, 3)
    assert found.tolist() == [[6.0, 1.0], [0.0, 0.0], [9.0, 0.0]]  # zero without samples
    (gradient,) = torch.autograd.grad(found[:, 0].sum(), values)
    assert gradient.tolist() == [0.0, 0.5, 0.5, 0.5, 0.5]
