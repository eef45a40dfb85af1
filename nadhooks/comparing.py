"""What two models put out, compared: equal, equal but for rounding, or how far apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .as_found import undisturbed
from .nesting import leaves_of
from .tracing import call_model

# What sums in another order may change, as a share of a tensor's largest value; a wrong fold changes far more.
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-2, torch.bfloat16: 1e-1}
SPREAD = 1e-3  # at least, of a random input


def outputs(model: nn.Module, example: Any) -> list[Any]:
    """What a model puts out in eval mode, flattened; the example is safe from changes in place."""
    with undisturbed(model), torch.no_grad():
        return leaves_of(call_model(model, pytree.tree_map_only(Tensor, Tensor.clone, example)))


def varied(example: Any) -> Any:
    """A random input like an example, of its mean and spread."""
    generator = torch.Generator().manual_seed(0)

    def random(x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        noise = torch.randn(x.shape, generator=generator).to(x)
        return x.mean() + noise * (x.std(correction=0) + SPREAD)

    return pytree.tree_map_only(Tensor, random, example)


def scaled(example: Any, scale: float) -> Any:
    """An input so many times as large."""
    return pytree.tree_map_only(Tensor, lambda x: x * scale if x.is_floating_point() else x, example)


def same(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Equal to the last bit, and in type and shape; NaN is the same as NaN."""

    def alike(a: Any, b: Any) -> bool:
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            return bool(a == b)
        return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())

    return len(ours) == len(theirs) and all(map(alike, ours, theirs))


def close(ours: Sequence[Any], theirs: Sequence[Any]) -> bool:
    """Equal but for rounding, tensor by tensor."""
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if isinstance(a, Tensor) and a.is_floating_point()]
    return len(ours) == len(theirs) and all(
        a.shape == b.shape and difference([a], [b]) <= ROUNDING[b.dtype] * largest([b]) for a, b in pairs
    )


def difference(ours: Sequence[Any], theirs: Sequence[Any]) -> float:
    """The largest difference of two lists of outputs; infinite where they are not alike."""
    if [getattr(a, "shape", a) for a in ours] != [getattr(b, "shape", b) for b in theirs]:
        return float("inf")
    pairs = ((a, b) for a, b in zip(ours, theirs, strict=True) if isinstance(a, Tensor) and a.numel())
    return max((float((a.double() - b.double()).abs().nan_to_num().max()) for a, b in pairs), default=0.0)


def largest(tensors: Sequence[Any]) -> float:
    filled = (x for x in tensors if isinstance(x, Tensor) and x.numel())
    return max((float(x.double().abs().nan_to_num().max()) for x in filled), default=0.0)
