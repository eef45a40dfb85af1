"""Tensors within what modules take in and put out: tuples, lists, dicts, named tuples, dataclasses, nested at will."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

from torch.utils import _pytree as pytree


def flatten(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of a structure in a fixed order, and what puts others in their place: rebuild(leaves) -> structure."""
    outer, spec = pytree.tree_flatten(value)
    leaves: list[Any] = []
    parts: list[tuple[int, Callable[[list[Any]], Any]]] = []
    for item in outer:
        inner, rebuild = _fields(item) if _is_dataclass(item) else ([item], _only)
        leaves += inner
        parts.append((len(inner), rebuild))

    def rebuilt(new: list[Any]) -> Any:
        items, position = [], 0
        for length, rebuild in parts:
            items.append(rebuild(new[position : position + length]))
            position += length
        return pytree.tree_unflatten(items, spec)

    return leaves, rebuilt


def leaves_of(value: Any) -> list[Any]:
    return flatten(value)[0]


def _is_dataclass(item: Any) -> bool:
    return dataclasses.is_dataclass(item) and not isinstance(item, type)


def _fields(item: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    names = [each.name for each in dataclasses.fields(item)]
    leaves, rebuild = flatten([getattr(item, name) for name in names])

    def rebuilt(new: list[Any]) -> Any:
        changed = copy.copy(item)
        for name, value in zip(names, rebuild(new), strict=True):
            object.__setattr__(changed, name, value)  # frozen ones too
        return changed

    return leaves, rebuilt


def _only(leaves: list[Any]) -> Any:
    return leaves[0]
