"""The authors' algorithm, written after their description without any of nadhooks' learning code, to compare with."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BETA = 0.2
EPOCHS = 21
BATCH = 16


class Mask(nn.Module):
    def __init__(self, logits: Tensor):
        super().__init__()
        self.logits = nn.Parameter(logits.float().reshape(1, -1, 1, 1).clone())

    def forward(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.output = self.logits.sigmoid() * output
        return self.output


def reference(
    teacher: nn.Module, student: nn.Module, initial: Mapping[str, Tensor], batches: Iterable[Tensor], label: int
) -> dict[str, Tensor]:
    """{site: (units,)} soft gates, learnt as the authors do: two networks, one class, weight gradients thrown away.

    initial: {site: (units,)} logits. batches: images of the class, 16 at a time.
    """
    masks = [Mask(logits) for logits in initial.values()]
    originals: list[Tensor] = []
    handles = [
        student.get_submodule(name).register_forward_hook(mask) for name, mask in zip(initial, masks, strict=True)
    ]
    handles += [
        teacher.get_submodule(name).register_forward_hook(lambda module, args, output: originals.append(output))
        for name in initial
    ]
    for images in batches:
        labels = torch.full((len(images),), label)
        originals.clear()
        with torch.no_grad():
            right = teacher(images).argmax(1) == label
        outputs = student(images)
        if not right.any():
            continue
        loss = F.cross_entropy(outputs, labels)
        for mask, original in zip(masks, originals, strict=True):
            loss = loss + F.mse_loss(mask.output[right], original[right])
        penalty = sum((mask.logits.sigmoid() ** 2).mean() for mask in masks)
        (loss / len(masks) + BETA * penalty / len(masks)).backward()
        for mask in masks:
            assert mask.logits.grad is not None
            mask.logits.data -= 0.1 * F.normalize(mask.logits.grad)
            mask.logits.grad = None
    for handle in handles:
        handle.remove()
    return {name: mask.logits.detach().sigmoid().flatten() for name, mask in zip(initial, masks, strict=True)}


class Shown:
    """Each class's images in an order of its own, another in each epoch: for the reference, and mixed, for `learn`."""

    def __init__(self, images: Mapping[int, Tensor], seed: int):
        self.images, self.seed = images, seed

    def order(self, label: int, epoch: int) -> Tensor:
        return torch.randperm(len(self.images[label]), generator=_generator(self.seed, epoch, label))

    def of(self, label: int) -> Iterator[Tensor]:
        """One class's batches, all epochs."""
        for epoch in range(EPOCHS):
            for chosen in self.order(label, epoch).split(BATCH):
                yield self.images[label][chosen]

    def mixed(self, labels: Sequence[int], batch: int = 160) -> Mixed:
        return Mixed(self, labels, batch)


class Mixed:
    """A loader of all classes' images, shuffled, in which each class's come in the reference's order.

    Each time that it is read to the end, the next epoch's order begins, as a DataLoader that shuffles does.
    """

    def __init__(self, shown: Shown, labels: Sequence[int], batch: int):
        self.shown, self.labels, self.batch, self.epoch = shown, labels, batch, 0

    def __len__(self) -> int:
        return -(-sum(len(self.shown.images[label]) for label in self.labels) // self.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        orders = {label: self.shown.order(label, self.epoch) for label in self.labels}
        labels = torch.cat([torch.full_like(order, label) for label, order in orders.items()])
        labels = labels[torch.randperm(len(labels), generator=_generator(self.shown.seed, self.epoch, -1))]
        images = torch.empty(len(labels), *self.shown.images[self.labels[0]].shape[1:])
        for label, order in orders.items():
            images[labels == label] = self.shown.images[label][order]
        yield from zip(images.split(self.batch), labels.split(self.batch), strict=True)
        self.epoch += 1


def _generator(seed: int, epoch: int, label: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1000 + epoch) * 1000 + label + 1)
