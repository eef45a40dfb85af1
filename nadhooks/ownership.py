"""Whether a tensor that a module has just put out is held by nobody else, so that a gate may write into it.

A gate that writes into its tensor costs a third of one that makes another. It may do so where no gradient is asked for
and nothing in the program can tell: no Python object holds the tensor (a block's attribute, a list of features, a
caller that handed it in), nothing in C++ does (autograd, DLPack), and no other tensor shares its memory (a view, a
parameter, a numpy array). All three are counted, and compared with the counts of a tensor that surely is nobody
else's, measured once in the same place; as numpy does to reuse the memory of temporaries.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks_of_all

from .hooking import SiteHook
from .sites import Site

Holders = tuple[int, int, int]  # references in Python, in C++, and to the memory

_of_a_fresh_one: Holders | None = None


def held_by_nobody_else(x: Tensor, references: int) -> bool:
    """Whether a change (`hooking.Change`) that was handed what its module puts out may overwrite it.

    references: `sys.getrefcount(x)`, asked in the `__call__` of the change itself. False wherever it is in doubt.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not _ordinary(x):
        return False
    memory = x.untyped_storage()
    if not memory.resizable():  # belongs to somebody else, such as numpy
        return False
    if memory.nbytes() != x.numel() * x.element_size():  # a part of something, or one place for several elements
        return False
    del memory
    return _holders(x, references) == _of_fresh()


def _ordinary(x: Tensor) -> bool:
    return (
        type(x) is Tensor
        and not torch._C._functorch.is_functorch_wrapped_tensor(x)
        and x.layout == torch.strided
        and x.device.type in ("cpu", "cuda")
        and not x.requires_grad
        and (torch.is_inference_mode_enabled() or not x.is_inference())
    )


def _holders(x: Tensor, references: int) -> Holders | None:
    """None where this PyTorch does not tell."""
    if not hasattr(x, "_use_count") or not hasattr(torch._C, "_storage_Use_Count"):
        return None
    return references, x._use_count(), torch._C._storage_Use_Count(x.untyped_storage()._cdata)


def _of_fresh() -> Holders:
    """The counts of a tensor that only the running call holds."""
    global _of_a_fresh_one
    if _of_a_fresh_one is None:
        if sys.gettrace() or sys.getprofile() or hooks_of_all._global_forward_hooks:
            return 0, 0, 0  # a debugger or a hook on all modules may hold it too: ask again another time
        count = _Count()
        layer = nn.ReLU()
        site = Site(name="fresh", axis=0, units=1, module="")
        layer.register_forward_hook(SiteHook(site, count), prepend=True)
        with torch.no_grad():
            layer(torch.zeros(1))
        _of_a_fresh_one = count.holders or (0, 0, 0)
    return _of_a_fresh_one


class _Count:
    """A change that changes nothing and counts; a class with `__call__`, as the gate of a site is."""

    holders: Holders | None = None

    def __call__(self, x: Any) -> None:
        references = sys.getrefcount(x)
        self.holders = _holders(x, references)
