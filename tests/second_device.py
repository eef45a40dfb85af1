"""A second device where there is none: tensors that say they are on it, and that refuse to be mixed with the CPU's.

Their values are CPU tensors inside, so that results are those of the CPU to the last bit, but whoever mixes devices, or
makes a tensor without asking where, fails as on CUDA. It goes by the name of "lazy", as PyTorch would look for drivers
behind other names.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("lazy", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default}  # lead from one device to another
INDEXED = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default}  # takes indices that are on the CPU


class There(Tensor):
    """A tensor on the second device. To C++ it is on "meta", which dispatches here whatever is done to it."""

    inside: Tensor

    @staticmethod
    def __new__(cls, values: Tensor) -> There:
        form: dict[str, Any] = {"strides": values.stride(), "storage_offset": values.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, values.shape, **form, dtype=values.dtype, device=torch.device("meta"))
        made.inside = values
        return made

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return DEVICE

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    # these two do not dispatch
    def tolist(self) -> Any:
        return self.inside.tolist()

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        return There(torch.tensor(data, dtype=dtype or self.dtype))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _computed(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """What is made there, or brought there, from nothing that is there already."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(function, args, kwargs or {})


def _computed(function: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    there = [x for x in tensors if isinstance(x, There)]
    here = [x for x in tensors if not isinstance(x, There) and x.dim()]  # numbers go anywhere
    may_mix = function in COPIES or (function in INDEXED and isinstance(args[0], There))
    if there and here and not may_mix:
        shapes = [[tuple(x.shape) for x in part] for part in (there, here)]
        raise RuntimeError(f"{function}: expected tensors on one device, got {shapes[0]} there and {shapes[1]} here")
    unwrapped = pytree.tree_map_only(There, lambda x: x.inside, (args, dict(kwargs)))
    device = kwargs.get("device")
    if device is not None:
        unwrapped[1]["device"] = torch.device("cpu")
    found = function(*unwrapped[0], **unwrapped[1])
    if function is aten.copy_.default:
        return args[0]
    if not (there if device is None else torch.device(device).type in (DEVICE.type, "meta")):
        return found
    found = pytree.tree_map_only(Tensor, There, found)
    return return_and_correct_aliasing(function, args, dict(kwargs), found) if there else found


@contextmanager
def second_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())  # which knows real devices only
    with _Factories():
        yield DEVICE


def moved(model: nn.Module) -> nn.Module:
    """The same module, on the second device; `model.to` would want tensors of one type."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(There(parameter.detach()), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = There(buffer)
    return model
