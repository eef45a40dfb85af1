"""A writer killed at any moment leaves the old file or the new one: `python -m tests.benchmarks.killing`."""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WRITER = """
import sys
import torch
import networkx as nx
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import Tasks

wiring = nx.DiGraph([("input", "a"), ("a", "output")])
both = [Masks((Site("a", 1, 4096, "a"),), {"a": torch.full((500, 4096), gate)}, Tasks.of(500), wiring)
        for gate in (0.25, 0.75)]  # 8 MB each
print("ready", flush=True)
while True:
    for masks in both:
        masks.save(sys.argv[1])
"""


def mixtures(path: Path, times: int, seed: int = 0) -> int:
    """How often a file was neither the one nor the other after its writer was killed."""
    import nadhooks

    random_moment = random.Random(seed)
    wrong = 0
    for _ in range(times):
        with subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE) as writer:
            assert writer.stdout is not None
            writer.stdout.readline()
            time.sleep(random_moment.uniform(0.02 if path.exists() else 1, 0.3 if path.exists() else 1.5))
            writer.kill()
        gates = nadhooks.load(path)["a"]
        wrong += not (bool((gates == 0.25).all()) or bool((gates == 0.75).all()))
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = mixtures(Path(folder) / "m.safetensors", options.times)
        left = len(list(Path(folder).iterdir())) - 1
    print(f"killed {options.times} times: {wrong} mixtures, {left} temporary files left behind")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
