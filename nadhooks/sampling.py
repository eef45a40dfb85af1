"""Which sample goes through whose gates: batches for the learning loop, from any loader of (inputs, labels)."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sized
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .errors import LearningError, TaskError
from .methods import Method, Samples
from .tasks import Label, Tasks

POOL_BYTES = 2 * 2**30  # images kept in memory for balanced sampling


class Batch(NamedTuple):
    """What one step learns from: images, and which of them goes through whose gates."""

    images: Tensor
    picked: Tensor  # (samples,) places in images
    samples: Samples
    done: int  # of `total`, for progress
    total: int


@dataclass(frozen=True)
class Data:
    """A loader with what is known of the model: its number of outputs, and the device that samples go to."""

    loader: Iterable[Any]
    outputs: int
    device: torch.device

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, labels), on the device; labels are checked to be among the model's outputs."""
        shown = False
        for images, labels in read(self.loader):
            shown = True
            if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.outputs:
                wrong = int(labels.min()) if int(labels.min()) < 0 else int(labels.max())
                raise TaskError(
                    f"label {wrong} is out of range: the model has {self.outputs} outputs, "
                    f"so labels are 0 to {self.outputs - 1}"
                )
            yield images.to(self.device), labels
        if not shown:
            raise LearningError("expected a loader of (inputs, labels) batches, got an empty one")

    def tasks(self, tasks: Tasks | None) -> Tasks:
        """The given tasks, checked to be outputs of the model, or every label that the loader shows."""
        if tasks is None:
            return Tasks.of(sorted({int(label) for _, labels in self.batches() for label in labels.unique()}))
        wrong = [label for label in tasks.labels if not isinstance(label, int) or not 0 <= label < self.outputs]
        if wrong:
            raise TaskError(f"task {wrong[0]!r} is not an output of the model, which has 0 to {self.outputs - 1}")
        return tasks


def read(loader: Iterable[Any]) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) batches of a training loop's loader, one whole-number label per sample."""
    if not isinstance(loader, Iterable):
        raise LearningError(f"expected a loader of (inputs, labels) batches, got {type(loader).__name__}")
    for batch in loader:
        if not (isinstance(batch, (tuple, list)) and len(batch) >= 2 and isinstance(batch[0], Tensor)):
            raise LearningError(f"expected a loader of (inputs, labels) batches, got batches of {type(batch).__name__}")
        try:
            images, labels = batch[0], torch.as_tensor(batch[1])
        except (TypeError, ValueError, RuntimeError) as error:
            raise TaskError(f"expected whole-number labels, got {batch[1]!r}: {error}") from error
        if labels.dim() != 1 or len(labels) != len(images) or labels.is_floating_point():
            raise TaskError(
                f"expected {len(images)} whole-number labels, one per sample, "
                f"got shape {tuple(labels.shape)} of {labels.dtype}"
            )
        if len(images):
            yield images, labels.cpu().long()


def peek(loader: Iterable[Any]) -> tuple[Tensor, Iterable[Any]]:
    """One sample (1, …) of a loader, and the loader with that sample still in it (iterators are read once only)."""
    for images, labels in read(loader):
        first = (images, labels)
        return images[:1], chain([first], loader) if isinstance(loader, Iterator) else loader
    raise LearningError("expected a loader of (inputs, labels) batches, got an empty one")


def generator(seed: int, label: Label) -> torch.Generator:
    """Randomness of one task, whatever other tasks there are and in whatever order."""
    return torch.Generator().manual_seed(zlib.crc32(f"{seed}/{label}".encode()))


# --- each task's own samples, in the loader's order ------------------------------------------------------------------


def own_batches(data: Data, tasks: Tasks, method: Method) -> Iterator[Batch]:
    """Batches of one task each, every epoch's last one possibly smaller, as a loader over that class alone gives."""
    total = method.epochs * len(data.loader) if isinstance(data.loader, Sized) else 0
    done = 0
    for _ in range(method.epochs):
        waiting: list[list[Tensor]] = [[] for _ in tasks.labels]
        shown = [0] * len(tasks)
        for images, labels in data.batches():
            done += 1
            for row, label in enumerate(tasks.labels):
                mine = images[labels.eq(int(label)).to(images.device)]
                shown[row] += len(mine)
                waiting[row] += mine.unbind(0)
                while len(waiting[row]) >= method.batch:
                    ready, waiting[row] = waiting[row][: method.batch], waiting[row][method.batch :]
                    yield _own_batch(ready, row, tasks, done, total)
        _check_shown(shown, tasks)
        for row, rest in enumerate(waiting):
            if rest:
                yield _own_batch(rest, row, tasks, done, total)


def _own_batch(images: list[Tensor], row: int, tasks: Tasks, done: int, total: int) -> Batch:
    stacked = torch.stack(images)
    rows = torch.full((len(images),), row, device=stacked.device)
    samples = Samples(rows, torch.full_like(rows, int(tasks.labels[row])), torch.ones_like(rows, dtype=torch.bool))
    return Batch(stacked, torch.arange(len(images), device=stacked.device), samples, done, total)


# --- as many of every task, in every step ----------------------------------------------------------------------------


@dataclass
class Pool:
    """Images in memory, sorted by label, so that those of one label are one stretch."""

    images: Tensor
    labels: Tensor
    stretches: dict[int, tuple[int, int]]  # label -> first, one past the last

    @classmethod
    def of(cls, data: Data, tasks: Tasks | None, method: Method) -> Pool:
        """As many images of each label as the method draws, in the loader's order; stops reading when it has them.

        Where memory is short, tasks and contrast share it half and half.
        """
        drawn = method.steps * method.positives
        own = {int(label) for label in tasks.labels} if tasks else set(range(data.outputs))
        limits: dict[int, int] = {}
        kept: dict[int, list[Tensor]] = {}
        for images, labels in data.batches():
            affordable = POOL_BYTES // 2 // images[0].nbytes
            limits = limits or {
                label: min(drawn, max(4, affordable // (len(own) if label in own else data.outputs)))
                for label in range(data.outputs)
            }
            for image, label in zip(images, labels.tolist(), strict=True):
                if len(kept.setdefault(label, [])) < limits[label]:
                    kept[label].append(image.clone())  # a view would keep its whole batch in memory
            if all(len(kept.get(label, ())) == limit for label, limit in limits.items()):
                break
        stretches, end = {}, 0
        for label in sorted(kept):
            stretches[label] = (end, end + len(kept[label]))
            end += len(kept[label])
        labels = torch.tensor([label for label in stretches for _ in kept[label]])
        return cls(torch.stack([image for label in stretches for image in kept[label]]), labels, stretches)

    def tasks(self, tasks: Tasks | None, method: Method) -> Tasks:
        """The given tasks or all labels of the pool, checked to have the samples that the method needs."""
        if tasks is not None:
            _check_shown([label in self.stretches for label in tasks.labels], tasks)
        if method.negatives and len(self.stretches) < 2:
            raise LearningError(
                f"{method.name} needs samples of at least two labels, for contrast, got label "
                f'{next(iter(self.stretches))} only; show it more of the data, or use method="class-only"'
            )
        return tasks or Tasks.of(list(self.stretches))


def balanced_batches(
    pool: Pool, tasks: Tasks, method: Method, seed: int, chunk: int = 0, chunks: int = 1
) -> Iterator[Batch]:
    """`steps` batches with `positives` samples of each task and `negatives` of any other label.

    chunk, chunks: which part of all tasks this is, for progress.
    """
    draws = [_draws(pool, int(label), method, generator(seed, label)) for label in tasks.labels]
    device = pool.images.device
    rows = torch.arange(len(tasks)).repeat_interleave(method.positives + method.negatives)
    classes = torch.tensor([int(label) for label in tasks.labels])[rows]
    for step in range(method.steps):
        chosen = torch.cat([draw[step] for draw in draws])  # (samples,) places in the pool
        unique, picked = chosen.unique(return_inverse=True)
        samples = Samples(rows.to(device), classes.to(device), (pool.labels[chosen] == classes).to(device))
        yield Batch(
            pool.images[unique.to(device)],
            picked.to(device),
            samples,
            chunk * method.steps + step + 1,
            chunks * method.steps,
        )


def _draws(pool: Pool, label: int, method: Method, random: torch.Generator) -> Tensor:
    """(steps, positives + negatives) places in the pool: own images in shuffled rounds, others uniformly."""
    first, end = pool.stretches[label]
    number = method.steps * method.positives
    rounds = -(-number // (end - first))
    own = torch.cat([torch.randperm(end - first, generator=random) for _ in range(rounds)])[:number] + first
    others = max(1, len(pool.labels) - (end - first))
    negative = torch.randint(others, (method.steps, method.negatives), generator=random)
    negative = negative + (negative >= first) * (end - first)  # step over the stretch of the label's own
    return torch.cat([own.reshape(method.steps, method.positives), negative], 1)


def _check_shown(shown: list[int] | list[bool], tasks: Tasks) -> None:
    missing = [name for name, number in zip(tasks.names, shown, strict=True) if not number]
    if missing:
        few = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
        raise LearningError(f"the loader shows no sample of task {few}; leave it out of tasks=, or show it the class")
