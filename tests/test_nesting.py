"""Structures of tensors come apart and together again."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import nadhooks
from nadhooks.nesting import flatten


class Pair(NamedTuple):
    left: Any
    right: Any


@dataclass
class Plain:
    map: Any
    name: str = "x"


@dataclass(frozen=True)
class Frozen:
    parts: Any


@pytest.mark.parametrize(
    ("value", "leaves"),
    [
        (1, [1]),
        ((1, [2, None]), [1, 2]),
        (OrderedDict(a=1, b=(2,)), [1, 2]),
        (Pair(1, Plain(2)), [1, 2, "x"]),
        ({"a": Frozen([1, Plain(2)])}, [1, 2, "x"]),
    ],
)
def test_leaves_go_back_where_they_were(value: Any, leaves: list[Any]) -> None:
    found, rebuild = flatten(value)
    assert [leaf for leaf in found if leaf is not None] == leaves
    assert rebuild(found) == value
    assert rebuild([10 * leaf if isinstance(leaf, int) else leaf for leaf in found]) != value


@pytest.mark.parametrize("kind", [Plain, Frozen, lambda x: Pair(x, x * 0), lambda x: {"map": x}, lambda x: [x]])
def test_outputs_of_any_structure_are_gated(kind: Any) -> None:
    class Structured(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Any:
            return kind(self.fc(x))

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Structured()

        def forward(self, x: Tensor) -> Tensor:
            return flatten(self.inner(x))[0][0]

    model, x = Whole(), torch.randn(2, 4)
    with nadhooks.attach(model, "inner", example=x) as gates:
        assert [site.name for site in gates.sites] == ["inner[0]"]
        with gates.close("inner[0]", 1):
            closed = model(x)
        assert not closed[:, 1].any()
        assert torch.equal(closed[:, [0, 2]], model(x)[:, [0, 2]])
