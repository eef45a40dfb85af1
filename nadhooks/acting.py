"""What gates do while the model runs: the hooks of `Gates`. Classes at module level: they pickle and deep-copy."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .errors import SiteError, TaskError
from .gating import gate, laid_out_as, with_closed
from .ownership import held_by_nobody_else
from .sites import Site
from .tracing import samples_in

if TYPE_CHECKING:
    from .gates import Gates


class SiteGate:
    """What happens at one site in each forward pass."""

    def __init__(self, gates: Gates, site: Site):
        self.gates, self.site = gates, site
        # where those who hold the tensor can be counted: it comes straight from its module
        self.counted = site.side == "output" and site.leaf is site.within is None

    def active(self) -> bool:
        gates = self.gates
        return not (gates._rows is gates._values is gates._watch is None) or self.site.name in gates._shut

    def __call__(self, x: Tensor) -> Tensor | None:
        references = 0 if torch.compiler.is_compiling() else sys.getrefcount(x)
        gates, site = self.gates, self.site
        g, shut = gates._in_force(site), gates._shut.get(site.name)
        changed: Tensor | None = None
        if g is not None or shut is not None:
            self._check(x)
            closed, changed = gates._closed_values(site), x
            if g is not None:
                mine = self.counted and gates._values is None and closed is None
                changed = gate(x, g, site, closed, overwrite=mine and held_by_nobody_else(x, references))
            if shut is not None:
                changed = with_closed(changed, shut, site, closed)
            if not torch.compiler.is_compiling():
                changed = laid_out_as(x, changed)
        if gates._watch is not None:
            gates._watch(site, x if changed is None else changed)
        return changed

    def _check(self, x: Tensor) -> None:
        site = self.site
        if not x.is_floating_point():
            raise SiteError(f"{site.name}: expected a floating-point tensor, got {x.dtype}")
        if x.dim() <= site.axis or x.shape[site.axis] != site.units * site.block:
            raise SiteError(
                f"{site.name}: expected {site.units * site.block} positions on axis {site.axis}, got shape "
                f"{tuple(x.shape)}; attach again with an example= like this input"
            )


# Not empty once torch.compile has seen gates in this process; no set, additions to which torch 2.4 does not compile.
_compiled: dict[str, bool] = {}


def forget_compiled() -> None:
    """Has everything compiled anew at its next call, if gates were: compiled code ignores hooks that came later."""
    if _compiled:
        _compiled.clear()
        torch.compiler.reset()


class Passing:
    """Around each forward pass of the model: checks its samples, and makes the gates of all sites ready at once.

    One site at a time, between layers that have emptied the caches, that takes many times as long.
    """

    def __init__(self, gates: Gates):
        self.gates = gates

    def enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        gates, rows = self.gates, self.gates._rows
        samples = 1 if rows is None else samples_in(args or kwargs)
        if rows is not None and len(rows) not in (1, samples):
            raise TaskError(
                f"expected one label for each of the {samples} samples, got {len(rows)}; "
                "or pass one task for the whole batch"
            )
        if torch.compiler.is_compiling():
            _compiled["gates"] = True
        elif not torch.is_grad_enabled():
            gates._make_ready()

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.gates._ready = None


def known_open(g: Tensor) -> bool:
    """All gates are open, and nobody needs their gradient: the tensor can be left as it is.

    Asked on the CPU only, where it costs next to nothing; elsewhere it would wait for the device.
    """
    asked = not torch.is_grad_enabled() and g.device.type == "cpu" and not torch.compiler.is_compiling()
    return asked and bool((g == 1).all())
