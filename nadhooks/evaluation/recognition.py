"""How well a sub-architecture still tells its own class from all others, on images of all classes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import objectives
from ..as_found import frozen
from ..batching import copied, moved
from ..default_device import made_on_cpu
from ..errors import DataError, NadhooksError, TaskError
from ..gates import Gates
from ..masks import Masks, check_masks
from ..objectives import Output
from ..sampling import Data, has, read
from ..tasks import Label
from ..tracing import call_model, logits_of

MEASURES = ("recall", "fpr", "auc", "fpr95")


@dataclass(frozen=True)
class Recognition:
    """One task's figures, all shares in [0, 1].

    kept: share of units. recall: own images that are answered with the class. fpr: other images that are (the
    false-positive rate). auc: area under the ROC curve of log p(class). fpr95: the false-positive rate at the threshold
    on log p(class) that finds 95 % of the own images. Recall alone says nothing: a network that answers its class to
    everything has recall 1, and fpr 1.
    """

    task: str
    kept: float
    recall: float
    fpr: float
    auc: float
    fpr95: float


@made_on_cpu
def recognition(
    gates: Gates,
    loader: Iterable[Any],
    masks: Masks | None = None,
    *,
    outputs: Mapping[Label, Sequence[int]] | None = None,
    output: Output = "softmax",
    progress: Callable[[int, int], None] | None = None,
) -> list[Recognition]:
    """Figures for every task of `masks`, each class's own gates applied to all of the loader's images.

    gates: attached to the model at the masks' sites; without masks, the full network is measured for the gates' tasks.
    loader: yields (inputs, labels), read once and kept in memory; labels of the tasks and others. The gates are given
        back as found.
    outputs: {label: indices of the outputs} that say yes to a task, where labels are not outputs themselves. output:
        "softmax", or "sigmoid" where a sample may be of several classes. progress: called with (tasks done, tasks).

    Raises DataError where a task has no images or no others, or outputs are NaN.
    """
    from sklearn.metrics import roc_auc_score, roc_curve

    if not isinstance(gates, Gates):
        raise NadhooksError(f"expected the gates that nadhooks.attach gives, got {type(gates).__name__}")
    if masks is not None:
        check_masks(masks)
    if output not in ("softmax", "sigmoid"):
        raise NadhooksError(f"output: expected 'softmax' or 'sigmoid', got {output!r}")
    tasks = masks.task_rows if masks is not None else gates.task_rows
    model = gates.attached()
    batches = [(inputs, labels) for inputs, labels, _ in read(loader)]
    if not batches:
        raise DataError("expected a loader of (inputs, labels) batches, got an empty one")
    labels = torch.cat([labels for _, labels in batches])
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    figures = []

    def answered() -> Tensor:
        found = torch.cat([logits_of(call_model(model, copied(moved(inputs, device)))).cpu() for inputs, _ in batches])
        if bool(found.isnan().any()):
            raise DataError(
                f"the model's outputs for sample {int(found.isnan().any(1).nonzero()[0])} of the loader are NaN; look "
                "for NaN in the inputs and the weights"
            )
        return found

    with frozen(model), torch.no_grad(), gates.lent():
        full = None
        if masks is None:
            with gates.everything_open():
                full = answered()
        else:
            gates.load(masks)
        for row, (label, name) in enumerate(zip(tasks.labels, tasks.names, strict=True)):
            if not isinstance(label, int):
                raise TaskError(f"task {name}: expected a label that is an output of the model, got {label!r}")
            if outputs is not None and label not in outputs:
                raise TaskError(f"task {name}: outputs= does not say which of the model's outputs mean it")
            own = has(labels, label)
            if not own.any() or own.all():
                raise DataError(f"task {name}: expected images of this class and of others, got one of them only")
            if full is None:
                with gates(name):
                    answers = answered()
            else:
                answers = full
            if outputs is None and not 0 <= label < answers.shape[1]:
                last = answers.shape[1] - 1
                raise TaskError(f"task {name} is not an output of the model, which has 0 to {last}")
            classes = (
                Data(loader, answers.shape[1], device, outputs).classes(label).expand(len(own), *[-1] * bool(outputs))
            )
            score = objectives.log_probability(answers.double(), classes, output)  # (images,)
            said = objectives.correct(answers, classes, output)
            wrongly, rightly, _ = roc_curve(own, score, drop_intermediate=False)  # the point at 95 % may be one
            figures.append(
                Recognition(
                    name,
                    float(masks.kept()[row]) if masks is not None else 1.0,
                    float(said[own].double().mean()),
                    float(said[~own].double().mean()),
                    float(roc_auc_score(own, score)),
                    float(wrongly[rightly >= 0.95].min()),
                )
            )
            if progress:
                progress(row + 1, len(tasks))
    return figures


@made_on_cpu
def quality(rows: Iterable[Recognition]) -> dict[str, Tensor]:
    """{measure: (tasks,)} for `masks.quality`."""
    rows = list(rows)
    return {measure: torch.tensor([getattr(row, measure) for row in rows], dtype=torch.float32) for measure in MEASURES}


@made_on_cpu
def shuffled(masks: Masks, seed: int = 0) -> Masks:
    """Random masks of the same size: each task's gates permuted within every site."""
    random = torch.Generator().manual_seed(seed)
    values = {
        site: torch.stack([row[torch.randperm(len(row), generator=random)] for row in value])
        for site, value in masks.values.items()
    }
    return masks.replaced(values)
