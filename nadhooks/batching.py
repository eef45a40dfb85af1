"""Inputs as loaders yield them: a tensor, a list with an entry for each sample, or a tuple or dict of such."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

CACHED = 2**17  # numbers: three such tensors fit the second level of most processors


def size(inputs: Any) -> int | None:
    """How many samples there are; None if parts differ in it or there is no part."""
    found = sizes(inputs)
    return found.pop() if len(found) == 1 else None


def sizes(inputs: Any) -> set[int]:
    """How many samples the parts hold, each number once."""
    return {len(part) for part in _parts(inputs) if isinstance(part, list) or part.dim()}


def forms(inputs: Any) -> tuple[frozenset[Any], ...]:
    """The shapes of single samples, for each part of the inputs."""
    return tuple(
        frozenset({part.shape[1:]})
        if isinstance(part, Tensor)
        else frozenset(tuple(x.shape for x in pytree.tree_leaves(sample) if isinstance(x, Tensor)) for sample in part)
        for part in _parts(inputs)
    )


def listed(inputs: Any) -> bool:
    """Whether samples are tensors in a list, which may be of several sizes."""
    return any(
        isinstance(leaf, Tensor) and leaf.dim()
        for part in _parts(inputs)
        if isinstance(part, list)
        for leaf in pytree.tree_leaves(part)
    )


def pickable(inputs: Any, samples: int) -> Any:
    """The same in forms that samples can be picked from: arrays, and tuples of a plain entry for each sample."""
    if isinstance(inputs, np.ndarray):
        return torch.as_tensor(inputs) if inputs.dtype.kind in "biufc" else inputs.tolist()
    if isinstance(inputs, dict):
        return {key: pickable(part, samples) for key, part in inputs.items()}
    if not isinstance(inputs, tuple):
        return inputs
    if len(inputs) == samples and not any(isinstance(part, (Tensor, np.ndarray, list, tuple, dict)) for part in inputs):
        return list(inputs)
    return tuple(pickable(part, samples) for part in inputs)


def pick(inputs: Any, places: Tensor) -> Any:
    """The samples at these places, (n,) indices or (samples,) booleans, in the same form."""
    return _by_part(inputs, lambda part: part[places.to(part.device)], lambda part: [part[i] for i in _whole(places)])


def join(batches: Sequence[Any]) -> Any:
    """Batches of one form, one after the other. Raises ValueError for samples of several shapes."""
    first = batches[0]
    if isinstance(first, Tensor):
        shapes = {batch.shape[1:] for batch in batches}
        if len(shapes) > 1:
            one, other = sorted(map(tuple, shapes))[:2]
            raise ValueError(f"expected samples of one shape in every batch, got {one} and {other}")
        return torch.cat(list(batches)) if first.dim() else first
    if isinstance(first, list):
        return [sample for batch in batches for sample in batch]
    if isinstance(first, tuple):
        return tuple(join(parts) for parts in zip(*batches, strict=True))
    if isinstance(first, dict):
        return {key: join([batch[key] for batch in batches]) for key in first}
    return first


def singles(inputs: Any, samples: int) -> list[Any]:
    """Every sample as a batch of its own, in memory of its own: a view would keep its whole batch."""
    return [
        _by_part(inputs, lambda part: part[place : place + 1].clone(), lambda part: part[place : place + 1])  # noqa: B023
        for place in range(samples)
    ]


def moved(inputs: Any, device: torch.device) -> Any:
    return pytree.tree_map_only(Tensor, lambda x: x.to(device), inputs)


def copied(inputs: Any, memory_format: torch.memory_format = torch.preserve_format) -> Any:
    """For models that write into what they are given; images of 4 axes in that order of memory."""

    def change(x: Tensor) -> Tensor:
        # `contiguous` would leave tensors of one channel as they are, and convolutions in the slower order
        return torch.empty_like(x, memory_format=memory_format).copy_(x) if x.dim() == 4 else x.clone()

    return pytree.tree_map_only(Tensor, change, inputs)


def few(x: Tensor) -> int:
    """How many of a tensor's samples to go through at a time, so that what is computed stays in a processor's cache."""
    return max(1, CACHED // max(1, x[:1].numel())) if x.device.type == "cpu" else max(1, len(x))


def finite(inputs: Any) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def nbytes(inputs: Any) -> int:
    return sum(leaf.nbytes for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor))


def described(value: Any) -> str:
    """A value in a few words, for errors."""
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} of shape {tuple(value.shape)}"
    if isinstance(value, dict):
        return "dict of " + ", ".join(f"{key!r}: {described(part)}" for key, part in value.items())
    if isinstance(value, (list, tuple)):
        kinds = list(dict.fromkeys(described(part) for part in value))
        return f"{type(value).__name__} of {len(value)}" + (f" ({', '.join(kinds[:3])})" if kinds else "")
    return type(value).__name__


def digest(inputs: Any) -> bytes:
    """What a sample is known by again: a hash of its tensors."""
    known = hashlib.blake2b(digest_size=16)
    for leaf in [inputs] if isinstance(inputs, Tensor) else pytree.tree_leaves(inputs):
        if isinstance(leaf, Tensor):
            known.update(str(leaf.shape).encode())
            plain = leaf.detach().cpu().contiguous().reshape(-1)
            known.update(plain.view(torch.uint8).numpy().data)  # numpy knows no bfloat16
        elif isinstance(leaf, np.ndarray) and leaf.dtype != object:  # of long ones `repr` shows the ends alone
            known.update(f"{leaf.dtype}{leaf.shape}".encode() + leaf.tobytes())
        elif type(leaf).__repr__ is object.__repr__ and hasattr(leaf, "__dict__"):  # which would say where it lies
            known.update(type(leaf).__qualname__.encode() + digest(vars(leaf)))
        else:
            known.update(repr(leaf).encode())
    return known.digest()


def _parts(inputs: Any) -> list[Any]:
    if isinstance(inputs, (Tensor, list)):
        return [inputs]
    values = inputs.values() if isinstance(inputs, dict) else inputs if isinstance(inputs, tuple) else ()
    return [part for value in values for part in _parts(value)]


def _by_part(inputs: Any, tensor: Callable[[Tensor], Any], samples: Callable[[list[Any]], Any]) -> Any:
    if isinstance(inputs, Tensor):
        return tensor(inputs) if inputs.dim() else inputs
    if isinstance(inputs, list):
        return samples(inputs)
    if isinstance(inputs, tuple):
        return tuple(_by_part(part, tensor, samples) for part in inputs)
    if isinstance(inputs, dict):
        return {key: _by_part(part, tensor, samples) for key, part in inputs.items()}
    return inputs


def _whole(places: Tensor) -> list[int]:
    return (places.nonzero()[:, 0] if places.dtype == torch.bool else places).tolist()
