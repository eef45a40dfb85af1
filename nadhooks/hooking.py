"""The one way into a model: replace the tensor of a site while the forward pass runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .sites import Site


class SiteHook:
    """Applies `change` to the tensor of one site. A class, not a closure, so that it pickles and deep-copies."""

    def __init__(self, site: Site, change: Callable[[Tensor], Tensor | None]):
        self.site = site
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """As a forward hook or, for sites on a module's input, as a forward pre-hook with keyword arguments.

        None means that nothing changed.
        """
        if self.site.side == "input":
            kwargs: dict[str, Any] = output
            if args:
                changed = self.change(args[0])
                return None if changed is None else ((changed, *args[1:]), kwargs)
            first = next(iter(kwargs))
            changed = self.change(kwargs[first])
            return None if changed is None else (args, {**kwargs, first: changed})
        if self.site.leaf is None:
            return self.change(output)
        leaves, structure = pytree.tree_flatten(output)
        changed = self.change(leaves[self.site.leaf])
        if changed is None:
            return None
        leaves[self.site.leaf] = changed
        return pytree.tree_unflatten(leaves, structure)


def on_site(model: nn.Module, site: Site, change: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
    """Registers `change` on a site, before other hooks of the module, so that those see the changed tensor too."""
    module = model.get_submodule(site.module)
    hook = SiteHook(site, change)
    if site.side == "input":
        return module.register_forward_pre_hook(hook, with_kwargs=True)
    return module.register_forward_hook(hook, prepend=True)
