"""How far a run is: what `learn` reports after each step, and where reports can go."""

from __future__ import annotations

import csv
import re
import time
from collections.abc import Callable, Iterable, Mapping
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

from .errors import LearningError


class Progress(NamedTuple):
    """One report. Means are over the tasks of the step.

    done: of `total`, steps or (for methods that follow the loader) batches read; total is 0 where the loader does not
        know its length, until it has been read once. With `fidelity=` each share that is tried is counted from its own
        beginning.
    loss: of which `terms` are the parts. samples: that went through gates so far, for all shares together.
    seconds_left: at the pace so far; None at the beginning and without a total. kept: share of units whose
        gate is above 0.5. held_out: {measure: mean} on held-out samples, ten times in a run, otherwise empty.
    resumed: whether the run goes on from a checkpoint; steps behind that are done, and reported, for a second time.
    """

    done: int
    total: int
    loss: float
    samples: int = 0
    seconds_left: float | None = None
    terms: Mapping[str, float] = {}
    kept: float = 1.0
    held_out: Mapping[str, float] = {}
    resumed: bool = False

    def numbers(self) -> dict[str, float]:
        """Everything under one name each, for logs."""
        held_out = {f"held-out {name}": value for name, value in self.held_out.items()}
        left = {} if self.seconds_left is None else {"seconds_left": self.seconds_left}
        counted: dict[str, float] = {"loss": self.loss, "samples": self.samples, "kept": self.kept, **left}
        terms = {f"term {name}" if name in counted else name: value for name, value in self.terms.items()}
        return {**counted, **terms, **held_out}


Report = Callable[[Progress], None]


class Clock:
    """Seconds left, at the pace since the first step."""

    def __init__(self) -> None:
        self.first: tuple[int, float] | None = None

    def left(self, done: int, total: int) -> float | None:
        now = time.monotonic()
        if self.first is None:
            self.first = done, now
        begun, at = self.first
        return (now - at) / (done - begun) * (total - done) if total and done > begun else None


def every_report(progress: Report | Iterable[Report] | None) -> list[Report]:
    if progress is None:
        return []
    several = isinstance(progress, Iterable) and not isinstance(progress, str)
    reports: list[Any] = [progress] if callable(progress) or not several else [*progress]
    for report in reports:
        if not callable(report):
            raise LearningError(
                f"progress: expected functions of a Progress, such as nadhooks.progress.csv_log(path), got {report!r}"
            )
    return reports


def csv_log(path: str | PathLike[str]) -> Report:
    """`learn(..., progress=csv_log("run.csv"))` adds a row to the file for each step: step, measure, value.

    A file that is there already is gone on with; steps that a run does again after it was stopped stand there once.
    Raises LearningError where it cannot be written.
    """
    file = Path(path).absolute()  # wherever the process goes meanwhile
    try:
        with file.open("a", newline="", encoding="utf-8") as opened:
            if opened.tell() == 0:
                csv.writer(opened, lineterminator="\n").writerow(["step", "measure", "value"])
            elif not file.read_bytes().endswith(b"\n"):  # a run that was killed while it wrote
                opened.write("\n")
        logged = int(([b"0", *re.findall(rb"\n\d+,samples,(\d+)(?=\n)", file.read_bytes())])[-1])
    except OSError as error:
        raise LearningError(f"cannot write the log {path}: {error.strerror}") from error

    def write(progress: Progress) -> None:
        with file.open("a", newline="", encoding="utf-8") as opened:
            rows = csv.writer(opened, lineterminator="\n")
            for name, value in progress.numbers().items():
                rows.writerow([progress.done, name, value if isinstance(value, int) else f"{value:.6g}"])

    return _once(write, logged)


def tensorboard_log(writer: Any) -> Report:
    """`learn(..., progress=tensorboard_log("runs/first"))` writes every number to TensorBoard.

    writer: a folder, or a `torch.utils.tensorboard.SummaryWriter` of yours. Steps that a run does again after it was
    stopped stand in a folder once. Raises LearningError without the package tensorboard.
    """
    logged = 0.0
    if isinstance(writer, (str, PathLike)):
        try:
            from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise LearningError("logging to TensorBoard needs its package: pip install tensorboard") from error
        there = EventAccumulator(str(writer), size_guidance={"scalars": 1})  # of each measure the last alone
        try:
            writer = SummaryWriter(str(writer))
        except OSError as error:
            raise LearningError(f"cannot write the log {writer}: {error.strerror}") from error
        there.Reload()
        logged = there.Scalars("samples")[-1].value if "samples" in there.Tags()["scalars"] else 0.0

    def write(progress: Progress) -> None:
        for name, value in progress.numbers().items():
            writer.add_scalar(name.replace(" ", "/", 1), value, progress.done)
        writer.flush()

    return _once(write, logged)


def _once(write: Report, logged: float) -> Report:
    """Writes the steps that were not before.

    logged: samples until the last step that was: they grow with every step, whatever the method calls a step.
    """

    def report(progress: Progress) -> None:
        nonlocal logged
        if not (progress.resumed and progress.samples <= logged):
            logged = progress.samples
            write(progress)

    return report
