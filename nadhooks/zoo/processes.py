"""A process for each model, several at a time: what one of them does to memory or to the machine ends with it."""

from __future__ import annotations

import multiprocessing
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import torch
from rich.progress import Progress

from .check import GRANULARITIES, Finding, check_model, parameters_of

TIME_LIMIT = 1800  # seconds without a result

Result = TypeVar("Result")

context: Any = multiprocessing.get_context("forkserver")  # each process starts with everything imported
stopping = threading.Event()


def each(specs: Sequence[str], work: Callable[[str], Result], workers: int, doing: str) -> Iterator[tuple[str, Result]]:
    """(spec, work(spec)) as they come, with a progress bar on a terminal."""
    context.set_forkserver_preload([__name__, "timm", "torchvision"])
    with Progress(disable=not sys.stdout.isatty()) as progress, ThreadPoolExecutor(workers) as threads:
        task = progress.add_task(doing, total=len(specs))
        running = {threads.submit(work, spec): spec for spec in specs}
        try:
            for future in as_completed(running):
                progress.advance(task)
                yield running[future], future.result()
        except BaseException:
            stopping.set()
            for future in running:
                future.cancel()
            raise


def weigh(spec: str) -> int:
    """How many parameters a model has; 0 where it cannot be made."""
    results, _ = _in_process(_weigh_there, (spec,))
    return results[0] if results else 0


def examine(spec: str, real: bool, lightest: bool, parameters: int) -> list[Finding]:
    """A finding for each granularity, whatever happens to the process.

    lightest: of its model file, which is where channels' wiring is compared with perturbation.
    """
    findings, problem = _in_process(_examine_there, (spec, real, lightest))
    for granularity in list(GRANULARITIES)[len(findings) :]:
        findings.append(Finding(spec, granularity, parameters, "real" if real else "meta", reason=f"failed: {problem}"))
    return findings


def _in_process(target: Callable[..., None], arguments: tuple[Any, ...]) -> tuple[list[Any], str]:
    """What a fresh process sends until it ends, and what went wrong there."""
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=target, args=(there, *arguments), daemon=True)
    process.start()
    there.close()
    sent: list[Any] = []
    problem = ""
    waited = 0
    while not problem:
        if here.poll(1):
            try:
                kind, value = here.recv()
            except EOFError:
                process.join()
                problem = f"the process ended with exit code {process.exitcode}"
                break
            if kind == "problem":
                problem = value
            else:
                sent.append(value)
        else:
            waited += 1
            if waited > TIME_LIMIT or stopping.is_set():
                problem = f"stopped after {waited} s without a result"
    process.kill()
    process.join()
    here.close()
    return sent, problem


def _weigh_there(pipe: Connection, spec: str) -> None:
    _quietly(pipe, lambda: pipe.send(("result", parameters_of(spec))))


def _examine_there(pipe: Connection, spec: str, real: bool, lightest: bool) -> None:
    def examine() -> None:
        for finding in check_model(spec, real=real, channels_wiring=lightest):
            pipe.send(("result", finding))

    _quietly(pipe, examine)


def _quietly(pipe: Connection, work: Callable[[], None]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    try:
        work()
    except BrokenPipeError:  # nobody waits for it any more
        pass
    except Exception as error:  # whatever a model does is a finding
        pipe.send(("problem", " ".join(f"{type(error).__name__}: {error}".split())[:300]))
