"""What masks belong to: tasks, each with a label (what the data says) and a name (what a person reads)."""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from .default_device import made_on_cpu
from .errors import TaskError

# no control characters, halves of surrogate pairs and marks that turn the direction of writing, for names are printed,
# drawn and put into files, of which XML takes not every one
TEXT = re.compile("[^\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]*")
LONGEST = 1_000  # characters of a name

Label = int | str
TaskSpec = int | Sequence[Label] | Mapping[Label, str]


@dataclass(frozen=True)
class Tasks:
    """Labels and names of tasks, in the order of the masks' rows; for ImageNet's classes their WordNet ids too."""

    labels: tuple[Label, ...]
    names: tuple[str, ...]
    wordnet: tuple[str, ...] = field(default=(), compare=False)  # none, or one for each task, empty where unknown

    def __post_init__(self) -> None:
        if not self.labels:
            raise TaskError("expected at least one task, got none")
        for kind, values in (("label", self.labels), ("name", self.names)):
            if len(set(values)) != len(values):
                double = next(value for value in values if values.count(value) > 1)
                raise TaskError(f"expected every task {kind} once, got {double!r} several times")
            for value in values:
                if isinstance(value, str) and (len(value) > LONGEST or not TEXT.fullmatch(value)):
                    raise TaskError(
                        f"expected a task {kind} of at most {LONGEST} characters, none of them control characters, "
                        f"got {ascii(value)[:60]}"
                    )
        if self.wordnet and len(self.wordnet) != len(self.labels):
            raise TaskError(f"expected a WordNet id for each of {len(self)} tasks, got {len(self.wordnet)}")

    @classmethod
    def of(cls, tasks: TaskSpec) -> Tasks:
        """From a number K (labels 0..K-1), a sequence of labels, or a mapping from label to name."""
        if isinstance(tasks, Mapping):
            return cls(tuple(map(_label, tasks)), tuple(map(_name, tasks.values())))
        if alone(tasks):
            try:
                number = _label(tasks)
            except TaskError:
                number = ""
            if not isinstance(number, int) or number < 1:
                raise TaskError(
                    f"tasks: expected a number of at least 1, a sequence of labels or {{label: name}}, got {tasks!r}"
                )
            return cls(tuple(range(number)), tuple(str(label) for label in range(number)))
        labels = tuple(_label(task) for task in tasks)  # type: ignore[union-attr]
        return cls(labels, tuple(str(label) for label in labels))

    def __len__(self) -> int:
        return len(self.labels)

    @cached_property
    def _rows(self) -> dict[Label, int]:
        """Row of every label, and of every name that is not a label."""
        return {name: row for row, name in enumerate(self.names)} | {
            label: row for row, label in enumerate(self.labels)
        }

    def row(self, task: object) -> int:
        """The row of one task, given by its name or its label."""
        row = self._rows.get(_label(task))
        if row is not None:
            return row
        raise TaskError(f"unknown task {task!r}: expected {self._expected()}")

    @made_on_cpu
    def rows(self, labels: object) -> Tensor:
        """Row of each sample's task: labels (batch,) -> int64 (batch,); one name or label gives (1,)."""
        if isinstance(labels, Tensor):
            if labels.is_floating_point() or labels.dtype == torch.bool or labels.is_complex():
                raise TaskError(f"labels: expected integers, got a tensor of {labels.dtype}")
            if labels.dim() > 1:
                raise TaskError(f"labels: expected one per sample, shape (batch,), got shape {tuple(labels.shape)}")
            # one round trip to the host; the few labels of a batch cost less than a look-up on the device would
            return torch.tensor([self.row(label) for label in labels.reshape(-1).tolist()], dtype=torch.long)
        rows = [self.row(labels)] if alone(labels) else [self.row(label) for label in labels]  # type: ignore[attr-defined]
        if not rows:
            raise TaskError("labels: expected one per sample, got none")
        return torch.tensor(rows, dtype=torch.long)

    def select(self, rows: Sequence[int]) -> Tasks:
        labels, names = (tuple(values[row] for row in rows) for values in (self.labels, self.names))
        return Tasks(labels, names, tuple(self.wordnet[row] for row in rows) if self.wordnet else ())  # type: ignore[arg-type]

    def _expected(self) -> str:
        shown = [
            repr(label) if str(label) == name else f"{label!r} ({name})"
            for label, name in zip(self.labels[:6], self.names[:6], strict=True)
        ]
        more = f", … ({len(self)} in all)" if len(self) > 6 else ""
        return "one of " + ", ".join(shown) + more


def alone(given: object) -> bool:
    """Whether it is one task, or one number, and not several."""
    return isinstance(given, (str, bytes)) or not hasattr(given, "__iter__") or getattr(given, "ndim", 1) == 0


def _name(name: object) -> str:
    if not alone(name):
        raise TaskError(
            f"tasks: expected a name for each label, got {name!r}; which of a model's outputs mean a task is said by "
            "nadhooks.learn(outputs={label: [output, …]})"
        )
    return str(name)


def _label(label: object) -> Label:
    if isinstance(label, str):
        return label
    try:
        if not isinstance(label, bool) and not (isinstance(label, Tensor) and label.dtype == torch.bool):
            return operator.index(label)  # type: ignore[arg-type]  # int, numpy's integers, tensors of one integer
    except (TypeError, ValueError, RuntimeError):
        pass
    raise TaskError(f"expected a label that is an integer or a name, got {label!r}")
