"""The DARTS network of the paper, built from a published genotype, and the sites that its authors gate.

DARTS (Liu et al., ICLR 2019) searches for two cells, normal and reducing; a genotype lists, for each of a cell's four
steps, two operations and the earlier state that each reads. `DARTS_V2` is the one published for ImageNet; the network
of 14 cells with 48 channels is the one that Hu et al. (ICCV 2021) disentangle.

    python examples/darts.py
    nadhooks sites examples/darts.py:imagenet_network --sites stem0 stem1 'cells.*'
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

SITES = ["stem0", "stem1", "cells.*"]


class Genotype(NamedTuple):
    """Per cell kind: (operation, state that it reads), two for each step. States 0 and 1 are the cell's inputs."""

    normal: list[tuple[str, int]]
    reduce: list[tuple[str, int]]


DARTS_V2 = Genotype(
    normal=[
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 0), ("sep_conv_3x3", 1),
        ("sep_conv_3x3", 1), ("skip_connect", 0),
        ("skip_connect", 0), ("dil_conv_3x3", 2),
    ],
    reduce=[
        ("max_pool_3x3", 0), ("max_pool_3x3", 1),
        ("skip_connect", 2), ("max_pool_3x3", 1),
        ("max_pool_3x3", 0), ("skip_connect", 2),
        ("skip_connect", 2), ("max_pool_3x3", 1),
    ],
)  # fmt: skip


def relu_conv_bn(inputs: int, outputs: int, *convolutions: nn.Module) -> nn.Sequential:
    """ReLU, convolutions (a 1x1 one by default), batch norm."""
    layers = convolutions or (nn.Conv2d(inputs, outputs, 1, bias=False),)
    return nn.Sequential(nn.ReLU(), *layers, nn.BatchNorm2d(outputs))


def depthwise(channels: int, size: int, stride: int, dilation: int = 1) -> nn.Conv2d:
    padding = dilation * (size - 1) // 2
    return nn.Conv2d(channels, channels, size, stride, padding, dilation, groups=channels, bias=False)


class HalvingPath(nn.Module):
    """Halves height and width: two 1x1 convolutions, one on the even and one on the odd pixels, side by side."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.even = nn.Conv2d(inputs, outputs // 2, 1, stride=2, bias=False)
        self.odd = nn.Conv2d(inputs, outputs - outputs // 2, 1, stride=2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = x.relu()
        return self.norm(torch.cat([self.even(x), self.odd(x[:, :, 1:, 1:])], 1))


def operation(name: str, channels: int, stride: int) -> nn.Module:
    pointwise = (nn.Conv2d(channels, channels, 1, bias=False), nn.Conv2d(channels, channels, 1, bias=False))
    if name == "max_pool_3x3":
        return nn.MaxPool2d(3, stride, 1)
    if name == "skip_connect":
        return nn.Identity() if stride == 1 else HalvingPath(channels, channels)
    if name == "sep_conv_3x3":  # twice: only the first halves
        first = relu_conv_bn(channels, channels, depthwise(channels, 3, stride), pointwise[0])
        return nn.Sequential(first, relu_conv_bn(channels, channels, depthwise(channels, 3, 1), pointwise[1]))
    if name == "dil_conv_3x3":
        return relu_conv_bn(channels, channels, depthwise(channels, 3, stride, dilation=2), pointwise[0])
    raise ValueError(f"expected an operation of DARTS_V2, got {name!r}")


class Cell(nn.Module):
    """Four steps, each the sum of two operations on earlier states; what it puts out is all four side by side."""

    def __init__(self, steps: list[tuple[str, int]], before: int, last: int, channels: int, halves: bool, after: bool):
        super().__init__()
        # `after`: the previous cell halved, so that the state before it is still twice as large
        self.adapt0 = HalvingPath(before, channels) if after else relu_conv_bn(before, channels)
        self.adapt1 = relu_conv_bn(last, channels)
        self.reads = [state for _, state in steps]
        self.operations = nn.ModuleList(
            operation(name, channels, 2 if halves and state < 2 else 1) for name, state in steps
        )

    def forward(self, before: Tensor, last: Tensor) -> Tensor:
        states = [self.adapt0(before), self.adapt1(last)]
        for step in range(0, len(self.reads), 2):
            pair = [self.operations[i](states[self.reads[i]]) for i in (step, step + 1)]
            states.append(pair[0] + pair[1])
        return torch.cat(states[2:], 1)


class Network(nn.Module):
    """Two stems, cells, a classifier; the cells at one and two thirds halve the picture and double the channels."""

    def __init__(self, genotype: Genotype = DARTS_V2, channels: int = 48, cells: int = 14, classes: int = 1000):
        super().__init__()
        half = channels // 2
        self.stem0 = nn.Sequential(
            nn.Conv2d(3, half, 3, 2, 1, bias=False), nn.BatchNorm2d(half), nn.ReLU(),
            nn.Conv2d(half, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels),
        )  # fmt: skip
        self.stem1 = nn.Sequential(
            nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels)
        )
        self.cells = nn.ModuleList()
        before, last, width, after = channels, channels, channels, True
        for index in range(cells):
            halves = index in (cells // 3, 2 * cells // 3)
            width *= 2 if halves else 1
            steps = genotype.reduce if halves else genotype.normal
            self.cells.append(Cell(steps, before, last, width, halves, after))
            before, last, after = last, len(steps) // 2 * width, halves
        self.classifier = nn.Linear(last, classes)

    def forward(self, x: Tensor) -> Tensor:
        before = self.stem0(x)
        last = self.stem1(before)
        for cell in self.cells:
            before, last = last, cell(before, last)
        return self.classifier(last.mean((2, 3)))


def imagenet_network() -> Network:
    """The paper's: 14 cells, 48 channels, 1,000 classes, for images of 224 x 224. Weights are random."""
    network = Network()
    network.pretrained_cfg = {"input_size": (3, 224, 224)}  # type: ignore[assignment]  # what timm models say
    return network.eval()


if __name__ == "__main__":
    import nadhooks

    with nadhooks.attach(imagenet_network(), SITES) as gates:
        for site in gates.sites:
            print(f"{site.name:10} {site.units:4} units, fed by {', '.join(gates.wiring.predecessors(site.name))}")
        print(f"{len(gates.sites)} sites, {sum(site.units for site in gates.sites):,} units")
