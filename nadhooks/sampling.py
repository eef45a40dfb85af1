"""Which sample goes through whose gates: batches for the learning loop, from any loader of (inputs, labels)."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .batching import described, digest, join, moved, nbytes, pick, pickable, singles, size, sizes
from .default_device import users_device
from .errors import LearningError, TaskError
from .methods import Method, Samples
from .tasks import Label, Tasks

POOL_BYTES = 2 * 2**30  # of samples in memory
WAY_OUT = "pass torch.utils.data.DataLoader(data set), or [(inputs, labels)] for tensors"
SAMPLES_PER_PASS = 256  # more tasks than fit a pass of so many samples are learnt chunk by chunk


class Batch(NamedTuple):
    """What one step learns from: an input for each sample, what it is known by, and whose gates it goes through."""

    inputs: Any
    keys: Sequence[Hashable]
    samples: Samples
    done: int  # of `total`, for progress; 0 where the loader does not know its length and was not read yet
    total: int


@dataclass(frozen=True)
class Data:
    """A loader with what is known of the model: its number of outputs, if labels are among them, and its device.

    meaning: {label: the outputs that say yes to it}, where labels are not outputs themselves. memory: bytes for samples
    that are drawn from, or wait for others.
    """

    loader: Iterable[Any]
    outputs: int | None
    device: torch.device
    meaning: Mapping[Label, Sequence[int]] | None = None
    memory: int = POOL_BYTES

    def batches(self) -> Iterator[tuple[Any, Tensor, Any]]:
        """(inputs, labels, targets), inputs and targets on the device; labels are checked."""
        shown = False
        for inputs, labels, targets in read(self.loader):
            shown = True
            self._check(labels)
            yield moved(inputs, self.device), labels, moved(targets, self.device)
        if not shown:
            raise LearningError("expected a loader of (inputs, labels) batches, got an empty one")

    def _check(self, labels: Tensor) -> None:
        if self.outputs is None or self.meaning is not None:
            return
        if labels.dim() == 2:
            if labels.shape[1] != self.outputs:
                raise TaskError(f"expected a label for each of the {self.outputs} outputs, got {labels.shape[1]}")
        elif not 0 <= int(labels.min()) <= int(labels.max()) < self.outputs:
            wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
            raise TaskError(
                f"label {wrong} is out of range: the model has {self.outputs} outputs, "
                f"so labels are 0 to {self.outputs - 1}"
            )

    def tasks(self, tasks: Tasks | None) -> Tasks:
        """The given tasks, checked to be outputs of the model, or every label that the loader shows."""
        if tasks is None:
            return Tasks.of(sorted({label for _, labels, _ in self.batches() for label in shown_in(labels)}))
        known: Iterable[object] | None = self.meaning
        if known is None and self.outputs is not None:
            known = range(self.outputs)
        wrong = [label for label in tasks.labels if known is not None and label not in known]
        if wrong and self.meaning is not None:
            raise TaskError(f"task {wrong[0]!r}: outputs= does not say which of the model's outputs mean it")
        strings = [label for label in tasks.labels if not isinstance(label, int)]
        if strings:
            raise TaskError(
                f"task {strings[0]!r}: expected the whole number that the loader's labels say it with; "
                f"to name it pass {{number: name}}, as in tasks={{3: {strings[0]!r}}}"
            )
        if wrong:
            raise TaskError(
                f"task {wrong[0]!r} is not an output of the model, which has 0 to {(self.outputs or 0) - 1}"
            )
        return tasks

    def classes(self, label: Label) -> Tensor:
        """Which outputs say yes to a task: () its number, or (outputs,) booleans."""
        if self.meaning is None or self.outputs is None:
            return torch.tensor(int(label))
        return torch.zeros(self.outputs, dtype=torch.bool).index_fill(0, torch.tensor(list(self.meaning[label])), True)


def read(loader: Iterable[Any]) -> Iterator[tuple[Any, Tensor, Any]]:
    """(inputs, labels, targets) of a training loop's loader: a whole-number label for each sample, or 0 or 1 for each
    sample and label; targets is whatever came third, or None. Of a dict "labels" are the labels, and the rest inputs.
    """
    if not isinstance(loader, Iterable):
        raise LearningError(f"expected a loader of (inputs, labels) batches, got {type(loader).__name__}; {WAY_OUT}")
    for batch in _batches(loader):
        if isinstance(batch, Mapping) and "labels" in batch:
            batch = {name: x for name, x in batch.items() if name != "labels"}, batch["labels"]
        if not (isinstance(batch, (tuple, list)) and len(batch) >= 2):
            keys = f" of {', '.join(map(repr, batch))}, without 'labels'" if isinstance(batch, Mapping) else ""
            got = f"{type(batch).__name__}{keys or f'; {WAY_OUT}'}"
            raise LearningError(f"expected a loader of (inputs, labels) batches, got batches of {got}")
        inputs = (batch[0],) if isinstance(batch[0], list) else batch[0]  # models take a list as their one argument
        inputs = pytree.tree_map_only(np.ndarray, torch.as_tensor, inputs)
        samples = size(inputs)
        inputs = inputs if samples is None else pickable(inputs, samples)
        if samples is None:
            raise LearningError(
                "expected a loader of (inputs, labels) batches, inputs being a tensor, a list with an entry for each "
                f"sample, or a tuple or dict of such, of one length; got {type(batch[0]).__name__}"
            )
        try:
            labels = torch.as_tensor(batch[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(f"expected whole-number labels, got {batch[1]!r}: {error}") from error
        if labels.dim() == 2 and len(labels) == samples and bool(((labels == 0) | (labels == 1)).all()):
            labels = labels.bool()
        elif labels.dim() != 1 or len(labels) != samples or labels.is_floating_point():
            hint = "; a list has an entry for each sample, a tuple one for each argument of the model"
            hint = hint if isinstance(batch[0], (list, tuple)) else ""
            if labels.dim() == 0:
                hint = f"; this is a sample, not a batch: {WAY_OUT}"
            if labels.dim() == 2 and len(labels) == samples and labels.is_floating_point():
                hint = "; these are mixed or soft labels, as of MixUp, CutMix or label smoothing: pass a loader without"
            raise TaskError(
                f"expected {samples} whole-number labels, one per sample (or {samples} rows of 0 and 1), "
                f"got shape {tuple(labels.shape)} of {labels.dtype}{hint}"
            )
        else:
            labels = labels.long()
        if samples:
            yield inputs, labels.cpu(), _targets(batch[2], samples) if len(batch) > 2 else None


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    with users_device():
        batches = iter(loader)
    while True:
        try:
            with users_device():
                batch = next(batches)
        except StopIteration:
            return
        yield batch


def _targets(given: Any, samples: int) -> Any:
    """What came third, in a form that samples can be picked from."""
    targets = pickable(given, samples)
    if sizes(targets) - {samples}:
        raise LearningError(
            f"expected a third part (targets) with an entry for each of the {samples} samples, as a tensor, a list or "
            f"a tuple or dict of such, got {described(given)}; yield (inputs, labels) alone if no objective asks for it"
        )
    return targets


def _joined(batches: Sequence[Any]) -> Any:
    try:
        return join(batches)
    except ValueError as error:
        way_out = "bring them to one, or yield images of several sizes as lists with an entry for each sample"
        raise LearningError(f"{error}; {way_out}") from error


def _length(loader: Iterable[Any]) -> int:
    """Batches of a loader, 0 where it does not know."""
    try:
        return len(loader) if isinstance(loader, Sized) else 0
    except TypeError:  # a DataLoader of a data set without a length
        return 0


def shown_in(labels: Tensor) -> list[int]:
    """The labels that a batch shows."""
    return labels.any(0).nonzero()[:, 0].tolist() if labels.dim() == 2 else labels.unique().tolist()


def has(labels: Tensor, label: Label) -> Tensor:
    """(batch,) whether each sample is of that label."""
    if labels.dim() == 1:
        return labels.eq(int(label))
    return labels[:, int(label)] if 0 <= int(label) < labels.shape[1] else torch.zeros(len(labels), dtype=torch.bool)


def peek(loader: Iterable[Any]) -> tuple[Any, Iterable[Any]]:
    """One sample of a loader, and the loader with that sample still in it (iterators are read once only)."""
    batches = read(loader)
    for batch in batches:
        sample = pick(batch[0], torch.tensor([0]))
        # the rest as it comes: some begin anew when they are asked for an iterator, though they are one
        return sample, chain([batch], batches) if isinstance(loader, Iterator) else loader
    raise LearningError("expected a loader of (inputs, labels) batches, got an empty one")


def seed_loaders(seed: int, device: torch.device) -> None:
    """For loaders that shuffle, and images that change on the model's device; others' random state is not ours."""
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


def generator(seed: int, *what: object) -> torch.Generator:
    """Randomness of one task, whatever other tasks there are and in whatever order."""
    return torch.Generator().manual_seed(zlib.crc32("/".join(map(str, (seed, *what))).encode()))


# --- each task's own samples, in the loader's order ------------------------------------------------------------------


def own_batches(data: Data, tasks: Tasks, method: Method) -> Iterator[Batch]:
    """Batches of each task, every epoch's last one possibly smaller, as a loader over that class alone gives.

    Batches of several tasks go together, never two of one, for the second wants what was learnt from the first. Tasks
    wait for each other as long as memory for a pool lasts.
    """
    total = method.epochs * _length(data.loader)
    classes = [data.classes(label) for label in tasks.labels]
    together = max(1, SAMPLES_PER_PASS // method.batch)  # tasks
    done = 0
    for _ in range(method.epochs):
        waiting: list[list[tuple[Any, Any]]] = [[] for _ in tasks.labels]  # samples of each task, and their targets
        shown = [0] * len(tasks)
        for inputs, labels, targets in data.batches():
            done += 1
            for row, label in enumerate(tasks.labels):
                mine = has(labels, label).nonzero()[:, 0]
                shown[row] += len(mine)
                if len(mine):  # without a name for them: they would lie beside the batch that is made of them
                    own = (singles(pick(part, mine), len(mine)) for part in (inputs, targets))
                    waiting[row] += zip(*own, strict=True)
            affordable = data.memory // max(1, nbytes(pick(inputs, torch.tensor([0]))))
            while True:
                ready = [row for row, samples in enumerate(waiting) if len(samples) >= method.batch]
                held = sum(map(len, waiting))
                if not ready or (len(ready) < min(together, len(tasks)) and held < affordable):
                    break
                yield _own_batch(waiting, ready[:together], method.batch, classes, done, total)
        _check_shown(shown, tasks)
        total = total or method.epochs * done
        while any(waiting):  # first what is whole
            ready = [row for row, samples in enumerate(waiting) if len(samples) >= method.batch]
            rows = ready or [row for row, samples in enumerate(waiting) if samples]
            yield _own_batch(waiting, rows[:together], method.batch, classes, done, total)


def _own_batch(
    waiting: list[list[tuple[Any, Any]]],
    tasks: Sequence[int],
    number: int,
    classes: Sequence[Tensor],
    done: int,
    total: int,
) -> Batch:
    taken, rows = [], []
    for row in tasks:
        taken += waiting[row][:number]
        rows += [row] * len(waiting[row][:number])
        del waiting[row][:number]
    inputs = _joined([sample for sample, _ in taken])
    keys = [digest(sample) for sample, _ in taken]
    task_of = torch.tensor(rows)
    positive = torch.ones_like(task_of, dtype=torch.bool)
    samples = Samples(task_of, torch.stack(list(classes))[task_of], positive, _joined([target for _, target in taken]))
    return Batch(inputs, keys, samples, done - (done == total and any(waiting)), total)  # total is for the last


# --- as many of every task, in every step ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Pool:
    """Samples in memory with their labels: (samples,) whole numbers, or (samples, labels) booleans."""

    inputs: Any
    labels: Tensor
    targets: Any

    @classmethod
    def of(cls, data: Data, tasks: Tasks | None, method: Method) -> Pool:
        """As many samples of each label as the method draws, in the loader's order; stops reading when it has them.

        Where memory is short, tasks share it half and half with labels that are contrast alone, and a warning says if
        tasks get less than they want. Sorted by label.
        """
        drawn = method.images or method.steps * method.positives
        known = range(data.outputs) if data.outputs is not None and data.meaning is None else None
        own = set(tasks.labels) if tasks else set(known or ())
        memory = data.memory if known and own >= set(known) else data.memory // 2
        parts: list[tuple[Any, Tensor, Any]] = []
        first: list[int] = []  # the label that each sample is kept for
        number: dict[int, int] = {}
        for inputs, labels, targets in data.batches():
            affordable = memory // max(1, nbytes(pick(inputs, torch.tensor([0]))))
            limit = {True: affordable // max(1, len(own)), False: affordable // max(1, len(known or number))}
            limit = {mine: min(drawn, max(4, most)) for mine, most in limit.items()}
            chosen = []
            for place, every in enumerate(labels.tolist()):
                for label in [every] if labels.dim() == 1 else [x for x, yes in enumerate(every) if yes]:
                    if number.get(label, 0) < limit[not own or label in own]:
                        number[label] = number.get(label, 0) + 1
                        chosen.append(place)
                        first.append(label)
                        break
            if chosen:
                places = torch.tensor(chosen)
                parts.append((pick(inputs, places), labels[places], pick(targets, places)))
            if known and all(number.get(label, 0) >= limit[label in own] for label in known):
                break
        if not parts:
            raise LearningError("the loader shows no sample of any label")
        if any(limit[True] <= number[label] < drawn for label in number if not own or label in own):
            warnings.warn(
                f"{limit[True]} samples of each task are drawn from, not {drawn}, for lack of memory; "
                f"pass a larger memory= ({data.memory:,} bytes now)",
                stacklevel=5,
            )
        order = torch.tensor(first).argsort(stable=True)
        inputs, labels, targets = (pick(_joined(part), order) for part in zip(*parts, strict=True))
        return cls(inputs, labels, targets)

    def __len__(self) -> int:
        return len(self.labels)

    def tasks(self, tasks: Tasks | None, method: Method) -> Tasks:
        """The given tasks or all labels of the pool, checked to have the samples that the method needs."""
        labels = shown_in(self.labels)
        if tasks is not None:
            _check_shown([label in labels for label in tasks.labels], tasks)
        tasks = tasks or Tasks.of(labels)
        if method.negatives and any(bool(has(self.labels, label).all()) for label in tasks.labels):
            other = "" if method.name == "class-only" else ', or use method="class-only"'
            raise LearningError(
                f"{method.name} needs samples of at least two labels, for contrast, got label {labels[0]} only; "
                f"show it more of the data{other}"
            )
        return tasks

    def parted(self, every: int) -> tuple[Pool, Pool]:
        """Two pools: all but every so-manieth sample, and those."""
        held = torch.arange(len(self)) % every == every - 1
        return self.part(~held), self.part(held)

    def part(self, chosen: Tensor) -> Pool:
        return Pool(pick(self.inputs, chosen), self.labels[chosen], pick(self.targets, chosen))

    def batch(self, places: Tensor, rows: Tensor, classes: Tensor, positive: Tensor, done: int, total: int) -> Batch:
        samples = Samples(rows, classes, positive, pick(self.targets, places))
        return Batch(pick(self.inputs, places), places.tolist(), samples, done, total)


def balanced_batches(
    pool: Pool, data: Data, tasks: Tasks, method: Method, seed: int, chunk: int = 0, chunks: int = 1
) -> Iterator[Batch]:
    """`steps` batches with `positives` samples of each task and `negatives` of others.

    chunk, chunks: which part of all tasks this is, for progress.
    """
    draws = [_draws(pool, label, method, generator(seed, label)) for label in tasks.labels]
    rows = torch.arange(len(tasks)).repeat_interleave(method.positives + method.negatives)
    classes = torch.stack([data.classes(label) for label in tasks.labels])[rows]
    positive = (torch.arange(method.positives + method.negatives) < method.positives).repeat(len(tasks))
    for step in range(method.steps):
        places = torch.cat([draw[step] for draw in draws])  # (samples,)
        done, total = chunk * method.steps + step + 1, chunks * method.steps
        yield pool.batch(places, rows, classes, positive, done, total)


def each_batches(
    pool: Pool, data: Data, tasks: Tasks, method: Method, seed: int
) -> Iterator[tuple[Tensor, Iterator[Batch]]]:
    """(row of the task of each sample, `steps` times the same batch), a row of gates for each sample."""
    places, rows = [], []
    for row, label in enumerate(tasks.labels):
        mine = has(pool.labels, label).nonzero()[:, 0]
        chosen = mine[torch.randperm(len(mine), generator=generator(seed, label))[: method.positives]]
        places.append(chosen)
        rows.append(torch.full_like(chosen, row))
    classes = torch.stack([data.classes(label) for label in tasks.labels])
    parts = list(zip(torch.cat(places).split(SAMPLES_PER_PASS), torch.cat(rows).split(SAMPLES_PER_PASS), strict=True))
    total = len(parts) * method.steps
    for number, (chosen, row) in enumerate(parts):
        own, yes = torch.arange(len(chosen)), torch.ones(len(chosen), dtype=torch.bool)
        done = number * method.steps
        yield row, (pool.batch(chosen, own, classes[row], yes, done + step + 1, total) for step in range(method.steps))


def _draws(pool: Pool, label: Label, method: Method, random: torch.Generator) -> Tensor:
    """(steps, positives + negatives) places in the pool: own samples in shuffled rounds, others uniformly."""
    mine = has(pool.labels, label)
    own, others = mine.nonzero()[:, 0], (~mine).nonzero()[:, 0]
    number = method.steps * method.positives
    rounds = -(-number // len(own))
    positive = torch.cat([own[torch.randperm(len(own), generator=random)] for _ in range(rounds)])[:number]
    drawn = torch.randint(max(1, len(others)), (method.steps, method.negatives), generator=random)
    return torch.cat([positive.reshape(method.steps, method.positives), others[drawn]], 1)


def _check_shown(shown: list[int] | list[bool], tasks: Tasks) -> None:
    missing = [name for name, number in zip(tasks.names, shown, strict=True) if not number]
    if missing:
        few = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise LearningError(f"the loader shows no sample of task {few}; leave it out of tasks=, or show it the class")
