"""Which models hooks work on, and their copies without the hooks of gates."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .acting import Passing
from .errors import ModelError
from .hooking import SiteHook, WithinHook

OURS = (SiteHook, WithinHook, Passing)


def check_model(model: nn.Module) -> None:
    """Raises ModelError for models that hooks do not work on: scripted, quantised and compiled ones."""
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    for name, module in model.named_modules():
        where = f"module {name!r}" if name else "the model"
        if isinstance(module, torch.jit.ScriptModule):
            raise ModelError(f"{where} is a ScriptModule, which refuses hooks; attach to the original module")
        quantised = "quantized" in type(module).__module__ and type(module).__module__.startswith("torch.")
        if quantised and type(module).__name__ != "FloatFunctional":  # which a model ready to be quantised has
            raise ModelError(
                f"{where} is quantised ({type(module).__name__}): it computes with whole numbers and has no gradients; "
                "attach to the floating-point model, and quantise that after"
            )
        original = "" if type(module).__name__ != "OptimizedModule" else ", or hand over the original, its _orig_mod"
        if original or getattr(module, "_compiled_call_impl", None) is not None:  # by torch.compile, or model.compile()
            raise ModelError(
                f"{where} is compiled, and hooks attached now would be ignored; attach, then compile{original}"
            )


def bare_copy(model: nn.Module) -> nn.Module:
    """A deep copy of a model without the hooks of gates, whoever attached them; other hooks come along."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        hooks = [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
        memo |= {id(owner): owner for owner in map(_owner, hooks) if isinstance(owner, OURS)}
        # what a module has cached in a forward pass with gradients refuses to be copied
        cached = (x for x in pytree.tree_leaves(list(vars(module).values())) if isinstance(x, Tensor) and not x.is_leaf)
        memo |= {id(x): x.detach().clone() for x in cached}
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            for key, hook in list(getattr(module, kind).items()):
                if isinstance(_owner(hook), OURS):
                    for table in [name for name in vars(module) if name.startswith(kind)]:  # with what goes by its key
                        getattr(module, table).pop(key, None)
    return copied


def _owner(hook: Any) -> Any:
    """What a hook belongs to: the object of a method, or itself."""
    return getattr(hook, "__self__", hook)
