"""Runs that are killed again and again: `python -m tests.interrupted KIND FOLDER`.

Every run is a process of its own, forked from this one, so that what is imported is imported once. Writes what the run
learnt, and what a run learnt that nobody disturbed.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nadhooks
from nadhooks import methods

from .nets import Line, fair, images, labelled, seeded

KILLED = 3  # times


class Nervous(Line):
    """What it says of an image depends, in the last digits, on how many others come with it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (1 + 1e-13 * len(x)))


def net() -> Line:
    return fair(seeded(Nervous, 2))


def loader(shuffle: bool = False) -> torch.utils.data.DataLoader[Any]:
    x, labels = (torch.cat(parts) for parts in zip(*labelled(net(), images(70)), strict=True))
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), 9, shuffle=shuffle)


def learnt(shuffle: bool = False, **options: Any) -> Callable[[dict[str, Any]], nadhooks.Masks]:
    return lambda more: nadhooks.learn(net(), loader(shuffle), ["conv1", "act2"], **options, **more)


NAD = methods.nad(epochs=5, batch=4)
TASKWISE = methods.contrastive(steps=25, positives=4, negatives=4)  # eight samples: task by task
KINDS = {
    "nad": learnt(True, method=NAD, closed="mean"),
    "nad-little-memory": learnt(True, method=NAD, cache=40_000),
    "contrastive": learnt(method=TASKWISE, start="taylor", cache=40_000),
    "fidelity": learnt(method=methods.contrastive(steps=4), fidelity=0.02),
}


def write(kind: str, path: Path, **more: Any) -> None:
    masks = KINDS[kind](more)
    torch.save(dict(masks.values), path)


def forked(run: Callable[[], None]) -> int:
    process = os.fork()
    if process:
        return process
    try:
        run()
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        os._exit(1)
    os._exit(0)


def main(kind: str, folder: Path) -> None:
    torch.set_num_threads(1)
    nadhooks.learner.SAMPLES_PER_PASS = 8
    checkpoint = folder / "run.checkpoint"
    begun = time.monotonic()
    assert os.waitpid(forked(lambda: write(kind, folder / "undisturbed.pt")), 0)[1] == 0
    takes = time.monotonic() - begun
    resumed = 0
    for _ in range(KILLED):
        resumed += checkpoint.exists()
        process = forked(lambda: write(kind, folder / "killed.pt", checkpoint=checkpoint, every=0.0))
        time.sleep(random.uniform(0.1, 0.5) * takes)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    resumed += checkpoint.exists()
    last = forked(lambda: write(kind, folder / "resumed.pt", checkpoint=checkpoint, every=0.0))
    assert os.waitpid(last, 0)[1] == 0
    print(resumed)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
