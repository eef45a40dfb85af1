"""How flows join on their way into a tensor, read off its autograd graph: by types of operations, never by names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

JOINS = ("sequential", "sum", "concatenation", "product", "attention")  # from the plainest to the most telling
SEQUENTIAL, SUM, CONCATENATION, PRODUCT, ATTENTION = JOINS
# What the names of autograd nodes begin with that join several tensors.
NAMES = {
    SUM: ("AddBackward", "SubBackward", "RsubBackward", "AddcmulBackward", "LerpBackward"),
    CONCATENATION: ("Cat", "Stack", "CopySlices", "IndexPut", "SliceScatter"),
    PRODUCT: ("Mul", "Convolution", "Addmm", "GridSampler", "ThnnConvDepthwise"),
    ATTENTION: ("ScaledDotProduct", "Bmm", "Baddbmm", "Mm"),
}
ALONE = {"Glu": PRODUCT}  # joins two halves of one tensor
SCALES = ("Rsqrt", "Reciprocal")  # a tensor times one of these made of itself is a normalisation, no gate


@dataclass(frozen=True)
class Joined:
    """What lies on the ways from one site to another.

    join: the most telling join on them: attention, before product, concatenation, sum; sequential where none is.
    arrives: the last join before the target, the same for all that feed it.
    """

    join: str = SEQUENTIAL
    arrives: str = SEQUENTIAL


def joined(end: Any, leaves: Mapping[int, int]) -> dict[int, Joined]:
    """{number of a leaf: how it is joined} for the leaves that an autograd node was computed from.

    leaves: {id of a leaf tensor: its number}. A node joins where two or more of what it takes depend on leaves, be
    they the same: a residual block joins its input with what it made of it.
    """
    order = _from_leaves(end)
    behind: dict[Any, int] = {}  # node -> the leaves it depends on, as bits
    kinds: dict[Any, str] = {}
    for node in order:
        number = leaves.get(id(getattr(node, "variable", None)))
        sources = [source for source, _ in node.next_functions if source is not None and behind[source]]
        behind[node] = 0 if number is None else 1 << number
        for source in sources:
            behind[node] |= behind[source]
        kind = _kind(node, sources)
        if kind is not None:
            kinds[node] = kind
    if end is None or not behind[end]:
        return {}
    arrives = _last(end, behind, kinds)
    found: dict[int, Joined] = {}
    for number in (bit for bit in range(behind[end].bit_length()) if behind[end] >> bit & 1):
        passed = {kind for node, kind in kinds.items() if behind[node] >> number & 1}
        found[number] = Joined(max(passed, key=JOINS.index, default=SEQUENTIAL), arrives)
    return found


def _kind(node: Any, sources: list[Any]) -> str | None:
    name = type(node).__name__
    alone = next((kind for start, kind in ALONE.items() if name.startswith(start)), None)
    if alone and sources:
        return alone
    if len(sources) < 2:
        return None
    kind = next((kind for kind, starts in NAMES.items() if name.startswith(starts)), None)
    if kind == PRODUCT and any(type(source).__name__.startswith(SCALES) for source in sources):
        return None
    return kind


def _last(end: Any, behind: Mapping[Any, int], kinds: Mapping[Any, str]) -> str:
    """The join that a walk back from the end meets first. What forks without a known join (an LSTM) is sequential."""
    node, seen = end, set()
    while node is not None and node not in kinds and node not in seen:
        seen.add(node)
        sources = {source for source, _ in node.next_functions if source is not None and behind[source]}
        node = sources.pop() if len(sources) == 1 else None
    return kinds.get(node, SEQUENTIAL)


def _from_leaves(end: Any) -> list[Any]:
    """Every node behind this one, itself included, each after all that it takes."""
    order: list[Any] = []
    seen, stack = set(), [(end, False)] if end is not None else []
    while stack:
        node, done = stack.pop()
        if done:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack += [(source, False) for source, _ in node.next_functions if source is not None and source not in seen]
    return order
