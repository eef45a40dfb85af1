"""The open network, whose answers the gated one is compared with: asked once for each input, as far as memory lasts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .batching import in_memory_format, pick
from .gates import Gates
from .gating import by_unit
from .methods import Pass
from .nesting import flatten, leaves_of
from .sites import Site
from .tracing import call_model, doubled


@dataclass
class Forward:
    """Forward passes of a gated model that show what leaves each site, in the form that is fastest.

    read: takes from what the model puts out what objectives are shown. autocast: a dtype to compute in, such as
    torch.bfloat16. overwritten: sites whose tensor a later layer overwrites in place, so that it has to be copied.
    channels_last: images go in that way; convolutions are faster then. by_sample: what `read` gives are tensors with
    a row for each sample.
    """

    gates: Gates
    device: torch.device
    read: Callable[[Any], Any]
    autocast: torch.dtype | None = None
    overwritten: set[str] = field(default_factory=set)
    channels_last: bool = False
    by_sample: bool = True

    def __call__(self, inputs: Any, samples: int, see: Callable[[Site, Tensor], None] | None = None) -> Pass:
        """`see` is shown the sites' tensors besides, as they pass."""
        if self.channels_last:
            inputs = in_memory_format(inputs, torch.channels_last)
        while True:
            seen: dict[str, Tensor] = {}
            left: dict[str, tuple[Tensor, int]] = {}

            def watch(site: Site, x: Tensor) -> None:
                if see:
                    see(site, x)
                kept = x.clone() if site.name in self.overwritten else x
                left[site.name] = kept, kept._version  # noqa: B023
                seen[site.name] = by_unit(kept, site, samples)  # noqa: B023

            enabled = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
            with self.gates.watch(watch), enabled:
                outputs = self.read(call_model(self.gates.attached(), inputs))
            changed = {name for name, (x, version) in left.items() if x._version != version}
            if not changed:
                return Pass(_full_precision(outputs), seen)
            self.overwritten |= changed  # found once for each network

    def settle(self, sample: Any) -> None:
        """Tries what the model takes, on one sample: some flatten images with `view`, which wants the slower order."""
        pair = doubled(sample)
        with torch.no_grad(), self.gates.everything_open():
            expected = self(pair, 2)
            twice, once = _first_axes(expected.outputs), _first_axes(self(sample, 1).outputs)
            self.by_sample = bool(once) and set(once) == {1} and twice == [2] * len(once)
            self.channels_last = True
            try:
                found = self(pair, 2)
            except RuntimeError:
                self.channels_last = False
                return
        tensors = zip(leaves_of(expected), leaves_of(found), strict=True)
        self.channels_last = all(not isinstance(a, Tensor) or a.shape == b.shape for a, b in tensors)


class Teacher:
    """The open network's answers, remembered as far as `capacity` bytes go.

    compares: what leaves the sites is wanted too.
    """

    def __init__(self, forward: Forward, capacity: int, compares: bool):
        self.forward, self.compares = forward, compares
        self.outputs, self.sites = _Rows(capacity // 8), _Rows(capacity - capacity // 8)
        self.names = [site.name for site in forward.gates.sites]
        self.last: list[Hashable] = []  # keys of the last step
        self.rebuild: Callable[[list[Any]], Any] = list

    def of(self, inputs: Any, keys: Sequence[Hashable]) -> Pass:
        """Answers that are looked up, or computed when they are asked for. Equal inputs have equal keys."""
        if not self.forward.by_sample:
            return self._run(inputs, len(keys))
        self._turn_to(keys)
        return _Answers(self, inputs, keys)

    def ask(self, inputs: Any, keys: Sequence[Hashable], see: Callable[[Site, Tensor], None] | None = None) -> None:
        """Runs the open network and remembers what it answers, until it is asked again at least."""
        found = self._run(inputs, len(keys), see)
        if self.forward.by_sample:
            leaves, self.rebuild = flatten(found.outputs)
            self.outputs.put(keys, leaves)
            if self.compares:
                self.sites.put(keys, [found.sites[name] for name in self.names])

    def remember(self, inputs: Any, keys: Sequence[Hashable]) -> None:
        """As if it had been asked for these in a step."""
        if self.forward.by_sample:
            self._turn_to(keys)
            if not (self.outputs.full and (self.sites.full or not self.compares)):
                self.look_up(inputs, keys, self.outputs)

    def _turn_to(self, keys: Sequence[Hashable]) -> None:
        """What did not fit is forgotten after its step, or the last bits would depend on where a run went on."""
        if list(keys) != self.last:
            self.last = list(keys)
            self.outputs.forget_passing()
            self.sites.forget_passing()

    def _run(self, inputs: Any, samples: int, see: Callable[[Site, Tensor], None] | None = None) -> Pass:
        with torch.no_grad(), self.forward.gates.everything_open():
            return self.forward(inputs, samples, see)

    def look_up(self, inputs: Any, keys: Sequence[Hashable], rows: _Rows) -> list[Tensor]:
        self.compares |= rows is self.sites  # whoever asks for them compares
        if rows.missing(keys):
            rows.forget_passing()
            places = rows.missing(keys)
            every = len(places) == len(keys)
            self.ask(
                inputs if every else pick(inputs, torch.tensor(places, dtype=torch.long)),
                [keys[place] for place in places],
            )
        return rows.of(keys)


class _Answers(Pass):
    """The open network's answers to some inputs."""

    teacher: Teacher
    inputs: Any
    keys: Sequence[Hashable]

    def __init__(self, teacher: Teacher, inputs: Any, keys: Sequence[Hashable]):
        vars(self).update(teacher=teacher, inputs=inputs, keys=keys)  # the base is frozen

    @cached_property
    def outputs(self) -> Any:
        leaves = self.teacher.look_up(self.inputs, self.keys, self.teacher.outputs)
        return self.teacher.rebuild(leaves)

    @cached_property
    def sites(self) -> dict[str, Tensor]:
        values = self.teacher.look_up(self.inputs, self.keys, self.teacher.sites)
        return dict(zip(self.teacher.names, values, strict=True))

    def take(self, samples: Tensor) -> Pass:
        whole = samples.nonzero()[:, 0] if samples.dtype == torch.bool else samples
        return _Answers(self.teacher, pick(self.inputs, whole), [self.keys[place] for place in whole.tolist()])


class _Rows:
    """Tensors with a row for each key. Rows beyond `room` bytes are passing: they stay until others are put in."""

    def __init__(self, room: int):
        self.room = room
        self.places: dict[Hashable, int] = {}
        self.passing: list[Hashable] = []
        self.staying = 0  # rows
        self.full = False
        self.tables: list[Tensor] = []
        self.orders: list[list[int]] = []  # of axes in memory: mixing orders would slow down what is computed from them

    def missing(self, keys: Sequence[Hashable]) -> list[int]:
        """Where in the list those stand that are not here, each once."""
        return list({key: place for place, key in enumerate(keys) if key not in self.places}.values())

    def forget_passing(self) -> None:
        for key in self.passing:
            del self.places[key]
        self.passing = []

    def put(self, keys: Sequence[Hashable], values: Sequence[Tensor]) -> None:
        """values: tensors with a row for each key."""
        self.forget_passing()
        new = self.missing(keys)
        if not self.tables:
            self.orders = [sorted(range(1, x.dim()), key=lambda axis: -x.stride()[axis]) for x in values]
            self.tables = [
                x.new_empty(0, *x.permute(0, *order).shape[1:]) for x, order in zip(values, self.orders, strict=True)
            ]
        end = self.staying + len(new)
        most = self.room // max(1, sum(value[0].nbytes for value in values))  # rows that may stay
        if end > len(self.tables[0]):
            rows = max(end, min(2 * self.staying, most + len(new)))
            self.tables = [_longer(table, self.staying, rows) for table in self.tables]
        for table, value, order in zip(self.tables, values, self.orders, strict=True):
            value = value.permute(0, *order)
            table[self.staying : end] = value if len(new) == len(keys) else value[torch.tensor(new, dtype=torch.long)]
        self.places.update((keys[place], self.staying + row) for row, place in enumerate(new))
        fit = min(max(0, most - self.staying), len(new))
        self.passing = [keys[place] for place in new[fit:]]
        self.staying += fit
        self.full |= fit < len(new)

    def of(self, keys: Sequence[Hashable]) -> list[Tensor]:
        rows = torch.tensor([self.places[key] for key in keys], dtype=torch.long, device=self.tables[0].device)
        return [
            table.index_select(0, rows).permute(0, *(order.index(axis) + 1 for axis in sorted(order)))
            for table, order in zip(self.tables, self.orders, strict=True)
        ]


def _longer(table: Tensor, used: int, rows: int) -> Tensor:
    longer = table.new_empty(rows, *table.shape[1:])
    longer[:used] = table[:used]
    return longer


def _first_axes(outputs: Any) -> list[int | None]:
    return [len(leaf) if isinstance(leaf, Tensor) and leaf.dim() else None for leaf in leaves_of(outputs)]


def _full_precision(outputs: Any) -> Any:
    leaves, rebuild = flatten(outputs)
    half = (torch.bfloat16, torch.float16)
    return rebuild([leaf.float() if isinstance(leaf, Tensor) and leaf.dtype in half else leaf for leaf in leaves])
