"""The loop of learning: from data and a method to each task's gates."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from . import objectives
from .batching import finite
from .budgets import Selection
from .checkpoints import Checkpoint
from .errors import LearningError
from .evaluation.recognition import quality, recognition
from .gates import Gates
from .gating import Closed, UnitMeans
from .identity import without_wrappers
from .masks import Masks, check_same_sites
from .methods import Method, Samples, Step, Table
from .methods.parts import Parted, whole
from .progress import Clock, Progress, Report
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
    seed_loaders,
    shown_in,
)
from .starting import SAMPLES, beside_means
from .tasks import Label, Tasks
from .teaching import Teacher

TIMES = 10  # in a run that held-out samples are measured
HELD_OUT = 5  # of each so many samples one is held out where fidelity is asked for and nothing else is given
DRAWS: dict[str, Any] = {"steps": 4, "positives": 8, "negatives": 8, "images": None}  # of held-out samples
SEVERAL = 0.3  # where each task keeps a share of its own, all take the steps of this one, whatever the others keep
TINY = 1e-12  # a deviation of rounding errors
WARM = 3.0  # scores of a warm start run from minus this to this; a step of ours moves them by about 1


class Learnt(NamedTuple):
    """What a run learns, {site: (tasks, units)} each.

    offsets: how far what closed units put out is from their means, in their standard deviations; empty where that is
    not learnt.
    """

    scores: Table
    offsets: Table


class Found(NamedTuple):
    """What that comes to, on the CPU, {site: (tasks, units)} each: gates, and what closed units put out.

    constants: empty where they are not learnt.
    """

    gates: Table
    constants: Table


@dataclass
class Learner:
    """One call of `learn`: what it was given, and what it finds out on the way."""

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
    deviations: Table = field(default_factory=dict)  # {site: (units,)} of what leaves the open network's sites
    starts: Table = field(default_factory=dict)  # {site: (units,)} of what closed units put out, in these, from means
    clock: Clock = field(default_factory=Clock)
    samples: int = 0  # that went through gates
    told_at: int = 0  # how many tenths of the run were over when held-out samples were last measured

    def __post_init__(self) -> None:
        self.method = self.asked

    # --- data ---

    @cached_property
    def scale(self) -> float:
        """What losses are larger by on the way back through float16, where gradients of large sites would be 0."""
        forward = self.teacher.forward
        dtypes = {forward.autocast, *(p.dtype for p in forward.gates.attached().parameters())}
        return 2.0**16 if torch.float16 in dtypes else 1.0

    def read(self, given: Tasks | None, fidelity: float | None) -> None:
        """The tasks, and what has to be known of the data before the first step."""
        self.seed_loaders()
        means = None if self.closed == "zero" else UnitMeans(self.gates.sites, self.closed == "optimal")
        if self.method.sampling == "own":
            if isinstance(self.data.loader, Iterator):
                raise LearningError(
                    f"{self.method.name} reads the data again and again ({self.method.epochs} epochs), got an iterator "
                    "that ends after once; pass a DataLoader or a list of batches"
                )
            self.tasks = self.data.tasks(given)
            self.check_held_out()
            if means:
                self.gates.calibrate((inputs, labels) for inputs, labels, _ in self.data.batches())
            return
        method, parted = self.method, fidelity is not None and self.held_out is None
        if parted:  # enough of each label for both parts, also where a method itself wants few
            drawn = method.images or method.steps * method.positives
            method = replace(method, images=max(drawn, HELD_OUT * DRAWS["positives"]))
        self.pool = Pool.of(self.data, given and self.data.tasks(given), method)
        if parted:
            self.pool, self.held = self.pool.parted(HELD_OUT)
        elif fidelity is not None and self.held_out is not None:
            self.held = Pool.of(self.held_out, None, self.measuring())
        self.asked = self.method = self.as_shown(self.method)
        self.tasks = self.pool.tasks(given, self.method)
        self.check_held_out()
        self.checkpoint.learns_from([vars(self.pool), self.held and vars(self.held)])
        for places in torch.arange(len(self.pool)).split(SAMPLES_PER_PASS):
            batch = self.pool.part(places)
            self.teacher.ask(batch.inputs, places.tolist(), means.add if means else None)
        if means:
            self.gates.close_to_means(means)
            self.deviations = {name: x.to(self.gates.logits[name]) for name, x in means.deviations().items()}
        if self.closed == "optimal":
            some = torch.linspace(0, len(self.pool) - 1, min(SAMPLES, len(self.pool))).long()
            for name, x in beside_means(self.teacher.forward, self.pool.part(some).inputs, len(some)).items():
                self.starts[name] = x.to(self.deviations[name]) / self.deviations[name].clamp(min=TINY)

    def as_shown(self, method: Method) -> Method:
        """The method; an objective of one's own goes without others where all samples have one label."""
        alone = self.pool is not None and len(shown_in(self.pool.labels)) == 1
        return replace(method, negatives=0) if method.output == "any" and alone else method

    def measuring(self) -> Method:
        """The method, as held-out samples are drawn for it."""
        alone = self.method.output == "any" and not self.method.negatives
        return replace(self.method, **DRAWS | ({"negatives": 0} if alone else {}))

    def seed_loaders(self) -> None:
        """For samples in one order, whatever was read before: persistent workers draw a number less the second time."""
        seed_loaders(self.seed, self.teacher.forward.device)

    def check_held_out(self) -> None:
        """Whether there is what will be measured; later would be too late."""
        if self.held is not None:
            try:
                self.held.tasks(self.tasks, self.measuring())
            except LearningError as error:
                which = "" if self.held_out is not None else f" (of the loader's, every {HELD_OUT}th is held out)"
                raise LearningError(f"held-out samples: {error}{which}") from error
        if self.held_out is None or self.method.output == "any":
            return
        own, samples = Counter[Label](), 0
        for inputs, labels, _ in self.held_out.batches():
            if not finite(inputs):
                raise LearningError("held_out: expected images that are finite numbers, got NaN or infinity in them")
            samples += len(labels)
            own.update({label: int(has(labels, label).sum()) for label in self.tasks.labels})
        for label, name in zip(self.tasks.labels, self.tasks.names, strict=True):
            if not 0 < own[label] < samples:
                raise LearningError(
                    f"held_out: expected samples of task {name} and of others, got {own[label]} of it among {samples}"
                )

    def warm(self, start: Method | Masks | None) -> None:
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
            method = self.as_shown(start)
            if method.sampling == "own" or self.pool is None:
                reads = method.name if method.sampling == "own" else self.method.name
                raise LearningError(
                    f"start: {self.method.name!r} cannot begin with {method.name!r}, for {reads!r} reads the loader "
                    "itself; learn those masks first, and pass them as start="
                )
            if method.output not in ("any", self.method.output):
                raise LearningError(
                    f"start: {method.name!r} takes outputs for {method.output!r} and {self.method.name!r} for "
                    f"{self.method.output!r}; pass one that has the same output="
                )
            try:
                self.pool.tasks(self.tasks, method)
            except LearningError as error:
                raise LearningError(f"start: {error}") from error
            found = replace(self, asked=method, reports=[], first=None, closed=self.gates.closed)
            found.tasks, found.checkpoint = self.tasks, self.checkpoint
            scores = ranks(found.learn(self.selection).scores)
        self.first = {name: value.to(self.gates.logits[name]) for name, value in scores.items()}

    # --- from scores to gates ---

    def learnt(self, selection: Selection | None, several: bool = False) -> Found:
        """All tasks' gates, with so much to keep; `several`: of each task something else."""
        return self.final(self.learn(selection, several), selection, self.tasks.labels)

    def final(self, learnt: Learnt, selection: Selection | None, labels: Sequence[object]) -> Found:
        """What there would be if learning ended with this.

        Units that stay open need no start from which to learn: were they closed, the mean is what they stand for.
        """
        with torch.no_grad():
            gates = self.method.estimator(learnt.scores, self.step(self.method.steps, selection, labels))
            offsets = {site: x - self.starts.get(site, 0) * (gates[site] == 1) for site, x in learnt.offsets.items()}
            found = gates, self.constants(offsets)
        return Found(*({site: x.detach().cpu() for site, x in table.items()} for table in found))

    def everything(self) -> Found:
        """All tasks with every gate open."""
        gates = {name: torch.ones(len(self.tasks), x.shape[1], dtype=x.dtype) for name, x in self.gates.logits.items()}
        means = self.gates.constants if self.closed == "optimal" else {}
        return Found(gates, {name: mean.cpu().repeat(len(self.tasks), 1) for name, mean in means.items()})

    def constants(self, offsets: Table) -> Table:
        """What closed units put out."""
        if not offsets:
            return {}
        mean, deviation = (torch.cat([x[site] for site in offsets]) for x in (self.gates.constants, self.deviations))
        offset = whole(offsets)
        return Parted(torch.addcmul(mean.to(offset), deviation.to(offset), offset), offsets)

    def learn(self, selection: Selection | None, several: bool = False) -> Learnt:
        """What the method learns for all tasks, with so much to keep."""
        if selection is not None:
            self.method = self.asked.paced(SEVERAL if several else float(selection.shares()[0]), self.closed)
        method, data, labels = self.method, self.data, self.tasks.labels
        self.told_at, self.clock = 0, Clock()
        if method.sampling == "own":
            self.seed_loaders()
            return self.run(own_batches(data, self.tasks, method), labels, selection, self.first)
        assert self.pool is not None  # `read` made it
        if method.sampling == "each":
            return Learnt(self.averaged(selection), {})
        size = max(1, SAMPLES_PER_PASS // (method.positives + method.negatives))
        chunks = torch.arange(len(self.tasks)).split(size)
        learnt = []
        for number, rows in enumerate(chunks):
            tasks = self.tasks.select(rows.tolist())
            batches = balanced_batches(self.pool, data, tasks, method, self.seed, number, len(chunks))
            first = self.first and {site: score[rows.to(score.device)] for site, score in self.first.items()}
            learnt.append(self.run(batches, tasks.labels, selection and selection.rows(rows), first))
        parts = [
            {site: torch.cat([each[site] for each in part]) for site in part[0]} for part in zip(*learnt, strict=True)
        ]
        return Learnt(*parts)

    def averaged(self, selection: Selection | None) -> Table:
        """Scores of single samples, averaged over each task's."""
        assert self.pool is not None
        every, learnt, shown = [], [], Counter[int]()
        for rows, batches in each_batches(self.pool, self.data, self.tasks, self.method, self.seed):
            names = []  # of samples, whatever other tasks there are
            for row in rows.tolist():
                shown[row] += 1
                names.append(f"{self.tasks.labels[row]}/{shown[row]}")
            learnt.append(self.run(batches, names, selection and selection.rows(rows), None).scores)
            every.append(rows)
        rows = torch.cat(every)
        return {
            site: objectives.per_task(
                torch.cat([scores[site] for scores in learnt]), rows.to(x.device), len(self.tasks)
            )
            for site, x in learnt[0].items()
        }

    def step(self, index: int, selection: Selection | None, labels: Sequence[object]) -> Step:
        left = float(self.method.schedule(index, self.method.steps)) if index < self.method.steps else 0.0
        if not 0 <= left <= 1:
            raise LearningError(f"{self.method.name}: expected a schedule that gives parts from 0 to 1, got {left}")

        def best(scores: Table) -> Table:
            if selection is None:
                raise LearningError(f"{self.method.name} has no budget (its keep is None), so there are no best units")
            return selection.best(scores, left)

        def noise() -> Table:
            random = [generator(self.seed, label, "noise", index) for label in labels]
            units = [site.units for site in self.gates.sites]
            drawn = [torch.rand(sum(units), generator=task, dtype=torch.float32) for task in random]
            parts = torch.stack(drawn).split(units, 1)
            return {name: part.to(x) for (name, x), part in zip(self.gates.logits.items(), parts, strict=True)}

        return Step(index, self.method.steps, left, best, noise, closed=self.closed)

    def initial(self, labels: Sequence[object]) -> Table:
        random = [generator(self.seed, label) for label in labels]
        table = {
            site.name: torch.stack([self.method.initial(site.units, task) for task in random])
            for site in self.gates.sites
        }
        shapes = {site.name: (len(labels), site.units) for site in self.gates.sites}
        return {site: x.to(self.gates.logits[site]) for site, x in shaped(table, shapes, "initial").items()}

    def run(
        self, batches: Iterable[Batch], labels: Sequence[object], selection: Selection | None, first: Table | None
    ) -> Learnt:
        """The loop: the open network, the gated one, each task's loss, its gradient, the update of what is learnt."""
        method = self.method
        initial = self.initial(labels)
        if first is not None:  # the small differences between first scores break ties
            initial = {site: score + first[site] for site, score in initial.items()}
        offsets = {}
        if self.closed == "optimal":
            offsets = {site: torch.zeros_like(score) + self.starts.get(site, 0) for site, score in initial.items()}
        begun, tables, samples, keys = self.checkpoint.begin({"scores": initial, "offsets": offsets})
        learnt = Learnt(*(tables.setdefault(part, {}) for part in Learnt._fields))
        states = [tables.setdefault(f"{part}, state", {}) for part in Learnt._fields]
        updates = method.update, method.closing
        if begun < 0:
            self.samples = samples
            return learnt
        scores = next(iter(initial.values()))
        keep = None if selection is None else selection.shares().expand(len(labels)).to(scores)
        shapes = {site: tuple(score.shape) for site, score in initial.items()}
        through, index = hashlib.blake2b(digest_size=16), -1
        for index, batch in enumerate(batches):
            self.samples += len(batch.keys)
            through.update(repr(batch.keys).encode())
            if method.sampling == "own" and batch.done * method.epochs > 2 * batch.total > 0:  # two epochs are over
                self.teacher.forget_unused()
            if index < begun:  # done before the run was stopped; what the open network remembered belongs to it
                if index + 1 == begun and through.hexdigest() != keys:
                    self.checkpoint.refuse(": its loader showed other samples")
                self.teacher.remember(batch.inputs, batch.keys)
                continue
            step = self.step(index, selection, labels)
            leaves = [Parted(whole(part).requires_grad_(), part) if part else part for part in learnt]
            table = shaped(method.estimator(leaves[0], step), shapes, "the estimator")  # {site: (tasks, units)}
            if leaves[1] and not any(gates.requires_grad for gates in table.values()):
                raise LearningError("the estimator's gates do not depend on any score, so nothing can be learnt")
            moving = on_device(batch.samples, self.teacher.forward.device)
            moving = replace(moving, step=index, keep=keep, closed=self.closed)
            rows, shallow = moving.rows, method.shallow_at(index)
            handed = [self.lead_back(by_sample(x, rows), shallow) for x in (table, self.constants(leaves[1]))]
            with self.gates.apply(*handed):
                terms = self.terms(batch, moving, table, handed[0], learns=not shallow)
                shown = rows.unique()  # a penalty must not move tasks that the batch does not show
                if len(shown) < len(labels):
                    terms = {name: term[shown] for name, term in terms.items()}
                losses = torch.stack(list(terms.values())).sum(0)
                with self.teacher.forward.way_back():
                    gradients = gradients_of(losses, [whole(part) for part in leaves if part], self.scale)
            self.check(losses, gradients, index)
            with torch.no_grad():
                for update, part, state, gradient in zip(updates, learnt, states, gradients, strict=False):
                    if update and (given := update(part, Parted(gradient, part), step, state)) is not None:
                        raise LearningError(
                            f"an update changes scores in place and gives None, got {type(given).__name__}; write into "
                            "the tensors, as in scores[site].sub_(gradients[site])"
                        )
            self.checkpoint.note(index + 1, tables, self.samples, through.hexdigest())
            if self.reports:
                with torch.random.fork_rng([]):  # reports must not change what a shuffling loader yields next
                    held_out = self.told(batch, labels, learnt, selection)
                    self.report(batch, losses, terms, table, held_out)
        if index + 1 < begun:
            self.checkpoint.refuse(": its loader showed more samples")
        if method.sampling != "own":  # whose data is known to be the same only when it has been read again
            self.checkpoint.note(-1, learnt._asdict(), self.samples)
        return learnt

    def lead_back(self, table: Table, shallow: bool) -> Table:
        """{site: (samples, units)}: the first quarter of the sites gets gradients in deep steps alone, larger ones."""
        if not self.method.shallow:
            return table
        deep = 1 / (1 - self.method.shallow)
        first = {site: table[site] for site in list(table)[: len(table) // 4]}
        return table | {site: x.detach() if shallow else x.detach().lerp(x, deep) for site, x in first.items()}

    def terms(self, batch: Batch, samples: Samples, table: Table, handed: Table, learns: bool) -> Mapping[str, Tensor]:
        """What the objective gives. Of what the sites put out, only that outlives this which the way back needs.

        handed: each sample's gates.
        """
        answers = self.teacher.of(batch.inputs, batch.keys)
        student = self.teacher.forward(
            batch.inputs, len(batch.keys), known=answers.sites if self.teacher.compares else None
        )
        for site, gates in handed.items():
            if gates.requires_grad and site in student.sites and not student.sites[site].requires_grad:
                raise LearningError(
                    f"site {site!r} runs without gradients, so that nothing can be learnt there; leave it out, or have "
                    "the model run it outside torch.no_grad() and checkpoint(..., use_reentrant=True)"
                )
        losses = self.method.objective(student, answers, samples, table)
        self.teacher.sites.forget_passing()
        return terms_of(losses, len(next(iter(table.values()))), learns)

    def check(self, losses: Tensor, gradients: Sequence[Tensor], index: int) -> None:
        if bool(losses.isfinite().all() & torch.cat(list(gradients), 1).isfinite().all()):
            return
        what = "gradient" if bool(losses.isfinite().all()) else "loss"
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
        held_out: Mapping[str, float],
    ) -> None:
        kept = (whole(table) > 0.5).double().mean()
        report = Progress(
            batch.done,
            batch.total,
            float(losses.detach().mean()),
            self.samples,
            self.clock.left(batch.done, batch.total),
            {name: float(term.detach().mean()) for name, term in terms.items()},
            float(kept),
            held_out,
            self.checkpoint.resumed,
        )
        for each in self.reports:
            each(report)

    def told(
        self, batch: Batch, labels: Sequence[object], learnt: Learnt, selection: Selection | None
    ) -> dict[str, float]:
        """Means of the held-out figures, ten times in a run."""
        tenths = batch.done * TIMES // batch.total if batch.total else 0
        due, self.told_at = tenths > self.told_at, max(tenths, self.told_at)
        if self.held_out is None or not due or self.method.sampling == "each":
            return {}
        tasks = self.tasks.select([self.tasks.row(label) for label in labels])
        now = self.final(learnt, selection, labels)
        found = self.measured(self.gates.masks_of(tasks, now.gates, {}, now.constants))
        return {measure: float(figures.mean()) for measure, figures in found.items()}

    def measured(self, masks: Masks) -> dict[str, Tensor]:
        """{measure: (tasks,)} on held-out samples, for outputs that are classes."""
        if self.held_out is None or self.method.output == "any":
            return {}
        found = recognition(
            self.gates, self.held_out.loader, masks, outputs=self.held_out.meaning, output=self.method.output
        )
        return quality(found)


def shaped(found: object, expected: Mapping[str, tuple[int, ...]], whose: str) -> Table:
    """What a part of the method gave, checked to be values for each task and unit."""
    got = {site: tuple(x.shape) for site, x in found.items()} if isinstance(found, Mapping) else type(found).__name__
    if got != expected:
        raise LearningError(f"{whose} must give {{site: (tasks, units)}} of shapes {expected}, got {got}")
    return cast(Table, found)


def by_sample(table: Table, rows: Tensor) -> Table:
    """(tasks, units) -> (samples, units)."""
    return Parted(whole(table).index_select(0, rows), table) if table else {}


def gradients_of(losses: Tensor, moved: Sequence[Tensor], scale: float = 1.0) -> Sequence[Tensor]:
    """Zero where nothing leads back, as in a shallow step of an objective that looks at the first sites alone.

    scale: what losses are multiplied by for the way back, a power of 2; less where that is too much.
    """
    if not losses.requires_grad:
        return [torch.zeros_like(x) for x in moved]
    while True:
        total = losses.sum() * scale
        found = torch.autograd.grad(total, moved, materialize_grads=True, retain_graph=scale > 1)
        if scale <= 1 or all(bool(x.isfinite().all()) for x in found):
            return [x / scale for x in found] if scale > 1 else found
        scale /= 16


def on_device(samples: Samples, device: torch.device) -> Samples:
    parts = (samples.rows, samples.classes, samples.positive)
    rows, classes, positive = (part.to(device) for part in parts)
    return Samples(rows, classes, positive, samples.targets)


def terms_of(losses: object, tasks: int, learns: bool = True) -> Mapping[str, Tensor]:
    """What an objective gave, checked, as terms."""
    terms: Mapping[str, Any] = losses if isinstance(losses, Mapping) else {"objective": losses}
    for term in terms.values():
        if not isinstance(term, Tensor) or term.shape != (tasks,):
            got = f"shape {tuple(term.shape)}" if isinstance(term, Tensor) else type(term).__name__
            raise LearningError(f"the objective must give one loss per task, shape ({tasks},), got {got}")
    if not terms or (learns and not any(term.requires_grad for term in terms.values())):
        raise LearningError("the objective does not depend on any gate, so nothing can be learnt from it")
    return terms


def ranks(scores: Table) -> Table:
    """Scores -> their ranks over all units, from -WARM to WARM."""
    everything = whole(scores)
    ranks = everything.argsort(dim=1, stable=True).argsort(dim=1).to(everything.dtype)
    return Parted(2 * WARM * ranks / max(1, everything.shape[1] - 1) - WARM, scores)
