"""A writer killed at any moment leaves the old file or the new one: `python -m tests.benchmarks.killing`."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import sys
import tempfile
import time
from pathlib import Path

import networkx as nx
import torch

import nadhooks
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import Tasks

GATES = (0.25, 0.75)  # of the two files that take turns


def write(path: str) -> None:
    """Saves the one and the other, 8 MB each, until it is killed."""
    torch.set_num_threads(1)
    wiring = nx.DiGraph([("input", "a"), ("a", "output")])
    site = Site("a", 1, 4096, "a")
    both = [Masks((site,), {"a": torch.full((500, 4096), gate)}, Tasks.of(500), wiring) for gate in GATES]
    while True:
        for masks in both:
            masks.save(path)


def mixtures(path: Path, times: int, seed: int = 0) -> int:
    """How often a file was neither the one nor the other after its writer was killed."""
    context = multiprocessing.get_context("forkserver")  # a new process in no time
    context.set_forkserver_preload(["nadhooks"])
    moment = random.Random(seed)
    wrong = 0
    for _ in range(times):
        writer = context.Process(target=write, args=(str(path),))
        writer.start()
        while not path.exists():
            time.sleep(0.01)
        time.sleep(moment.uniform(0, 0.4))
        writer.kill()
        writer.join()
        gates = nadhooks.load(path)["a"]
        wrong += not any(bool((gates == gate).all()) for gate in GATES)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = mixtures(Path(folder) / "m.safetensors", options.times)
        left = len(list(Path(folder).iterdir())) - 1
    print(f"killed {options.times} times: {wrong} mixtures; {left} times a hidden temporary file was left behind")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
