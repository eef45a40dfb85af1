"""A forward pass that starts at the first site: what reaches it is the same whatever the gates, and known.

The modules before it put out stand-ins of the right shape instead of running, and the site what is known to reach it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .gating import from_units
from .hooking import SiteHook, beside, on_site, running
from .sites import Site


@dataclass(frozen=True)
class Shortcut:
    """What need not run before the first site.

    shape: of one sample's tensor there. before: {module: what it puts out in place of its output, for one sample}.
    """

    model: nn.Module
    site: Site
    shape: torch.Size
    before: Mapping[nn.Module, Tensor] = field(repr=False)

    def disguises(self) -> Iterator[Shortcut]:
        """The same with large numbers for stand-ins, and with their negatives: NaN is not seen by comparisons."""
        generator = torch.Generator().manual_seed(0)
        large = {module: (1e3 * torch.rand(x.shape, generator=generator)).to(x) for module, x in self.before.items()}
        yield replace(self, before=large)
        yield replace(self, before={module: -x for module, x in large.items()})

    @contextmanager
    def taken(self, known: Tensor) -> Iterator[None]:
        """`with shortcut.taken(known):` known is (samples, units, positions), what leaves the open site."""
        samples = len(known)
        x = from_units(known, self.site, self.shape)
        stand_ins = {module: one.expand(samples, *one.shape[1:]) for module, one in self.before.items()}
        handle = on_site(self.model, self.site, lambda _: x)  # before the gate's own hook
        try:
            with running({module: partial(_put_out, stand_in) for module, stand_in in stand_ins.items()}):
                yield
        finally:
            handle.remove()


def _put_out(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x


def shortcut(model: nn.Module, site: Site, run: Callable[[], object], samples: int) -> Shortcut | None:
    """The modules that are done when the site fires for the first and only time, found in one forward pass of `run`.

    samples: of that pass. The stand-ins are NaN, so that whoever tries the shortcut, and its `disguises`, sees whether
    anything else uses them. None where there is nothing to spare.
    """
    if site.within is not None or site.alternating:
        return None
    watched = _Watched(model, site, samples)
    with watched.watching(), torch.no_grad():
        run()
    return watched.found()


class _Watched:
    """Which modules beside the site's are done before it fires."""

    def __init__(self, model: nn.Module, site: Site, samples: int):
        self.model, self.site, self.samples = model, site, samples
        self.shapes: list[torch.Size] = []  # of the site's tensors
        self.calls: Counter[nn.Module] = Counter()
        self.done: dict[nn.Module, Tensor] = {}

    @contextmanager
    def watching(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.callback(on_site(self.model, self.site, self.fire).remove)
            for module in beside(self.model, [self.site]).values():
                if not _looked_at(module):
                    # before `fire`: the site's own module is done when its tensor is there, those that hold it are not
                    stack.callback(module.register_forward_hook(self.after, prepend=True).remove)
            yield

    def fire(self, x: Tensor) -> None:
        self.shapes.append(x.shape)

    def after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls[module] += 1
        if not self.shapes and isinstance(output, Tensor) and output.dim() and len(output) == self.samples:
            self.done[module] = output.new_full((1, *output.shape[1:]), torch.nan)

    def found(self) -> Shortcut | None:
        before = {module: x for module, x in self.done.items() if self.calls[module] == 1}
        if len(self.shapes) != 1 or self.shapes[0][0] != self.samples or not before:
            return None
        return Shortcut(self.model, self.site, self.shapes[0][1:], before)


def _looked_at(module: nn.Module) -> bool:
    """Whether hooks that are not ours look at what happens in there."""
    hooks = (
        hook for part in module.modules() for hook in (*part._forward_hooks.values(), *part._forward_pre_hooks.values())
    )
    return any(not isinstance(hook, SiteHook) for hook in hooks)
