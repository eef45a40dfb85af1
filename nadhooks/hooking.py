"""The one way into a model: replace the tensor of a site while the forward pass runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

from torch import Tensor, nn

from .functional import Apply, WeightUse
from .nesting import flatten
from .sites import Site

Change = Callable[[Tensor], Tensor | None]  # None means that nothing changed


class SiteHook:
    """Applies `change` to the tensor of one site. A class, not a closure, so that it pickles and deep-copies."""

    def __init__(self, site: Site, change: Change):
        self.site = site
        self.change = change

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """As a forward hook or, for sites on a module's input, as a forward pre-hook with keyword arguments."""
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
        leaves, rebuild = flatten(output)
        changed = self.change(leaves[self.site.leaf])
        if changed is None:
            return None
        leaves[self.site.leaf] = changed
        return rebuild(leaves)


class WithinHook:
    """The same for a layer that is never called: while the module runs that uses its weight, it watches for that.

    It watches only where `active()`: `nn.MultiheadAttention` leaves its fused inference path when watched.
    """

    def __init__(self, site: Site, change: Change, active: Callable[[], bool], layer: nn.Module):
        self.site, self.change, self.active, self.layer = site, change, active, layer
        self.running: list[WeightUse | None] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        use = None
        if self.active():  # the weight of this moment: it may have been moved, cast or swapped
            use = WeightUse({id(self.layer.weight): self.site.module}, self.around)
            use.__enter__()
        self.running.append(use)

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        use = self.running.pop() if self.running else None  # empty if a hook failed before `enter`
        if use is not None:
            use.__exit__(None, None, None)

    def remove(self) -> None:
        """Ends what still watches: after Ctrl-C torch calls no hooks, `always_call` or not."""
        while self.running:
            self.leave(self.layer, (), None)

    def around(self, name: str, x: Tensor, apply: Apply) -> Tensor:
        if self.site.side == "input":
            changed = self.change(x)
            return apply(x if changed is None else changed)
        out = apply(x)
        changed = self.change(out)
        return out if changed is None else changed


class Handle:
    """What was registered on a model for one site; removing twice is fine."""

    def __init__(self, *parts: Any):
        self.parts = parts

    def remove(self) -> None:
        for part in self.parts:
            part.remove()


def _always() -> bool:
    return True


def on_site(model: nn.Module, site: Site, change: Change, active: Callable[[], bool] = _always) -> Handle:
    """Registers `change` on a site, before other hooks of the module, so that those see the changed tensor too.

    active: whether `change` may change or see anything at the moment; asked where that spares work.
    """
    module = model.get_submodule(site.module)
    if site.within is not None:
        caller = model.get_submodule(site.within)
        within = WithinHook(site, change, active, module)
        entering = caller.register_forward_pre_hook(within.enter)
        leaving = caller.register_forward_hook(within.leave, prepend=True, always_call=True)
        return Handle(entering, leaving, within)
    hook = SiteHook(site, change)
    if site.side == "input":
        return Handle(module.register_forward_pre_hook(hook, with_kwargs=True))
    return Handle(module.register_forward_hook(cast(Any, hook), prepend=True))


@contextmanager
def on_sites(
    model: nn.Module, sites: Iterable[Site], change: Callable[[Site, Tensor], Tensor | None]
) -> Iterator[None]:
    """Inside, `change(site, tensor)` is registered on each of these sites."""
    with ExitStack() as stack:
        for site in sites:
            stack.callback(on_site(model, site, partial(change, site)).remove)
        yield


def beside(model: nn.Module, sites: Iterable[Site]) -> dict[str, nn.Module]:
    """{name: module} the sites' modules, those that hold them, and whatever stands beside one of these."""
    parts = [site.module.split(".") for site in sites]
    holding = {".".join(names[:length]) for names in parts for length in range(len(names))}  # "" is the model itself
    return {name: module for name, module in model.named_modules() if name and name.rpartition(".")[0] in holding}


@contextmanager
def running(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Inside, these modules run by other functions; afterwards by what they ran by before."""
    before = {module: vars(module).get("forward") for module in forwards}  # None where it is its class's
    try:
        for module, forward in forwards.items():
            vars(module)["forward"] = forward
        yield
    finally:
        for module, own in before.items():
            if own is None:
                vars(module).pop("forward", None)
            else:
                vars(module)["forward"] = own
