"""What gates do while the model runs: what is in force, and the hooks. Classes at module level: they pickle and
deep-copy."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from .batching import sizes
from .errors import NadhooksError, SiteError, TaskError
from .gating import Clip, Closed, gate, laid_out_as, with_closed
from .ownership import held_by_nobody_else
from .sites import Site

# what was handed over or chosen: rows of tasks, gates instead of these, what closed units put out
State = tuple[Tensor | None, Mapping[str, Tensor] | None, Mapping[str, Tensor]]


class Held(Protocol):
    """What `Gates` hold, whatever is in force."""

    sites: tuple[Site, ...]
    logits: dict[str, nn.Parameter]
    closed: Closed
    constants: dict[str, Tensor]


class _Ready(NamedTuple):
    """What gates are in force during one forward pass."""

    rows: Tensor  # of the `with` that they belong to
    gates: dict[str, Tensor | None]


class InForce:
    """What is in force at the moment; in a copy nothing is, for no `with` would ever put it back.

    rows: (batch or 1,) of the tasks whose gates act. values: gates that were handed over instead, and closed: what
    their closed units put out, if that was handed over too. shut: {site: (units,) bool}. watch: is shown every site's
    tensor.
    """

    def __init__(self, held: Held):
        self.held = held
        self._open_all()

    def _open_all(self) -> None:
        self.rows: Tensor | None = None
        self.values: Mapping[str, Tensor] | None = None
        self.closed: Mapping[str, Tensor] = {}
        self.shut: dict[str, Tensor] = {}
        self.watch: Callable[[Site, Tensor], None] | None = None
        self.ready: _Ready | None = None  # during a forward pass without gradients
        self.depth, self.thread = 0, 0  # how many times a `with` was entered, and in which thread

    def __getstate__(self) -> dict[str, Any]:
        return {"held": self.held}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open_all()

    def acts(self, site: Site) -> bool:
        """Whether anything may change or see a site's tensor."""
        return not (self.rows is self.values is self.watch is None) or site.name in self.shut

    def enter(self, state: State) -> State:
        """Puts this in force, and gives what was before, which `leave` wants."""
        if not torch.compiler.is_compiling():
            me = threading.get_ident()
            if self.depth and self.thread != me:  # each would put back what the other has put in force
                raise NadhooksError(
                    "these gates are in force in another thread; give each a copy of the model with gates of its own"
                )
            self.thread, self.depth = me, self.depth + 1
        before = self.rows, self.values, self.closed
        self.rows, self.values, self.closed = state
        return before

    def leave(self, before: State) -> None:
        self.rows, self.values, self.closed = before
        if not torch.compiler.is_compiling():
            self.depth = max(0, self.depth - 1)  # 0 where it was entered in compiled code, which does not count

    @contextmanager
    def everything_open(self) -> Iterator[None]:
        before, shut = self.enter((None, None, {})), self.shut
        self.shut = {}
        try:
            yield
        finally:
            self.shut = shut
            self.leave(before)

    @contextmanager
    def closing(self, site: Site, units: Tensor) -> Iterator[None]:
        """Shuts these (units,) of a site besides those that are shut."""
        before = self.shut.get(site.name)
        self.shut[site.name] = units if before is None else units | before
        try:
            yield
        finally:
            if before is None:
                del self.shut[site.name]
            else:
                self.shut[site.name] = before

    @contextmanager
    def watching(self, see: Callable[[Site, Tensor], None]) -> Iterator[None]:
        before, self.watch = self.watch, see
        try:
            yield
        finally:
            self.watch = before

    def gates_at(self, site: Site) -> Tensor | None:
        """(batch or 1, units); None where all are open."""
        ready = self.ready
        if ready is not None and not torch.is_grad_enabled() and ready.rows is self.rows is not None:
            return ready.gates[site.name]
        if self.values is not None:
            g = self.values.get(site.name)
        elif self.rows is not None:
            logits = self.held.logits[site.name]
            rows = logits[self.rows.to(logits.device)]
            g = cast(Tensor, Clip.apply(rows)) if torch.is_grad_enabled() else rows.clamp(0, 1)
        else:
            return None
        return None if g is None or _known_open(g) else g

    def closed_at(self, site: Site) -> Tensor | None:
        """What closed units put out, (units,) or (batch or 1, units); None for zero."""
        held = self.held
        if site.name in self.closed:
            return self.closed[site.name]
        if held.closed == "zero":
            return None
        if not held.constants:
            raise NadhooksError('closed="mean" needs the units\' means: call gates.calibrate(loader) first')
        constants = held.constants[site.name]
        if held.closed == "mean" or len(constants) == 1:
            return constants
        if self.rows is None:
            raise NadhooksError(
                'closed="optimal": closed units put out something else for each task; close them inside '
                "`with gates(task)`, or hand over what they put out with gates.apply(values, closed)"
            )
        return constants[self.rows.to(constants.device)]

    def make_ready(self) -> None:
        """All sites' gates at once: one at a time, between layers that have emptied the caches, takes many times as
        long."""
        self.ready = None
        if self.rows is not None:
            self.ready = _Ready(self.rows, {site.name: self.gates_at(site) for site in self.held.sites})


class SiteGate:
    """What happens at one site in each forward pass."""

    def __init__(self, now: InForce, site: Site):
        self.now, self.site = now, site
        # where those who hold the tensor can be counted: it comes straight from its module
        self.counted = site.side == "output" and site.leaf is site.within is None

    def active(self) -> bool:
        return self.now.acts(self.site)

    def __call__(self, x: Tensor) -> Tensor | None:
        references = 0 if torch.compiler.is_compiling() else sys.getrefcount(x)
        now, site = self.now, self.site
        g, shut = now.gates_at(site), now.shut.get(site.name)
        changed: Tensor | None = None
        if g is not None or shut is not None:
            self._check(x)
            closed, changed = now.closed_at(site), x
            if g is not None:
                mine = self.counted and now.values is None and closed is None
                changed = gate(x, g, site, closed, overwrite=mine and held_by_nobody_else(x, references))
            if shut is not None:
                changed = with_closed(changed, shut, site, closed)
            if not torch.compiler.is_compiling():
                changed = laid_out_as(x, changed)
        if now.watch is not None:
            now.watch(site, x if changed is None else changed)
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
    """Around each forward pass of the model: checks its samples, and makes the gates of all sites ready."""

    def __init__(self, now: InForce):
        self.now = now

    def enter(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        now, rows = self.now, self.now.rows
        numbers = set() if rows is now.values is None else sizes(args) | sizes(kwargs)  # of samples
        if rows is not None and numbers and len(rows) not in {1, *numbers}:
            raise TaskError(
                f"expected one label for each of the {_either(numbers)} samples, got {len(rows)}; "
                "or pass one task for the whole batch"
            )
        for handed in (now.values or {}, now.closed) if numbers else ():
            for site, each in handed.items():
                if len(each) not in {1, *numbers}:
                    raise TaskError(
                        f"{site}: expected a row for each of the {_either(numbers)} samples, or one for all, got "
                        f"{len(each)}; of a (tasks, units) table take each sample's row, as in table[labels]"
                    )
        if torch.compiler.is_compiling():
            _compiled["gates"] = True
        elif not torch.is_grad_enabled():
            now.make_ready()

    def leave(self, model: nn.Module, args: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.now.ready = None


def _either(numbers: set[int]) -> str:
    return " or ".join(map(str, sorted(numbers)))


def _known_open(g: Tensor) -> bool:
    """All gates are open, and nobody needs their gradient: the tensor can be left as it is.

    Asked on the CPU only, where it costs next to nothing; elsewhere it would wait for the device.
    """
    asked = not torch.is_grad_enabled() and g.device.type == "cpu" and not torch.compiler.is_compiling()
    return asked and bool((g == 1).all())
