"""What the command line prints and reads: tables, progress, errors in one line, numbers and tasks."""

from __future__ import annotations

import argparse
import math
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from ..masks import Masks

OPTIONS = (
    "axis|cache|checkpoint|closed|fidelity|keep|memory|method|sites|start|tasks|weights|width"  # named alike in Python
)
Update = Callable[..., None]  # (done, total, figures to show beside)

AS_IT_IS: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}  # names may have brackets and colons
LONGEST = 72  # of the names that rows are about
SPEED_OVER = 600  # seconds, over which the time left is estimated: one step may take a minute
LIBRARY = Path(__file__).parent.parent
FIRST_LINE = 60  # seconds, after which a file is told how far things are


def _on_screen(stream: TextIO | None) -> bool:
    """Not where a stream is closed, as for a daemon's."""
    return stream is not None and stream.isatty()


out = Console(**AS_IT_IS, width=None if _on_screen(sys.stdout) else 120)  # files and pipes have no width
err = Console(**AS_IT_IS, stderr=True, force_terminal=_on_screen(sys.stderr))  # a bar is of no use in a file


def say(text: str) -> None:
    """A line as it is: paths are not broken."""
    out.print(text, soft_wrap=True)


@contextmanager
def bar(text: str) -> Iterator[Update]:
    """A progress bar on the screen, gone when done; `update(done, total, figures)` moves it, also back to a start.

    Where a file takes the place of the screen: a line after one, two, four … minutes.
    """
    ends = (MofNCompleteColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    columns = (TextColumn("{task.description}"), BarColumn(), *ends)
    shown: dict[str, Any] = {"transient": True, "disable": not err.is_terminal, "speed_estimate_period": SPEED_OVER}
    with Progress(*columns, console=err, **shown) as progress:
        task = progress.add_task(text, total=None, figures="")
        before, begun, quiet = 0, time.monotonic(), FIRST_LINE

        def update(done: int, total: int, figures: str = "") -> None:
            nonlocal before, quiet
            if done < before:  # another round: a finished bar would show no time left
                progress.reset(task, figures=figures)
            before = done
            progress.update(task, completed=done, total=total or None, figures=figures)
            if progress.disable and time.monotonic() - begun >= quiet:
                quiet *= 2
                left = progress.tasks[0].time_remaining
                said = (f"{done:,} of {total:,}", figures, left and f"{timedelta(seconds=left)} left")
                err.print(f"{text}: {', '.join(part for part in said if part)}", soft_wrap=True)

        yield update


def table(*headings: str) -> Table:
    """A table without lines; headings that end in ` >` head columns of figures."""
    made = Table(box=None, pad_edge=False, header_style="bold")
    for index, heading in enumerate(headings):
        side: Literal["left", "right"] = "right" if heading.endswith(" >") else "left"
        # the names that rows are about stay on a line, and what else is long folds
        form: dict[str, Any] = {"overflow": "fold"} if index else {"no_wrap": True, "max_width": LONGEST}
        made.add_column(heading.removesuffix(" >"), justify=side, **form)
    return made


def few(names: Iterable[str], shown: int = 2) -> str:
    names = list(names)
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")


def as_options(text: str) -> str:
    """An error's arguments, such as axis=2, as the options of the command line."""
    text = re.sub(r"pass example=.*", "give the size by --image-size", text)  # other examples are for programs
    text = re.sub(r"draw nadhooks\.collapse\(graph, (\d+)\)", r"pass --collapse \1", text)
    text = re.sub(rf"(?<![\w,.])({OPTIONS})=(?=[\w\"'])", r"--\1 ", text)
    return re.sub(rf"(?<![\w,.])({OPTIONS})=", r"--\1", text)


def one_line(error: BaseException) -> str:
    text = str(error)
    if "\nOriginal Traceback" in text:  # from a process that loads images: what it raised is the last line
        text = text.strip().splitlines()[-1].partition(": ")[2]
    text = " ".join(text.split())
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return text or type(error).__name__


def showing(otherwise: Callable[..., None]) -> Callable[..., None]:
    """How warnings are shown: the library's in a line, without the source that they came from."""

    def shown(message: Warning, category: type[Warning], filename: str, *place: Any, **more: Any) -> None:
        if Path(filename).is_relative_to(LIBRARY):
            err.print(f"nadhooks: warning: {as_options(one_line(message))}", soft_wrap=True)
        else:
            otherwise(message, category, filename, *place, **more)

    return shown


def number(kind: Callable[[str], Any], expected: str, fits: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type: numbers of that kind that fit. NaN fits nothing."""

    def parsed(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not fits(value):
            raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}")
        return value

    return parsed


HEADINGS = {"recall": "recall", "fpr": "false pos.", "auc": "AUC", "fpr95": "false pos. at recall 95%"}  # of measures
AT_LEAST_1 = number(int, "a number of at least 1", lambda value: value >= 1)


def task_of(masks: Masks, text: str) -> str | int:
    """A task as a person types it: its name, or its label."""
    return text if text in masks.tasks or text in masks.labels or not text.lstrip("-").isdecimal() else int(text)
