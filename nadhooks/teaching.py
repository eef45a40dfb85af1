"""The open network, whose answers the gated one is compared with: asked once for each input, as far as memory lasts."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batching import copied, forms, listed, pick
from .errors import LearningError
from .fusing import Fused, fused
from .gates import Gates
from .gating import by_unit
from .methods import Pass
from .nesting import flatten, leaves_of
from .shortcut import Shortcut, shortcut
from .sites import Site
from .tracing import call_model, doubled


@dataclass
class Forward:
    """Forward passes of a gated model that show what leaves each site, in the form that is fastest.

    read: takes from what the model puts out what objectives are shown. autocast: a dtype to compute in, such as
    torch.bfloat16. overwritten: sites whose tensor a later layer overwrites in place, so that it has to be copied.
    channels_last: images go in that way; convolutions are faster then. by_sample: what `read` gives are tensors with
    a row for each sample that does not depend on the others, as it does where a model pads a list of images to the
    largest. fused: in force while the model runs. shortcut: past what no gate changes, for inputs of the form that it
    was tried on. passed: what the last pass knew there, until the way back.
    """

    gates: Gates
    device: torch.device
    read: Callable[[Any], Any]
    autocast: torch.dtype | None = None
    overwritten: set[str] = field(default_factory=set)
    channels_last: bool = False
    by_sample: bool = True
    fused: Fused = field(default_factory=lambda: Fused({}))
    shortcut: Shortcut | None = None
    form: Any = None
    passed: Tensor | None = None

    def __call__(
        self,
        inputs: Any,
        samples: int,
        see: Callable[[Site, Tensor], None] | None = None,
        known: Mapping[str, Tensor] | None = None,
    ) -> Pass:
        """see: is shown the sites' tensors besides, as they pass. known: what leaves the open network's sites."""
        given = inputs
        short = self._known(inputs, known)
        if torch.is_grad_enabled():
            self.passed = short
        while True:
            inputs = copied(given, torch.channels_last if self.channels_last else torch.preserve_format)
            seen: dict[str, Tensor] = {}
            left: dict[str, tuple[Tensor, int]] = {}

            def watch(site: Site, x: Tensor) -> None:
                if see:
                    see(site, x)
                if x.is_inference():
                    raise LearningError(
                        f"site {site.name!r} runs under torch.inference_mode(), where nothing can be learnt; have the "
                        "model run it outside"
                    )
                kept = x.clone() if site.name in self.overwritten else x
                left[site.name] = kept, kept._version  # noqa: B023
                seen[site.name] = by_unit(kept, site, samples)  # noqa: B023

            enabled = torch.autocast(self.device.type, self.autocast, enabled=self.autocast is not None)
            with self.gates.watch(watch), enabled, self.fused, self._shortened(short):
                outputs = self.read(call_model(self.gates.attached(), inputs))
            changed = {name for name, (x, version) in left.items() if x._version != version}
            if not changed:
                return Pass(_full_precision(outputs), seen)
            self.overwritten |= changed  # found once for each network

    def _known(self, inputs: Any, known: Mapping[str, Tensor] | None) -> Tensor | None:
        """What the shortcut may put in place of the first site, if it may be taken."""
        if self.shortcut is None or known is None or forms(inputs) != self.form:
            return None
        return known[self.shortcut.site.name]

    def _shortened(self, known: Tensor | None) -> AbstractContextManager[None]:
        return nullcontext() if self.shortcut is None or known is None else self.shortcut.taken(known)

    @contextmanager
    def way_back(self) -> Iterator[None]:
        """To be in force while gradients are taken: activation checkpointing runs parts of the last pass again."""
        known, self.passed = self.passed, None
        with self.fused, self._shortened(known):
            yield

    def settle(self, sample: Any) -> None:
        """Tries what the model takes, on one sample: some flatten images with `view`, which wants the slower order."""
        pair = doubled(sample)
        with torch.no_grad(), self.gates.everything_open():
            self.form, precise = forms(sample), replace(self, autocast=None)
            trials = [(inputs, samples, precise(inputs, samples)) for inputs, samples in ((sample, 1), (pair, 2))]
            once, twice = (_first_axes(expected.outputs) for _, _, expected in trials)
            self.by_sample = bool(once) and set(once) == {1} and twice == [2] * len(once) and not listed(sample)
            self.channels_last = self._stays(trials, channels_last=True)
            found = fused(self.gates.attached(), lambda: self(pair, 2), self.channels_last)
            self.fused = found if self._stays(trials, fused=found) else self.fused
            # what a module keeps for others to read, not only what it puts out, has to be seen to be another's
            other = pytree.tree_map_only(Tensor, lambda x: x / 2 if x.is_floating_point() else x, pair)
            short = shortcut(self.gates.attached(), self.gates.sites[0], lambda: self(other, 2), 2)
            tried = (short, *short.disguises()) if short else ()
            self.shortcut = short if all(self._stays(trials, shortcut=each) for each in tried) else None

    def _stays(self, trials: Sequence[tuple[Any, int, Pass]], **changes: Any) -> bool:
        """Whether what the model puts out stays the same, but for rounding, with these fields."""
        changed = replace(self, autocast=None, **changes)
        for inputs, samples, expected in trials:
            try:
                found = changed(inputs, samples, known=expected.sites)
            except Exception:  # what a model makes of strange numbers and orders of memory is its own affair
                return False
            tensors = [[*leaves_of(each.outputs), *each.sites.values()] for each in (expected, found)]
            if not all(_alike(a, b) for a, b in zip(*tensors, strict=True) if isinstance(a, Tensor)):
                return False
        return True


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape or not a.is_floating_point():
        return a.shape == b.shape
    size = float(a.nan_to_num(0, 0, 0).abs().max())
    precision = 8 * torch.finfo(a.dtype).eps ** 0.75 * size
    return torch.allclose(a, b, rtol=0, atol=precision, equal_nan=True)


class Teacher:
    """The open network's answers, remembered as far as `capacity` bytes go.

    compares: what leaves the sites is wanted too.
    """

    def __init__(self, forward: Forward, capacity: int, compares: bool):
        self.forward, self.compares = forward, compares
        self.outputs, self.sites = _Rows(capacity // 8), _Rows(capacity - capacity // 8)
        self.names = [site.name for site in forward.gates.sites]
        self.last: list[Hashable] = []  # keys of the last step
        self.again = False  # whether an input has ever come again
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

    def forget_unused(self) -> None:
        """Gives memory back, once, where no input has come again, such as with crops at random: none will."""
        if not self.again and self.outputs.room:
            self.outputs, self.sites = _Rows(0), _Rows(0)

    def _turn_to(self, keys: Sequence[Hashable]) -> None:
        """What did not fit is forgotten after its step, or the last bits would depend on where a run went on."""
        if list(keys) != self.last:
            self.last = list(keys)
            self.outputs.forget_passing()
            self.sites.forget_passing()
        self.again |= any(key in self.outputs.places for key in keys)

    def _run(self, inputs: Any, samples: int, see: Callable[[Site, Tensor], None] | None = None) -> Pass:
        with torch.no_grad(), self.forward.gates.everything_open():
            return self.forward(inputs, samples, see)

    def look_up(self, inputs: Any, keys: Sequence[Hashable], rows: _Rows) -> list[Callable[[], Tensor]]:
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
        return self.teacher.rebuild([take() for take in leaves])

    @cached_property
    def sites(self) -> Mapping[str, Tensor]:
        values = self.teacher.look_up(self.inputs, self.keys, self.teacher.sites)
        return _Lazy(dict(zip(self.teacher.names, values, strict=True)))

    def take(self, samples: Tensor) -> Pass:
        whole = samples.nonzero()[:, 0] if samples.dtype == torch.bool else samples
        return _Answers(self.teacher, pick(self.inputs, whole), [self.keys[place] for place in whole.tolist()])


class _Lazy(Mapping[str, Tensor]):
    """Tensors that are put together when they are asked for."""

    def __init__(self, takes: Mapping[str, Callable[[], Tensor]]):
        self.takes = takes
        self.found: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.found:
            self.found[name] = self.takes[name]()
        return self.found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.takes)

    def __len__(self) -> int:
        return len(self.takes)


class _Rows:
    """Tensors with a row for each key. What `room` bytes do not hold is passing: it stays until others are put in."""

    def __init__(self, room: int):
        self.room = room
        self.places: dict[Hashable, int] = {}  # rows of the tables, and behind them those that pass
        self.passing: list[Hashable] = []
        self.passers: list[Tensor] = []
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
        self.passing, self.passers = [], []

    def put(self, keys: Sequence[Hashable], values: Sequence[Tensor]) -> None:
        """values: tensors with a row for each key."""
        self.forget_passing()
        new = self.missing(keys)
        most = self.room // max(1, sum(value[0].nbytes for value in values))  # rows that may stay
        if len(new) < len(keys):
            values = [value[torch.tensor(new, dtype=torch.long)] for value in values]
        if not self.tables:
            self.orders = [[0, *sorted(range(1, x.dim()), key=lambda axis: -x.stride()[axis])] for x in values]
            self.tables = [x.new_empty(0, *x.shape[1:]) for x in self._in_memory(values)]
        values = self._in_memory(values)
        fit = min(max(0, most - self.staying), len(new))
        end = self.staying + fit
        if end > len(self.tables[0]):
            self.tables = [_longer(table, self.staying, min(most, max(end, 2 * self.staying))) for table in self.tables]
        for table, value in zip(self.tables, values, strict=True):
            table[self.staying : end] = value[:fit]
        self.places.update((keys[place], self.staying + row) for row, place in enumerate(new))
        self.passing, self.passers = [keys[place] for place in new[fit:]], [value[fit:] for value in values]
        self.staying = end
        self.full |= fit < len(new)

    def of(self, keys: Sequence[Hashable]) -> list[Callable[[], Tensor]]:
        """What gives the rows of each tensor, whatever is put in or forgotten before it is called."""
        places, staying = [self.places[key] for key in keys], self.staying
        first, end = (places[0], places[0] + len(places)) if places else (0, 0)
        together = places == list(range(first, end)) and not first < staying < end
        rows = torch.tensor(places, dtype=torch.long)
        late = max(places, default=0) >= staying

        def take(table: Tensor, passers: Tensor, order: list[int]) -> Tensor:
            if not together:
                found = _mixed(table, passers, rows, staying) if late else table.index_select(0, rows.to(table.device))
            elif end <= staying:  # as they were put in: no copy; rows stay as they are, whatever is written behind
                found = table.data[first:end]
            else:
                found = passers[first - staying : end - staying]
            return found.permute(sorted(range(len(order)), key=lambda axis: order[axis]))

        passers = self.passers or [table[:0] for table in self.tables]
        return [partial(take, *each) for each in zip(self.tables, passers, self.orders, strict=True)]

    def _in_memory(self, values: Sequence[Tensor]) -> list[Tensor]:
        return [x.permute(order) for x, order in zip(values, self.orders, strict=True)]


def _mixed(table: Tensor, passers: Tensor, rows: Tensor, staying: int) -> Tensor:
    """Rows of the first `staying` of a table, with others, those that are `late`, behind them."""
    rows = rows.to(table.device)
    late = rows >= staying
    found = table.new_empty(len(rows), *table.shape[1:])
    found[~late], found[late] = table[rows[~late]], passers[rows[late] - staying]
    return found


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
