"""`learn`: the loop that turns a trained model and a loader into masks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .errors import LearningError, ModelError, NadhooksError
from .gates import Closed, Gates, attach, check_closed
from .identity import weights_of
from .masks import Masks
from .methods import METHODS, Method, Objective, Pass, Step, Table, from_objective, kept_share
from .sampling import Batch, Data, Pool, balanced_batches, generator, own_batches, peek
from .sites import Axis, Site, Sites
from .tasks import Tasks, TaskSpec
from .tracing import call_model, undisturbed

SAMPLES_PER_PASS = 256  # more tasks than fit a pass of so many samples are learnt chunk by chunk


class Progress(NamedTuple):
    """What `progress` is called with after each step; total is 0 where the loader does not know its length."""

    done: int
    total: int
    loss: float


def learn(
    model: nn.Module,
    loader: Iterable[Any],
    sites: Sites | None = None,
    *,
    tasks: TaskSpec | None = None,
    method: str | Method | Objective = "contrastive",
    keep: float | None = None,
    closed: Closed | None = None,
    example: Any = None,
    axis: Axis | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
) -> Masks:
    """Learns a mask for each task: which units of `model` that task needs.

    loader: yields (inputs, labels), labels (batch,) being the model's own output indices, as in any training loop.
    sites, axis, example: as for `attach`; the example is a sample of the loader by default.
    tasks: as for `attach`; None means every label that the loader shows. Samples of other labels serve as contrast.
    method: "contrastive" (default), "class-only", "nad" (the paper's), one of `nadhooks.methods` with options, or an
        objective `(student, teacher, samples, gates) -> (tasks,) losses` in place of contrastive's own.
    keep: the share of units to keep, in (0, 1]; 0.55 by default. With "nad" it follows from the method's beta.
    closed: what a closed unit puts out, "zero" or "mean"; by default "zero" for "nad" and "mean" for the others.
    seed: decides initial scores and draws, for each task alone: the order of tasks changes nothing.
    progress: called after each step with (done, total, loss).

    The model's weights, gradients, training flags and hooks and the random state are left as found. Raises
    LearningError for an empty loader, a task without samples and a loss that is not finite, TaskError for labels that
    do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    method = _method(method)
    keep = _keep(keep, method)
    closed = method.closed if closed is None else closed
    check_closed(closed)
    given = Tasks.of(tasks) if tasks is not None else None
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)  # for a loader that shuffles; `frozen` puts the user's random state back
        sample, loader = peek(loader)
        device = next((p.device for p in model.parameters()), sample.device)
        with attach(model, sites, example=sample.to(device) if example is None else example, axis=axis) as gates:
            with torch.no_grad():
                outputs = logits_of(call_model(model, sample.to(device)))
            if outputs.shape[1] < 2:
                raise ModelError("expected a classifier of two or more classes, got one output")
            data = Data(loader, outputs.shape[1], device)
            learner = _Learner(gates, data, method, keep, closed, seed, progress)
            known, values = learner.own(given) if method.sampling == "own" else learner.balanced(given)
            provenance = {
                "method": method.name,
                "options": dict(method.options),
                "keep": keep,
                "seed": seed,
                "sites": gates.chosen_by,
                **({"weights": weights} if (weights := weights_of(model)) else {}),
            }
            return gates.masks_of(known, values, provenance)


@dataclass
class _Learner:
    gates: Gates
    data: Data
    method: Method
    keep: float | None
    closed: Closed
    seed: int
    progress: Callable[[Progress], None] | None

    def own(self, tasks: Tasks | None) -> tuple[Tasks, Table]:
        """Each task sees its own samples only, batch by batch as the loader shows them."""
        if isinstance(self.data.loader, Iterator):
            raise LearningError(
                f"{self.method.name} reads the data again and again ({self.method.epochs} epochs), got an iterator "
                "that ends after once; pass a DataLoader or a list of batches"
            )
        tasks = self.data.tasks(tasks)
        if self.closed == "mean":
            self.gates.calibrate(images for images, _ in self.data.batches())
        scores = self.initial(tasks)
        self.run(own_batches(self.data, tasks, self.method), scores)
        return tasks, self.final(scores)

    def balanced(self, tasks: Tasks | None) -> tuple[Tasks, Table]:
        """Every task sees as many samples in every step, drawn from images kept in memory."""
        pool = Pool.of(self.data, tasks and self.data.tasks(tasks), self.method)
        tasks = pool.tasks(tasks, self.method)
        if self.closed == "mean":
            self.gates.calibrate(pool.images.split(SAMPLES_PER_PASS))
        size = max(1, SAMPLES_PER_PASS // (self.method.positives + self.method.negatives))
        chunks = [tasks.select(range(len(tasks))[start : start + size]) for start in range(0, len(tasks), size)]
        learnt = []
        for number, chunk in enumerate(chunks):
            scores = self.initial(chunk)
            self.run(balanced_batches(pool, chunk, self.method, self.seed, number, len(chunks)), scores)
            learnt.append(self.final(scores))
        return tasks, {site: torch.cat([table[site] for table in learnt]) for site in learnt[0]}

    def initial(self, tasks: Tasks) -> Table:
        random = [generator(self.seed, label) for label in tasks.labels]
        return {
            site.name: torch.stack([self.method.initial(site.units, task) for task in random]).to(logits)
            for site, logits in zip(self.gates.sites, self.gates.parameters(), strict=True)
        }

    def run(self, batches: Iterable[Batch], scores: Table) -> None:
        """The loop: the open network, the gated one, each task's loss, its gradient, the update. Changes `scores`."""
        method = self.method
        state: Table = {}
        for index, batch in enumerate(batches):
            step = Step(index, method.steps, kept_share(index, method.steps, self.keep) if self.keep else 1.0)
            leaves = {site: score.detach().requires_grad_() for site, score in scores.items()}
            table = method.estimator(leaves, step)  # {site: (tasks, units)}
            with torch.no_grad():
                open_pass = self.forward(batch.images)
            teacher = Pass(open_pass.outputs[batch.picked], {s: x[batch.picked] for s, x in open_pass.sites.items()})
            rows = batch.samples.rows
            with self.gates.apply({site: gate[rows] for site, gate in table.items()}):
                student = self.forward(batch.images[batch.picked])
                losses = method.objective(student, teacher, batch.samples, table)  # (tasks,)
                _check_losses(losses, len(next(iter(scores.values()))))
                losses = losses[rows.unique()]  # a penalty must not move tasks that the batch does not show
                # inside `apply`: activation checkpointing runs the forward pass again in here
                gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
            if not bool(losses.isfinite().all()):
                value = float(losses.detach().sum())
                raise LearningError(
                    f"the loss is {value} at step {index + 1}; look for NaN in the inputs and the weights"
                )
            with torch.no_grad():
                method.update(scores, dict(zip(scores, gradients, strict=True)), step, state)
            if self.progress:
                self.progress(Progress(batch.done, batch.total, float(losses.detach().mean())))

    def forward(self, images: Tensor) -> Pass:
        seen: dict[str, Tensor] = {}

        def see(site: Site, x: Tensor) -> None:
            seen[site.name] = x.clone().reshape(len(images), -1)  # clone: an in-place ReLU that follows would change x

        with self.gates.watch(see):
            return Pass(logits_of(self.gates.attached()(images)), seen)

    def final(self, scores: Table) -> Table:
        step = Step(self.method.steps, self.method.steps, self.keep or 1.0)
        return {site: gate.detach().cpu() for site, gate in self.method.estimator(scores, step).items()}


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients for weights inside; flags and the random state as found afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        with undisturbed(model):
            yield
    finally:
        for parameter, required in flags:
            parameter.requires_grad_(required)


def logits_of(outputs: Any) -> Tensor:
    """(batch, classes) of whatever a classifier returns: a tensor, or a tuple that begins with it."""
    first = outputs[0] if isinstance(outputs, (tuple, list)) and outputs else outputs
    if not isinstance(first, Tensor) or first.dim() != 2:
        got = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else type(first).__name__
        raise ModelError(f"expected a classifier that puts out (batch, classes), got {got}")
    return first


def _check_losses(losses: object, tasks: int) -> None:
    if not isinstance(losses, Tensor) or losses.shape != (tasks,):
        got = f"shape {tuple(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__
        raise LearningError(f"the objective must give one loss per task, shape ({tasks},), got {got}")
    if not losses.requires_grad:
        raise LearningError("the objective does not depend on any gate, so nothing can be learnt from it")


def _method(method: str | Method | Objective) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if callable(method) and method not in METHODS.values():
        return from_objective(method)
    raise NadhooksError(f"method: expected {', '.join(map(repr, METHODS))}, a Method or an objective, got {method!r}")


def _keep(keep: float | None, method: Method) -> float | None:
    if keep is None:
        return method.keep
    if method.keep is None:
        raise NadhooksError(
            f"keep: with {method.name!r} the share that is kept follows from its options, got keep={keep}"
        )
    if not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise NadhooksError(f"keep: expected a share above 0 and at most 1, got {keep}")
    return keep
