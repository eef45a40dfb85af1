"""Small networks made by hand, in float64, for exact expectations."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn


class Line(nn.Module):
    """Convolution, ReLU (in place), convolution, ReLU, pooling, classifier: (batch, 2, 6, 6) -> (batch, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1)
        self.act1 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(4, 5, 3, padding=1)
        self.act2 = nn.ReLU()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act1(self.conv1(x))
        return self.head(self.act2(self.conv2(x)).mean((2, 3)))


class Lean(Line):
    """`Line` with smaller kernels: the same sites with as many units, of other layers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 5, 1)


class Split(nn.Module):
    """Two branches from one stem, summed, and a shortcut: stem feeds left and right, all three feed join."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6)
        self.left = nn.Linear(6, 6)
        self.right = nn.Linear(6, 6)
        self.unused = nn.Linear(6, 6)
        self.join = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.join(self.left(x).relu() + self.right(x).relu() + x)


class Pair(nn.Module):
    """Puts out a tuple, so that its sites have leaves."""

    def __init__(self) -> None:
        super().__init__()
        self.both = Both()
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.both(x)
        return self.head(left + right)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.left(x), self.right(x)


class Mlp(nn.Module):
    """(batch, 4) -> (batch, 3) with one hidden site `act` of `hidden` units."""

    def __init__(self, hidden: int = 7) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, hidden)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(hidden, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


Net = TypeVar("Net", bound=nn.Module)


def seeded(kind: type[Net], seed: int = 0) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind().double().eval()


def images(batch: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def vectors(batch: int = 6, seed: int = 1) -> Tensor:
    return torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def labelled(model: nn.Module, x: Tensor, batch: int = 13) -> list[tuple[Tensor, Tensor]]:
    """A loader of these inputs with the labels that the network itself gives them, and some wrong ones."""
    with torch.no_grad():
        labels = model(x).argmax(1)
    labels[::7] = (labels[::7] + 1) % 3
    return list(zip(x.split(batch), labels.split(batch), strict=True))


def sorted_by_label(loader: list[tuple[Tensor, Tensor]], batch: int = 13) -> list[tuple[Tensor, Tensor]]:
    """The same samples class by class, each class in its order."""
    x, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    order = labels.argsort(stable=True)
    return list(zip(x[order].split(batch), labels[order].split(batch), strict=True))


def fair_line(seed: int = 2) -> Line:
    """A `Line` that gives each of its classes some of the images, and is sure of it."""
    return fair(seeded(Line, seed))


def fair(model: Line) -> Line:
    with torch.no_grad():
        model.head.bias.sub_(model(images(64)).mean(0))
        scale = 3 / model(images(64)).std(0)
        model.head.weight.mul_(scale[:, None])
        model.head.bias.mul_(scale)
    return model
