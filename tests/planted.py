"""Networks built by hand in which it is known exactly which units each class needs.

Every class asks its own yes-or-no question of a few *signals* in the input. Each site carries every signal in some
units, all of which all carriers of that signal behind them read. Beside them are distractors, which carry noise and
mixtures of all that is before them, are never still, and are read by distractors only. What a class needs is therefore,
in every site, the carriers of the signals that it asks about; to be told from others, too, for the signals are never
still, so that every answer is a matter of degree. Carriers are the more active units on a class's own samples, so
that a ranking by activation finds them as well: these networks tell whether a method errs, not which one is best.

The softmax over all answers couples nothing: class c says yes with logit log σ(l_c), and no, in two equal halves, with
log σ(−l_c) − log 2. These add up to 1 for every class, so that p(c) = σ(l_c) / classes depends on the signals of c
alone. (Two halves, so that the largest logit of a class's own sample is its yes.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import nadhooks

CLASSES = 5
OTHERS = 5  # further labels, samples of which have no strong signal
SITES = 3
COPIES = 8  # units of each signal in each site
DISTRACTORS = 24  # in each site
NOISE = 4  # inputs beside the signals
BUSY = 0.5  # how strongly distractors read; as active as a weak carrier or less
GAIN = 6.0  # logits between a class's own samples and others, on the average


def disjoint() -> Tensor:
    """Two signals of its own for each class; (classes, signals) of 0 and 1, as all of these."""
    return torch.eye(CLASSES).repeat_interleave(2, 1)


def overlapping() -> Tensor:
    """Two signals for each class, one of which the class before it asks about too, and one the class behind."""
    return torch.eye(CLASSES) + torch.eye(CLASSES).roll(1, 1)


def shared() -> Tensor:
    """Two signals of its own for each class, and one that all ask about."""
    return torch.cat([disjoint(), torch.ones(CLASSES, 1)], 1)


PARTS: dict[str, Callable[[], Tensor]] = {"disjoint": disjoint, "overlapping": overlapping, "shared": shared}
KINDS = list(product(PARTS, ("chain", "residual", "dense")))


class Layer(nn.Module):
    """ReLU(weight · x): a site's units."""

    def __init__(self, weight: Tensor):
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
        self.linear.weight.data = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.linear(x))


class Residual(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Network(nn.Module):
    """blocks: the sites; dense: each block, and the answers, read everything before, side by side."""

    reads: Tensor
    threshold: Tensor

    def __init__(self, stem: nn.Module, blocks: Sequence[nn.Module], reads: Tensor, threshold: Tensor, dense: bool):
        super().__init__()
        self.stem, self.blocks, self.dense = stem, nn.ModuleList(blocks), dense
        self.register_buffer("reads", reads)  # (classes, units)
        self.register_buffer("threshold", threshold)  # (classes,)

    def evidence(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        seen = []
        for block in self.blocks:
            x = block(x)
            seen.append(x)
            x = torch.cat(seen, 1) if self.dense else x
        return x @ self.reads.T

    def forward(self, x: Tensor) -> Tensor:
        logit = self.evidence(x) - self.threshold
        no = F.logsigmoid(-logit) - math.log(2)
        return torch.cat([F.logsigmoid(logit), no, no], 1)


@dataclass(frozen=True)
class Planted:
    """A network, what each class needs, {site: (classes, units) bool}, and samples of it."""

    name: str
    model: nn.Module
    truth: dict[str, Tensor]
    inputs: Tensor
    labels: Tensor

    @property
    def keep(self) -> int:
        """Units that a class needs: as many for every class."""
        (number,) = torch.cat(list(self.truth.values()), 1).sum(1).unique().tolist()
        return int(number)

    @property
    def loader(self) -> list[tuple[Tensor, Tensor]]:
        return list(zip(self.inputs.split(64), self.labels.split(64), strict=True))

    def learn(self, **options: object) -> nadhooks.Masks:
        return nadhooks.learn(self.model, self.loader, list(self.truth), tasks=CLASSES, **options)  # type: ignore[arg-type]

    def f1(self, masks: Mapping[str, Tensor]) -> Tensor:
        """(classes,) agreement of hard masks with the truth: 1 where they are the same."""
        found, true = (torch.cat([table[site].bool() for site in self.truth], 1) for table in (masks, self.truth))
        return 2 * (found & true).sum(1) / (found.sum(1) + true.sum(1))


def samples(asks: Tensor, number: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """(inputs (number, signals + noise), labels): signals of a sample's class are strong, others weak but never still.

    A signal that all classes ask about is strong in every other sample, whatever its class.
    """
    labels = torch.arange(number) % (len(asks) + OTHERS)
    strength = torch.rand(number, asks.shape[1], generator=random)  # [0, 1)
    wanted = torch.cat([asks, torch.zeros(OTHERS, asks.shape[1])])[labels] > 0
    signals = torch.where(wanted, 1.2 + 0.8 * strength, 0.1 + 0.4 * strength)
    everyone = asks.all(0)
    signals[:, everyone] = (0.2 + 1.2 * strength.round() + 0.6 * strength)[:, everyone]
    return torch.cat([signals, torch.rand(number, NOISE, generator=random)], 1), labels


def planted(parts: str, connections: str, seed: int = 0, number: int = 640) -> Planted:
    """parts: "disjoint", "overlapping" or "shared"; connections: "chain", "residual" or "dense"."""
    random = torch.Generator().manual_seed(seed)
    asks = PARTS[parts]()
    signals = asks.shape[1]
    carriers = signals * COPIES
    units = carriers + DISTRACTORS
    dense, residual = connections == "dense", connections == "residual"

    def weight(here: Tensor, sources: list[Tensor], reads: int) -> Tensor:
        """(units, reads) signals are read from where they were, by all copies; distractors mix everything.

        sources: (signals, copies) columns that carry each signal.
        """
        table = torch.zeros(units, reads)
        table[here[carriers:]] = BUSY * torch.rand(DISTRACTORS, reads, generator=random) / reads
        for signal, copies in enumerate(here[:carriers].reshape(signals, COPIES)):
            columns = torch.cat([source[signal] for source in sources])
            share = 0.5 + torch.rand(COPIES, len(columns), generator=random)
            table[copies[:, None], columns] = share / share.sum(1, keepdim=True)
        return table

    def carried(here: Tensor, offset: int = 0) -> Tensor:
        return here[:carriers].reshape(signals, COPIES) + offset

    places = torch.randperm(units, generator=random)
    stem = Layer(weight(places, [torch.arange(signals)[:, None]], signals + NOISE))
    sources, blocks, truth = [carried(places)], [], {}
    answers = torch.zeros(CLASSES, SITES * units if dense else units)
    for index in range(SITES):
        places = places if residual else torch.randperm(units, generator=random)
        table = weight(places, sources, index * units if dense and index else units)
        blocks.append(Residual(table / 2) if residual else Layer(table))
        here = carried(places, index * units if dense else 0)
        sources = [*(sources if dense and index else []), here]
        part = torch.zeros(CLASSES, units)
        part[:, places[:carriers]] = asks.repeat_interleave(COPIES, 1)
        truth[f"blocks.{index}"] = part.bool()
    for source in sources:
        answers[:, source.flatten()] = asks.repeat_interleave(COPIES, 1)
    inputs, labels = samples(asks, number, random)
    model = Network(stem, blocks, answers, torch.zeros(CLASSES), dense).eval()
    _calibrate(model, inputs, labels)
    return Planted(f"{parts}, {connections}", model, truth, inputs, labels)


def _calibrate(model: Network, inputs: Tensor, labels: Tensor) -> None:
    """Scales evidence to logits of GAIN / 2 for a class's own samples and −GAIN / 2 for others, on the average."""
    found = model.evidence(inputs)  # (samples, classes)
    own = F.one_hot(labels, CLASSES + OTHERS).bool()
    for label in range(CLASSES):
        yes, no = found[own[:, label], label].mean(), found[~own[:, label], label].mean()
        model.reads[label] *= GAIN / (yes - no)
        model.threshold[label] = GAIN / (yes - no) * (yes + no) / 2
