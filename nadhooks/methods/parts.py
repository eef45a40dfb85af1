"""What a learning method is made of, and what its parts are shown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from ..batching import pick
from ..errors import LearningError
from ..gating import Closed
from ..objectives import Output

Sampling = Literal["own", "balanced", "each"]

Table = dict[str, Tensor]  # {site: (tasks, units)}


class Parted(Table):
    """A table whose sites are parts of one tensor, (rows, units of all): many small operations cost more than a large.

    like: another table of these sites.
    """

    def __init__(self, whole: Tensor, like: Table):
        self.whole, self.parts = whole, whole.split([x.shape[1] for x in like.values()], 1)
        super().__init__(zip(like, self.parts, strict=True))


def whole(table: Table) -> Tensor:
    """All sites' units side by side, (rows, units)."""
    if isinstance(table, Parted) and [*map(id, table.values())] == [*map(id, table.parts)]:  # as it was made still
        return table.whole
    return torch.cat(list(table.values()), 1)


@dataclass(frozen=True)
class Pass:
    """One forward pass: what the model put out, and what left each site, {site: (samples, units, positions)}.

    outputs: (samples, classes) logits of a classifier; whatever another model returns.
    """

    outputs: Any
    sites: Mapping[str, Tensor]

    def take(self, samples: Tensor) -> Pass:
        """Some samples only: (n,) indices or (samples,) booleans. The open network computes just those, if need be."""
        return Pass(pick(self.outputs, samples), {name: x[samples] for name, x in self.sites.items()})


@dataclass(frozen=True)
class Samples:
    """Which sample went through whose gates.

    rows: (samples,) the task's row. positive: (samples,) bool, the sample is of that task. classes: which outputs of
    the model say yes to the task: (samples,) the one output, or (samples, outputs) booleans; the label where outputs
    are no classes. targets: what the loader yielded third, if it did. step: how many steps were before. keep: (tasks,)
    the share that each task is to keep, of what its budget counts, None without one. closed: what closed units put out.
    """

    rows: Tensor
    classes: Tensor
    positive: Tensor
    targets: Any = None
    step: int = 0
    keep: Tensor | None = None
    closed: Closed = "optimal"


@dataclass(frozen=True)
class Step:
    """Where the learning stands: step number `index` of `total`; afterwards, for the final gates, index is total.

    left: what part of that which is to be closed is open still. best: hard gates of the highest scores within the
    budget at this step. noise: uniform random numbers of the tasks' own, {site: (tasks, units)}. closed: what closed
    units put out.
    """

    index: int
    total: int
    left: float
    best: Callable[[Table], Table]
    noise: Callable[[], Table]
    closed: Closed = "optimal"

    @property
    def final(self) -> bool:
        return self.index >= self.total


Losses = Tensor | Mapping[str, Tensor]  # (tasks,), or terms that add up to the loss, each (tasks,)
Objective = Callable[[Pass, Pass, Samples, Table], Losses]  # student, teacher, samples, gates -> one loss for each task
Estimator = Callable[[Table, Step], Table]  # scores -> gates, through which gradients flow
Update = Callable[
    [Table, Table, Step, Table], None
]  # scores, gradients, step, state: changes scores and state in place


@dataclass(frozen=True)
class Method:
    """A way to learn masks: an objective, an estimator of gates, an update of scores, and how samples are drawn.

    sampling: "own", each task's samples `epochs` times from the loader in batches of `batch`; "balanced", in each of
        `steps` draws `positives` of every task and `negatives` of others, from up to `images` of each label in memory;
        "each", `positives` samples of every task, gates for each sample, averaged over them after `steps` steps.
    schedule: (step, steps) -> what part of that which is to be closed is open still.
    output: what the objective takes outputs for: "softmax" classes, of which a sample has one, "sigmoid" classes, of
        which it has any number, or "any"thing. compares: the objective looks at `teacher.sites`. ranks: it says what
        units count, not how far outputs are from the full network's; fidelity is then that of softmax classes.
    keep: the share kept where nothing else is said; None where it follows from the objective. pace: for a share
        below 0.55, `steps` and `images` times (0.55 / share) to this power, at most twelve times as many.
    floor: what part of the share that is kept every site keeps at least, where units are the best of all sites.
    shallow: in what part of the steps, spread evenly, no gradient leads back to the first quarter of the sites, whose
        layers often take longest; in the others theirs is larger by as much as makes up for it.
    closing: with `closed` "optimal", the update of what closed units put out, {site: (tasks, units)} in standard
        deviations of the unit from its mean. None where that cannot be learnt.
    """

    name: str
    objective: Objective
    estimator: Estimator
    update: Update
    initial: Callable[[int, torch.Generator], Tensor]
    sampling: Sampling
    closed: Closed
    keep: float | None
    schedule: Callable[[int, int], float] = lambda index, total: 0.0
    output: Output = "softmax"
    compares: bool = True
    ranks: bool = False
    epochs: int = 1
    batch: int = 16
    steps: int = 0
    pace: float = 0.0
    floor: float = 0.0
    shallow: float = 0.0
    positives: int = 0
    negatives: int = 0
    images: int | None = None
    closing: Update | None = None
    options: Mapping[str, Any] = field(default_factory=dict)

    def described(self) -> dict[str, Any]:
        """Its options, as they are now, for the masks' provenance."""
        now = {name: getattr(self, name, None) for name in self.options}
        told = {name: value if value and now[name] is None else now[name] for name, value in self.options.items()}
        return {name: value.item() if isinstance(value, np.generic) else value for name, value in told.items()}

    def paced(self, share: float, closed: Closed = "optimal") -> Method:
        """With as many steps as so much to close takes, and images for them: none comes oftener than in fewer steps.

        Where what closed units put out is learnt as a rule, and now is not, it takes as many as for a tenth less.
        """
        share = 0.9 * share if self.closed == "optimal" != closed else share
        times = min(12.0, max(1.0, (0.55 / share) ** self.pace))
        images = self.images and round(self.images * times)
        return replace(self, steps=round(self.steps * times), images=images, pace=0.0)

    def shallow_at(self, index: int) -> bool:
        """Whether a step is one of those; 0.31 of the steps keep time with no turns that an objective takes."""
        return int((index + 1) * self.shallow) > int(index * self.shallow)

    def __post_init__(self) -> None:
        needed = ("epochs", "batch") if self.sampling == "own" else ("steps", "positives")
        for name in needed:
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise LearningError(f"{self.name}: expected {name} of at least 1, got {getattr(self, name)!r}")
        if self.sampling not in get_args(Sampling):
            raise LearningError(f"{self.name}: expected sampling of {get_args(Sampling)}, got {self.sampling!r}")
        if self.negatives < 0 or not (self.images is None or self.images >= 1):
            raise LearningError(
                f"{self.name}: expected negatives of at least 0 and images of at least 1 (or None), got "
                f"{self.negatives!r} and {self.images!r}"
            )
        if not 0 <= self.floor <= 1:
            raise LearningError(f"{self.name}: expected a floor from 0 to 1, got {self.floor!r}")
        if not 0 <= self.shallow < 1:
            raise LearningError(f"{self.name}: expected shallow from 0 to below 1, got {self.shallow!r}")
        if self.output not in ("softmax", "sigmoid", "any"):
            raise LearningError(f"{self.name}: expected output 'softmax', 'sigmoid' or 'any', got {self.output!r}")
