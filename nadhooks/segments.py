"""A forward pass in segments: cut at every site, so that what lies between two sites can be asked by itself.

`Cut` keeps the autograd graph of each segment; `Replay` runs a segment again with one site changed and every other site
putting out what it did before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import SiteError
from .gating import gate
from .hooking import beside, on_sites, running
from .sites import Site
from .tracing import call_model

Score = Callable[[Any], Tensor]  # from what the model puts out to one number, summed over the images
# {site: (units,) or (1, units) gates, and (units,) what closed units put out, None for zero}
Gating = Mapping[str, tuple[Tensor, Tensor | None]]


def gated(site: Site, x: Tensor, gates: Gating) -> Tensor:
    g, closed = gates[site.name]
    return gate(x, g, site, closed)


def unit_part(site: Site, x: Tensor, unit: int) -> Tensor:
    """The view of one unit's positions in a site's tensor."""
    along = x.movedim(site.axis, 0)
    return along[unit :: site.units] if site.alternating else along[unit * site.block : (unit + 1) * site.block]


def copy(x: Tensor) -> Tensor:
    """A copy that, where torch can, takes time and memory only when one of the two is written to."""
    lazily = getattr(torch, "_lazy_clone", None)  # not public, and so not relied on
    plain = type(x) is Tensor and x.layout == torch.strided and x.device.type in ("cpu", "cuda")
    return lazily(x) if lazily and plain else x.clone()


class Cut:
    """One pass of some images, cut at every site: the gradient of the score at each, and products with segments.

    entering: {site: what the module gave, with the autograd graph back to the sites before it}.
    leaving: {site: what leaves it, gated, a leaf}; under "input" the images. gradient: {site: d score / d leaving}.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], gates: Gating, images: Tensor, score: Score):
        self.sites = {site.name: site for site in sites}
        self.entering: dict[str, Tensor] = {}
        self.leaving: dict[str, Tensor] = {"input": images.detach().clone().requires_grad_()}

        def cut(site: Site, x: Tensor) -> Tensor:
            _once(site, self.entering)
            self.entering[site.name] = x
            leaf = gated(site, x.detach(), gates).requires_grad_()
            self.leaving[site.name] = leaf
            return leaf.clone()  # not the leaf itself: a model may change it in place

        with on_sites(model, sites, cut), torch.enable_grad():
            self.entering["output"] = score(call_model(model, self.leaving["input"].clone()))
        self.gradient = self._gradients(gates)

    def _gradients(self, gates: Gating) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for target in reversed(self.entering):
            if target == "output":
                cotangent = torch.ones_like(self.entering[target])
            elif target in found:
                cotangent = gate(found[target], gates[target][0], self.sites[target])
            else:  # nothing of it reaches the score by gradient
                continue
            for source, part in self.product(target, cotangent).items():
                found[source] = found[source] + part if source in found else part
        return found

    def product(self, target: str, cotangent: Tensor, sources: Sequence[str] | None = None) -> dict[str, Tensor]:
        """The vector-Jacobian product of one segment: {source: the cotangent pulled back to what leaves it}."""
        names = list(self.leaving) if sources is None else list(sources)
        if not self.entering[target].requires_grad:
            return {}
        leaves = [self.leaving[name] for name in names]
        parts = torch.autograd.grad(self.entering[target], leaves, cotangent, retain_graph=True, allow_unused=True)
        return {name: part for name, part in zip(names, parts, strict=True) if part is not None}


class _Stop(Exception):
    """Everything that was asked for is known."""


class Replay:
    """Runs parts of the network again, without gradients, with one site changed. Made by `replaying`.

    entering: {site: what its module gave in the pass that is replayed}, "output": the score. leaving: {site: what left
    it, gated}, "input": the images.
    """

    def __init__(self, model: nn.Module, sites: Sequence[Site], gates: Gating, images: Tensor, score: Score):
        self.model, self.gates, self.score = model, gates, score
        self.entering: dict[str, Tensor] = {}
        self.leaving: dict[str, Tensor] = {"input": images.detach()}
        self._time = 0
        self._fired: dict[str, int] = {}  # when each site fired
        self._done: dict[str, int] = {}  # when each kept module's call was done
        self._outputs: dict[str, Any] = {}
        self._change: Callable[[Site, Tensor], Tensor] = self._record
        self._from: float = -1  # modules that were done by this time need not run again
        self._sites = {site.name: site for site in sites}

    def _record(self, site: Site, x: Tensor) -> Tensor:
        _once(site, self.entering)
        self.entering[site.name] = copy(x)  # an in-place layer that follows would overwrite it
        self.leaving[site.name] = copy(gated(site, x, self.gates))
        self._time += 1
        self._fired[site.name] = self._time
        return copy(self.leaving[site.name])

    def run(self, source: str, value: Tensor, targets: Sequence[str], *, free: bool = False) -> dict[str, Tensor]:
        """What enters the targets ("output": the score) when `value` leaves the source in place of what did.

        All other sites put out what they did before; with `free` those behind the source follow the change.
        """
        seen: dict[str, Tensor] = {}
        waiting = set(targets)
        start = self._fired.get(source, -1)

        def change(site: Site, x: Tensor) -> Tensor:
            if site.name in waiting:
                seen[site.name] = copy(x)
                if len(seen) == len(waiting):
                    raise _Stop
            if site.name == source:
                return copy(value)
            if free and self._fired[site.name] > start:
                return gated(site, x, self.gates)
            return copy(self.leaving[site.name])

        self._change, self._from = change, start
        images = value if source == "input" else self.leaving["input"]
        try:
            with torch.no_grad():
                outputs = call_model(self.model, copy(images))
                seen["output"] = self.score(outputs)
        except _Stop:
            pass
        finally:
            self._from = -1
        return seen

    def _changed(self, site: Site, x: Tensor) -> Tensor:
        return self._change(site, x)

    def _skipped(self, name: str) -> bool:
        """This module's output is known: it was done before the site that changes, or is the site itself."""
        return name in self._outputs and self._done[name] <= self._from

    def _start(self, stack: ExitStack) -> None:
        stack.enter_context(on_sites(self.model, self._sites.values(), self._changed))
        with ExitStack() as recording, torch.no_grad():
            self._watch_modules(recording)
            self.entering["output"] = self.score(call_model(self.model, copy(self.leaving["input"])))
        kept = {name: self.model.get_submodule(name) for name in self._outputs}
        forwards = {module: _Remembered(self, name, module.forward) for name, module in kept.items()}
        stack.enter_context(running(forwards))
        last = max(self._fired, key=self._fired.__getitem__)
        again = self.run(last, self.leaving[last], ["output"])["output"]
        if not torch.equal(again, self.entering["output"]):  # a module that was called for what it does to its input
            self._outputs.clear()

    def _watch_modules(self, stack: ExitStack) -> None:
        """Remembers what those modules put out that have a site beside them, and are called once."""
        calls: dict[str, int] = {}

        def after(name: str, module: nn.Module, args: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            self._time += 1
            self._done[name] = self._time
            if calls[name] == 1:
                self._outputs[name] = pytree.tree_map_only(Tensor, copy, output)
            else:
                self._outputs.pop(name, None)

        sites = {site.module for site in self._sites.values() if site.side == "output"}
        for name, module in beside(self.model, self._sites.values()).items():
            # of a site's own module what it gave, before the site's hook, not what left the site
            handle = module.register_forward_hook(partial(after, name), prepend=name in sites)
            stack.callback(handle.remove)


class _Remembered:
    """Stands in for a module's forward while a replay lasts."""

    def __init__(self, replay: Replay, name: str, forward: Callable[..., Any]):
        self.replay, self.name, self.forward = replay, name, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.replay._skipped(self.name):
            return pytree.tree_map_only(Tensor, copy, self.replay._outputs[self.name])
        return self.forward(*args, **kwargs)


@contextmanager
def replaying(model: nn.Module, sites: Sequence[Site], gates: Gating, images: Tensor, score: Score) -> Iterator[Replay]:
    """Records one pass of the images; inside, `run` replays parts of it. Hooks and forwards are put back at the end."""
    with ExitStack() as stack:
        replay = Replay(model, sites, gates, images, score)
        replay._start(stack)
        yield replay


def _once(site: Site, seen: Mapping[str, Tensor]) -> None:
    if site.name in seen:
        raise SiteError(
            f"{site.name}: it fires more than once in a forward pass, so its units have no one place in the flow; "
            "learn masks at other sites (sites= of nadhooks.learn)"
        )
