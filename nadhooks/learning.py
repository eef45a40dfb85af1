"""`learn`: the loop that turns a trained model and a loader into masks."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os import PathLike
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from . import objectives
from .batching import digest, moved
from .budgets import Budget, Selection
from .checkpoints import Checkpoint
from .errors import LearningError, ModelError, NadhooksError, TaskError
from .evaluation.recognition import MEASURES, recognition
from .gates import Closed, Gates, attach, check_closed
from .gating import UnitMeans
from .identity import weights_of, without_wrappers
from .masks import Masks, check_same_sites
from .methods import METHODS, Method, Objective, Samples, Step, Table, from_objective
from .progress import Clock, Progress, Report, every_report
from .sampling import (
    SAMPLES_PER_PASS,
    Batch,
    Data,
    Pool,
    balanced_batches,
    each_batches,
    generator,
    has,
    own_batches,
    peek,
    read,
)
from .sites import Axis, Site, Sites
from .tasks import Label, Tasks, TaskSpec
from .teaching import Forward, Teacher
from .tracing import call_model, frozen, logits_of

CACHE_BYTES = 2 * 2**30
TIMES = 10  # in a run that held-out samples are measured
REFINED = 2  # shares between the last that is faithful enough and the first that is not
SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.15, 0.1, 0.05)  # that fidelity tries
HELD_OUT = 5  # of each so many samples one is held out where fidelity is asked for and nothing else is given
HELD_OUT_DRAWS: dict[str, Any] = {"steps": 4, "positives": 8, "negatives": 8, "images": None}
WARM = 3.0  # scores of a warm start run from minus this to this; a step of ours moves them by about 1


def learn(
    model: nn.Module,
    loader: Iterable[Any],
    sites: Sites | None = None,
    *,
    tasks: TaskSpec | None = None,
    method: str | Method | Objective = "contrastive",
    keep: float | int | Budget | None = None,
    fidelity: float | None = None,
    closed: Closed | None = None,
    start: str | Method | Masks | None = None,
    outputs: Mapping[Label, Sequence[int]] | None = None,
    held_out: Iterable[Any] | None = None,
    example: Any = None,
    axis: Axis | None = None,
    seed: int = 0,
    autocast: torch.dtype | None = None,
    cache: int = CACHE_BYTES,
    checkpoint: str | PathLike[str] | None = None,
    every: float = 60.0,
    progress: Report | Iterable[Report] | None = None,
) -> Masks:
    """Learns a mask for each task: which units of `model` that task needs.

    loader: yields (inputs, labels), labels (batch,) being the model's own output indices, as in any training loop; or
        (batch, outputs) of 0 and 1 where a sample has several. Inputs are a tensor, a list with an entry for each
        sample, or a tuple or dict of such, as for the model. A third part is handed to the objective as targets.
    sites, axis, example: as for `attach`; the example is a sample of the loader by default.
    tasks: as for `attach`; None means every label that the loader shows. Samples of other labels serve as contrast.
    method: "contrastive" (default), "class-only", "nad" (the paper's), a baseline ("random", "activation", "taylor",
        "routing"), one of `nadhooks.methods` with options, or an objective
        `(student, teacher, samples, gates) -> (tasks,) losses` in place of contrastive's own, for any kind of output.
    keep: how much to keep: a share of the units (a float), a number of units (an int), or a `Budget`: in each site, or
        by parameters or FLOPs. 0.55 by default. With "nad" it follows from the method's beta.
    fidelity: instead of `keep`, the largest held-out divergence from the full network that a task may have; as little
        is kept as that allows. The whole curve is in `masks.provenance["curve"]`.
    closed: what a closed unit puts out, "zero" or "mean"; by default "zero" for "nad" and "mean" for the others.
    start: a method, or masks, that the first scores are taken from.
    outputs: {label: indices of the model's outputs} that say yes to a task, where labels are not outputs themselves.
    held_out: another loader, of samples that nothing is learnt from. Its figures go into `masks.quality`, and into the
        reports ten times in a run; fidelity is measured on it (otherwise on every fifth sample of the loader).
    seed: decides initial scores and draws, for each task alone: the order of tasks changes nothing.
    autocast: a dtype to compute in, torch.bfloat16 where the hardware is fast in it. Scores stay as they are.
    cache: bytes for the open network's answers, which are the same whenever an image comes again.
    checkpoint: a file that says every `every` seconds how far the run is. The same call goes on where it stopped, with
        the same masks in the end (on the CPU, to the last bit); the file goes when the run is over.
    progress: called after each step with a `Progress`; several may be given. See `nadhooks.progress` for logs.

    The model's weights, gradients, training flags and hooks and the random state are left as found. Raises
    LearningError for an empty loader, a task without samples and a loss that is not finite, TaskError for labels that
    do not fit the model.
    """
    if not isinstance(model, nn.Module):
        raise ModelError(f"expected a torch.nn.Module, got {type(model).__name__}")
    method = _method(method)
    budget = _budget(keep, fidelity, method)
    if fidelity is not None and method.ranks and method.output == "any":
        method = replace(method, output="softmax")  # its objective measures no distance from the full network
    closed = method.closed if closed is None else closed
    check_closed(closed)
    given = Tasks.of(tasks) if tasks is not None else Tasks.of(list(outputs)) if outputs is not None else None
    with frozen(model), torch.inference_mode(False), torch.enable_grad():
        torch.manual_seed(seed)  # for a loader that shuffles; `frozen` puts the user's random state back
        sample, loader = peek(loader)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        sample = moved(sample, device)
        with attach(model, sites, example=sample if example is None else example, axis=axis) as gates:
            number = None if method.output == "any" else _classes(model, sample)
            _check_meaning(outputs, number)
            forward = Forward(gates, device, (lambda x: x) if method.output == "any" else logits_of, autocast)
            forward.settle(sample)
            selection = None if budget is None else Selection(budget, gates.sites, _costs(budget, forward, sample))
            if selection is not None and fidelity is None:
                method = method.paced(float(selection.targets.min()))
            learner = _Learner(
                gates,
                Data(loader, number, device, outputs),
                method,
                selection,
                closed,
                seed,
                Teacher(forward, cache, method.compares),
                every_report(progress),
                None if held_out is None else _kept(Data(held_out, number, device, outputs)),
            )
            run = {
                "method": method.name,
                "options": method.described(),
                **({} if outputs is None else {"outputs": {str(label): [*which] for label, which in outputs.items()}}),
                **({"fidelity": fidelity} if fidelity is not None else {"keep": budget and budget.described()}),
                **({} if start is None else {"start": _origin(start)}),
                **({} if autocast is None else {"autocast": str(autocast).removeprefix("torch.")}),
                "seed": seed,
                "sites": gates.chosen_by,
                **({"weights": weights} if (weights := weights_of(model)) else {}),
            }
            known = {
                **run,
                "closed": closed,
                "labels": given and list(given.labels),
                "units": [*map(str, gates.sites)],
                **{f"method's {name}": value for name, value in _described(method).items()},
                "first masks": digest(dict(start.values)).hex() if isinstance(start, Masks) else None,
                "cache": cache,
                "held-out data": held_out is not None,
            }
            learner.checkpoint = Checkpoint(checkpoint, every, known)
            learner.read(given, fidelity)
            learner.warm(start)
            values = learner.gates_of(fidelity)
            provenance = run | ({"curve": learner.curve} if learner.curve else {})
            masks = gates.masks_of(learner.tasks, values, provenance)
            masks = masks.replaced(quality=learner.measured(masks))
            learner.checkpoint.remove()
            return masks


@dataclass
class _Learner:
    gates: Gates
    data: Data
    asked: Method
    selection: Selection | None
    closed: Closed
    seed: int
    teacher: Teacher
    reports: Sequence[Report]
    held_out: Data | None
    method: Method = field(init=False)  # with as many steps as it takes now
    tasks: Tasks = field(init=False)
    checkpoint: Checkpoint = field(init=False)
    pool: Pool | None = None  # samples in memory, for balanced draws
    held: Pool | None = None  # others, that fidelity is measured on
    first: Table | None = None  # scores of a warm start
    curve: dict[str, Any] | None = None
    told_at: int = 0  # how many tenths of the run were over when held-out samples were last measured

    def __post_init__(self) -> None:
        self.method = self.asked

    # --- data ---

    def read(self, given: Tasks | None, fidelity: float | None) -> None:
        """The tasks, and what has to be known of the data before the first step."""
        means = UnitMeans(self.gates.sites) if self.closed == "mean" else None
        if self.method.sampling == "own":
            if isinstance(self.data.loader, Iterator):
                raise LearningError(
                    f"{self.method.name} reads the data again and again ({self.method.epochs} epochs), got an iterator "
                    "that ends after once; pass a DataLoader or a list of batches"
                )
            self.tasks = self.data.tasks(given)
            self.check_held_out()
            if means:
                self.gates.calibrate(inputs for inputs, _, _ in self.data.batches())
            return
        method, parted = self.method, fidelity is not None and self.held_out is None
        if parted:  # enough of each label for both parts, also where a method itself wants few
            drawn = method.images or method.steps * method.positives
            method = replace(method, images=max(drawn, HELD_OUT * HELD_OUT_DRAWS["positives"]))
        self.pool = Pool.of(self.data, given and self.data.tasks(given), method)
        if parted:
            self.pool, self.held = self.pool.parted(HELD_OUT)
        elif fidelity is not None and self.held_out is not None:
            self.held = Pool.of(self.held_out, None, replace(self.method, **HELD_OUT_DRAWS))
        self.tasks = self.pool.tasks(given, self.method)
        self.check_held_out()
        for places in torch.arange(len(self.pool)).split(SAMPLES_PER_PASS):
            batch = self.pool.part(places)
            self.teacher.ask(batch.inputs, places.tolist(), means.add if means else None)
        if means:
            self.gates.close_to_means(means)

    def check_held_out(self) -> None:
        """Whether there is what will be measured; later would be too late."""
        if self.held is not None:
            try:
                self.held.tasks(self.tasks, replace(self.method, **HELD_OUT_DRAWS))
            except LearningError as error:
                raise LearningError(f"held-out samples: {error}") from error
        if self.held_out is None or self.method.output == "any":
            return
        own, samples = Counter[Label](), 0
        for _, labels, _ in self.held_out.batches():
            samples += len(labels)
            own.update({label: int(has(labels, label).sum()) for label in self.tasks.labels})
        for label, name in zip(self.tasks.labels, self.tasks.names, strict=True):
            if not 0 < own[label] < samples:
                raise LearningError(
                    f"held_out: expected samples of task {name} and of others, got {own[label]} of it among {samples}"
                )

    def warm(self, start: str | Method | Masks | None) -> None:
        """First scores from a method's or masks' own order of the units."""
        if start is None:
            return
        if self.method.sampling == "each":
            raise LearningError(f"start: the gates of {self.method.name!r} start open, for each sample anew")
        if isinstance(start, Masks):
            start = without_wrappers(start, self.gates.sites)
            check_same_sites(start.sites, self.gates.sites, "start from masks of this model and choice of sites")
            chosen = start.select(self.tasks.labels)
            scores = {name: 2 * WARM * value - WARM for name, value in chosen.values.items()}
        else:
            method = _method(start)
            if method.sampling == "own" or self.pool is None:
                raise LearningError(
                    f"start: {method.name!r} and {self.method.name!r} see data in different ways; "
                    "start from masks that one of them learnt, or from a baseline"
                )
            if method.output not in ("any", self.method.output):
                raise LearningError(
                    f"start: {method.name!r} takes outputs for {method.output!r} and {self.method.name!r} for "
                    f"{self.method.output!r}; pass one that has the same output="
                )
            found = replace(self, asked=method, reports=[], first=None)
            found.tasks, found.checkpoint = self.tasks, self.checkpoint
            scores = _ranks(found.scores(self.selection))
        self.first = {name: value.to(self.gates.logits[name]) for name, value in scores.items()}

    # --- from scores to gates ---

    def gates_of(self, fidelity: float | None) -> Table:
        """{site: (tasks, units)} the gates learnt, on the CPU."""
        if fidelity is not None:
            return self.faithful(fidelity)
        return self.final(self.scores(self.selection), self.selection)

    def final(self, scores: Table, selection: Selection | None) -> Table:
        step = self.step(self.method.steps, selection, self.tasks.labels)
        return {site: gate.detach().cpu() for site, gate in self.method.estimator(scores, step).items()}

    def scores(self, selection: Selection | None) -> Table:
        """What the method learns for all tasks, with so much to keep."""
        if selection is not None:
            self.method = self.asked.paced(float(selection.targets.min()))
        method, data, labels = self.method, self.data, self.tasks.labels
        self.told_at = 0
        if method.sampling == "own":
            torch.manual_seed(self.seed)  # for a loader that shuffles: in one order, whatever was read before
            return self.run(own_batches(data, self.tasks, method), labels, selection, self.first)
        assert self.pool is not None  # `read` made it
        if method.sampling == "each":
            return self.averaged(selection)
        size = max(1, SAMPLES_PER_PASS // (method.positives + method.negatives))
        chunks = torch.arange(len(self.tasks)).split(size)
        learnt = []
        for number, rows in enumerate(chunks):
            tasks = self.tasks.select(rows.tolist())
            batches = balanced_batches(self.pool, data, tasks, method, self.seed, number, len(chunks))
            first = self.first and {site: score[rows.to(score.device)] for site, score in self.first.items()}
            learnt.append(self.run(batches, tasks.labels, selection and selection.rows(rows), first))
        return {site: torch.cat([scores[site] for scores in learnt]) for site in learnt[0]}

    def averaged(self, selection: Selection | None) -> Table:
        """Scores of single samples, averaged over each task's."""
        assert self.pool is not None
        every, learnt = [], []
        for rows, batches in each_batches(self.pool, self.data, self.tasks, self.method, self.seed):
            learnt.append(self.run(batches, list(range(len(rows))), selection, None))
            every.append(rows)
        rows = torch.cat(every)
        return {
            site: objectives.per_task(
                torch.cat([scores[site] for scores in learnt]), rows.to(x.device), len(self.tasks)
            )
            for site, x in learnt[0].items()
        }

    def step(self, index: int, selection: Selection | None, labels: Sequence[object]) -> Step:
        left = self.method.schedule(index, self.method.steps) if index < self.method.steps else 0.0

        def best(scores: Table) -> Table:
            if selection is None:
                raise LearningError(f"{self.method.name} has no budget (its keep is None), so there are no best units")
            return selection.best(scores, left)

        def noise() -> Table:
            random = [generator(self.seed, label, "noise", index) for label in labels]
            return {
                site.name: torch.stack([torch.rand(site.units, generator=task) for task in random]).to(logits)
                for site, logits in zip(self.gates.sites, self.gates.parameters(), strict=True)
            }

        return Step(index, self.method.steps, left, best, noise)

    def initial(self, labels: Sequence[object]) -> Table:
        random = [generator(self.seed, label) for label in labels]
        return {
            site.name: torch.stack([self.method.initial(site.units, task) for task in random]).to(logits)
            for site, logits in zip(self.gates.sites, self.gates.parameters(), strict=True)
        }

    def run(
        self, batches: Iterable[Batch], labels: Sequence[object], selection: Selection | None, first: Table | None
    ) -> Table:
        """The loop: the open network, the gated one, each task's loss, its gradient, the update of the scores."""
        method, clock = self.method, Clock()
        initial = self.initial(labels)
        if first is not None:  # the small differences between first scores break ties
            initial = {site: score + first[site] for site, score in initial.items()}
        begun, scores, state = self.checkpoint.begin(initial)
        if begun < 0:
            return scores
        samples = 0
        for index, batch in enumerate(batches):
            answers = self.teacher.of(batch.inputs, batch.keys)
            samples += len(batch.keys)
            if index < begun:  # done before the run was stopped; what the open network remembered belongs to it
                self.teacher.remember(batch.inputs, batch.keys)
                continue
            step = self.step(index, selection, labels)
            leaves = {site: score.detach().requires_grad_() for site, score in scores.items()}
            table = method.estimator(leaves, step)  # {site: (tasks, units)}
            moving = _on(batch.samples, self.teacher.forward.device)
            with self.gates.apply({site: gate[moving.rows] for site, gate in table.items()}):
                student = self.teacher.forward(batch.inputs, len(batch.keys))
                terms = _terms(method.objective(student, answers, moving, table), len(labels))
                shown = moving.rows.unique()  # a penalty must not move tasks that the batch does not show
                losses = torch.stack([term[shown] for term in terms.values()]).sum(0)
                # inside `apply`: activation checkpointing runs the forward pass again in here
                gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), materialize_grads=True)
            self.check(losses, gradients, index)
            with torch.no_grad():
                method.update(scores, dict(zip(scores, gradients, strict=True)), step, state)
            self.checkpoint.note(index + 1, scores, state)
            if self.reports:
                parts = {name: term[shown] for name, term in terms.items()}
                with torch.random.fork_rng([]):  # reports must not change what a shuffling loader yields next
                    held_out = self.told(batch, labels, scores, selection)
                    self.report(batch, losses, parts, table, samples, clock, held_out)
        self.checkpoint.note(-1, scores, {})
        return scores

    def check(self, losses: Tensor, gradients: Sequence[Tensor], index: int) -> None:
        finite = torch.stack([losses.isfinite().all(), *(gradient.isfinite().all() for gradient in gradients)])
        if bool(finite.all()):
            return
        what = "gradient" if bool(finite[0]) else "loss"
        value = float(losses.detach().sum()) if what == "loss" else float("nan")
        kept = f"; {self.checkpoint.described()}" if self.checkpoint.described() else ""
        raise LearningError(
            f"the {what} is {value} at step {index + 1}; look for NaN in the inputs and the weights{kept}"
        )

    # --- telling ---

    def report(
        self,
        batch: Batch,
        losses: Tensor,
        terms: Mapping[str, Tensor],
        table: Table,
        samples: int,
        clock: Clock,
        held_out: Mapping[str, float],
    ) -> None:
        kept = torch.cat([gate.detach() > 0.5 for gate in table.values()], 1).double().mean()
        report = Progress(
            batch.done,
            batch.total,
            float(losses.detach().mean()),
            samples,
            clock.left(batch.done, batch.total),
            {name: float(term.detach().mean()) for name, term in terms.items()},
            float(kept),
            held_out,
        )
        for each in self.reports:
            each(report)

    def told(
        self, batch: Batch, labels: Sequence[object], scores: Table, selection: Selection | None
    ) -> dict[str, float]:
        """Means of the held-out figures, ten times in a run."""
        tenths = batch.done * TIMES // batch.total if batch.total else 0
        due, self.told_at = tenths > self.told_at, max(tenths, self.told_at)
        if self.held_out is None or not due or self.method.sampling == "each":
            return {}
        tasks = self.tasks.select([self.tasks.row(label) for label in labels])
        with torch.no_grad():
            table = self.method.estimator(scores, self.step(self.method.steps, selection, labels))
        values = {site: gate.detach().cpu() for site, gate in table.items()}
        quality = self.measured(self.gates.masks_of(tasks, values, {}))
        return {measure: float(figures.mean()) for measure, figures in quality.items()}

    def measured(self, masks: Masks) -> dict[str, Tensor]:
        """{measure: (tasks,)} on held-out samples, for outputs that are classes."""
        if self.held_out is None or self.method.output == "any":
            return {}
        found = recognition(
            self.gates, self.held_out.loader, masks, outputs=self.held_out.meaning, output=self.method.output
        )
        return {measure: torch.tensor([getattr(row, measure) for row in found]) for measure in MEASURES}

    # --- as little as fidelity allows ---

    def faithful(self, bound: float) -> Table:
        """For each task the fewest units with which its held-out divergence is at most `bound`."""
        assert self.selection is not None
        tasks = len(self.tasks)
        best = {name: torch.ones(tasks, x.shape[1]) for name, x in self.gates.logits.items()}
        good, bad = torch.ones(tasks), torch.zeros(tasks)  # the smallest share that does, the next one that does not
        failed = torch.zeros(tasks)  # shares in a row
        shares: list[Tensor] = []
        divergences: list[Tensor] = []

        def attempt(share: Tensor) -> None:
            selection = cast(Selection, self.selection).at(share)
            values = self.final(self.scores(selection), selection)
            divergence = self.divergence(values)
            does = divergence <= bound
            failed.copy_(torch.where(does, 0, failed + 1))
            better = does & (share < good)
            for name, value in values.items():
                best[name] = torch.where(better[:, None], value.to(best[name]), best[name])
            good.copy_(torch.where(better, share, good))
            bad.copy_(torch.where(~does & (share < good), torch.maximum(bad, share), bad * (bad < good)))
            shares.append(share)
            divergences.append(divergence)

        for share in SHARES:
            attempt(torch.full((tasks,), share))
            if bool((failed >= 2).all()):
                break
        for _ in range(REFINED):
            attempt((good + bad) / 2)
        self.curve = {
            "keep": [[round(float(x), 4) for x in row] for row in shares],
            "divergence": [[round(float(x), 6) for x in row] for row in divergences],
        }
        return best

    def divergence(self, values: Table) -> Tensor:
        """(tasks,) how far these gates are from the full network on held-out samples."""
        assert self.held is not None  # `read` made it
        method = replace(self.method, **HELD_OUT_DRAWS)
        self.held.tasks(self.tasks, method)
        teacher = Teacher(self.teacher.forward, 0, method.compares)
        size = max(1, SAMPLES_PER_PASS // 16)
        parts = []
        for rows in torch.arange(len(self.tasks)).split(size):
            tasks = self.tasks.select(rows.tolist())
            table = {name: value[rows].to(self.gates.logits[name]) for name, value in values.items()}
            found = []
            for batch in balanced_batches(self.held, self.data, tasks, method, self.seed):
                moving = _on(batch.samples, teacher.forward.device)
                answers = teacher.of(batch.inputs, batch.keys)
                with torch.no_grad(), self.gates.apply({name: gate[moving.rows] for name, gate in table.items()}):
                    student = teacher.forward(batch.inputs, len(batch.keys))
                    if method.output == "any":
                        terms = _terms(method.objective(student, answers, moving, table), len(tasks), learns=False)
                    else:
                        far = objectives.binary_kl(student.outputs, answers.outputs, moving.classes, method.output)
                        terms = {
                            str(part): objectives.per_task(far[part], moving.rows[part], len(tasks))
                            for part in (moving.positive, ~moving.positive)
                        }
                found.append(torch.stack(list(terms.values())).sum(0))
            parts.append(torch.stack(found).mean(0).cpu())
        return torch.cat(parts)


def _classes(model: nn.Module, sample: Any) -> int:
    """How many outputs a classifier has."""
    with torch.no_grad():
        number = logits_of(call_model(model, sample)).shape[1]
    if number < 2:
        raise ModelError("expected a classifier of two or more classes, got one output")
    return number


def _kept(data: Data) -> Data:
    """Data in memory, read once: random changes to images are the same whenever they are measured."""
    with torch.random.fork_rng([]):
        return replace(data, loader=list(read(data.loader)))


def _described(method: Method) -> dict[str, str]:
    """What decides how a method learns, its callables by their names."""
    parts = {each.name: getattr(method, each.name) for each in fields(method)}
    return {
        name: getattr(value, "__qualname__", type(value).__qualname__) if callable(value) else repr(value)
        for name, value in parts.items()
    }


def _on(samples: Samples, device: torch.device) -> Samples:
    parts = (samples.rows, samples.classes, samples.positive)
    rows, classes, positive = (part.to(device) for part in parts)
    return Samples(rows, classes, positive, samples.targets)


def _terms(losses: object, tasks: int, learns: bool = True) -> Mapping[str, Tensor]:
    """What an objective gave, checked, as terms."""
    terms: Mapping[str, Any] = losses if isinstance(losses, Mapping) else {"objective": losses}
    for term in terms.values():
        if not isinstance(term, Tensor) or term.shape != (tasks,):
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise LearningError(f"the objective must give one loss per task, shape ({tasks},), got {got}")
    if not terms or (learns and not any(term.requires_grad for term in terms.values())):
        raise LearningError("the objective does not depend on any gate, so nothing can be learnt from it")
    return terms


def _ranks(scores: Table) -> Table:
    """Scores -> their ranks over all units, from -WARM to WARM."""
    everything = torch.cat(list(scores.values()), 1)
    ranks = everything.argsort(dim=1, stable=True).argsort(dim=1).to(everything.dtype)
    spread = 2 * WARM * ranks / max(1, everything.shape[1] - 1) - WARM
    return dict(zip(scores, spread.split([score.shape[1] for score in scores.values()], 1), strict=True))


def _costs(budget: Budget, forward: Forward, sample: Any) -> dict[str, float]:
    """{site: of one unit} the parameters or FLOPs between the site and those that fire before it."""
    gates = forward.gates
    if budget.by == "units":
        return {}
    costs = dict.fromkeys((site.name for site in gates.sites), 0.0)
    if budget.by == "parameters":
        costs |= gates.parameters_behind
    else:
        counted = [0]
        with torch.no_grad(), gates.everything_open(), FlopCounterMode(display=False) as counter:

            def see(site: Site, x: Tensor) -> None:
                costs[site.name] += counter.get_total_flops() - counted[0]
                counted[0] = counter.get_total_flops()

            forward(sample, 1, see)
    return {site.name: costs[site.name] / site.units for site in gates.sites}


def _check_meaning(outputs: Mapping[Label, Sequence[int]] | None, number: int | None) -> None:
    if outputs is None:
        return
    if number is None:
        raise NadhooksError("outputs: an objective of one's own decides itself what outputs mean")
    for label, indices in outputs.items():
        wrong = [x for x in indices if isinstance(x, bool) or not isinstance(x, int) or not 0 <= x < number]
        if wrong or not 0 < len(set(indices)) < number:
            raise TaskError(
                f"outputs: expected for task {label!r} some but not all of the model's outputs 0 to {number - 1}, "
                f"got {list(indices)!r}"
            )


def _method(method: str | Method | Objective) -> Method:
    if isinstance(method, Method):
        return method
    if isinstance(method, str) and method in METHODS:
        return METHODS[method]()
    if callable(method) and method not in METHODS.values():
        return from_objective(method)
    raise NadhooksError(f"method: expected {', '.join(map(repr, METHODS))}, a Method or an objective, got {method!r}")


def _origin(start: str | Method | Masks) -> dict[str, Any]:
    """What first scores were taken from, for a file."""
    if isinstance(start, Masks):
        told = ("method", "options", "keep", "fidelity", "seed")
        return {name: start.provenance[name] for name in told if name in start.provenance}
    method = _method(start)
    return {"method": method.name, "options": method.described()}


def _budget(keep: float | int | Budget | None, fidelity: float | None, method: Method) -> Budget | None:
    asked = {name: value for name, value in (("keep", keep), ("fidelity", fidelity)) if value is not None}
    if len(asked) == 2:
        raise NadhooksError("expected keep= or fidelity=, got both: fidelity decides how much is kept")
    if asked and method.keep is None:
        name, value = asked.popitem()
        value = value.keep if isinstance(value, Budget) else value
        raise NadhooksError(
            f"{name}: with {method.name!r} the share that is kept follows from its options, got {name}={value}"
        )
    if fidelity is not None and not (isinstance(fidelity, (int, float)) and 0 < fidelity < math.inf):
        raise NadhooksError(f"fidelity: expected a divergence above 0 (in nats), got {fidelity!r}")
    return None if method.keep is None else Budget.of(method.keep if keep is None else keep)
