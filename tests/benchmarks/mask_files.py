"""Size and speed of a mask file of ImageNet's size: `python -m tests.benchmarks.mask_files`.

1,000 tasks of ResNet50's 17 sites (Hu et al., ICCV 2021: the stem's max-pool, each bottleneck), hard masks at random.
Beside it the authors' way to compare classes: one pair after the other (similarSubArch.py).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.data import ImageNetInfo

import nadhooks
from nadhooks import zoo
from nadhooks.masks import Masks
from nadhooks.tasks import Tasks

COLD = """
import nadhooks, sys, time
begun = time.perf_counter()
nadhooks.load(sys.argv[1])
print(time.perf_counter() - begun)
"""


def imagenet_masks() -> Masks:
    with torch.device("meta"):
        model = zoo.load_model("timm:resnet50")
    random = torch.Generator().manual_seed(0)
    info = ImageNetInfo()
    tasks = Tasks(
        tuple(range(1000)),
        tuple(f"{index}: {info.index_to_description(index).partition(',')[0]}" for index in range(1000)),
        tuple(info.label_names()),
    )
    with nadhooks.attach(model, ["maxpool", "layer?.*"]) as gates:
        values = {site.name: (torch.rand(1000, site.units, generator=random) < 0.55).float() for site in gates.sites}
        masks = gates.masks_of(tasks, values, {"method": "random", "data": "none", "seed": 0})
    quality = {measure: torch.rand(1000, generator=random) for measure in ("recall", "fpr", "auc", "fpr95")}
    return masks.replaced(quality=quality)


def median(action: Callable[[], object], rounds: int) -> float:
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        action()
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


def pair_by_pair(masks: Masks, seconds: float) -> float:
    """Seconds that all 500,500 pairs would take in Python, from as many as fit into some seconds."""
    kept = [[(masks[site.name][task] > 0.5).int() for site in masks.sites] for task in range(100)]
    begun, pairs = time.perf_counter(), 0
    while time.perf_counter() - begun < seconds:
        i, j = pairs // 100 % 100, pairs % 100
        for a, b in zip(kept[i], kept[j], strict=True):
            float((a & b).sum() / (a | b).sum())
        pairs += 1
    return (time.perf_counter() - begun) / pairs * 500_500


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    masks = imagenet_masks()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50-imagenet.masks.safetensors"
        saving = median(lambda: masks.save(path), options.rounds)
        opening = median(lambda: nadhooks.load(path), options.rounds)
        cold = statistics.median(
            float(subprocess.run([sys.executable, "-c", COLD, path], capture_output=True, check=True).stdout)
            for _ in range(options.rounds)
        )
        opened = nadhooks.load(path)
        one = median(lambda: [opened.select(7)[site.name] for site in opened.sites], options.rounds)
        everything = median(lambda: [opened[site.name] for site in opened.sites], options.rounds)
        jaccard = median(opened.jaccard, options.rounds)
        pairs = pair_by_pair(masks, 5)
        size = path.stat().st_size
        assert opened == masks
    threads = torch.get_num_threads()
    lines = {
        "size": f"{size:,} bytes",
        "save": f"{saving:.3f} s",
        "open": f"{opening * 1000:.1f} ms; first in a process {cold * 1000:.1f} ms",
        "one task's gates": f"{one * 1000:.1f} ms",
        "every gate": f"{everything:.3f} s",
        "1,000 x 1,000 Jaccard": f"{jaccard:.3f} s; pair by pair in Python {pairs:,.0f} s, x{pairs / jaccard:,.0f}",
    }
    print(f"{len(masks):,} tasks x {masks.units:,} units, medians of {options.rounds}, threads: {threads}")
    for name, figure in lines.items():
        print(f"{name:<24}{figure}")


if __name__ == "__main__":
    main()
