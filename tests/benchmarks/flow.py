"""Whether unit-level graphs are causally true, on five trained networks on Fashion-MNIST (or digits).

    python -m tests.benchmarks.flow                  # some 40 minutes on one busy core, most of it training
    python -m tests.benchmarks.flow --models vit --classes 2

Small networks of five kinds are trained once and kept in the cache directory; masks are learnt, a graph is made for
each class from the training images, and `nadhooks.verify` measures on the live network what the graph says. Targets:
edges and paths at a rank correlation of 0.95 (0.9 for transformers), units (summed edges against the total effect) at
0.95, and recall that falls far more without the strongest units than without random ones. With the midpoint, the
default, edges agree by construction; `--estimator gradient` puts first-order edges to the test.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import get_args

import torch
from rich.console import Console
from rich.table import Table

import nadhooks
from nadhooks.evaluation import Verification
from nadhooks.gating import Closed

from .networks import ADAMW, SMALL, pixels, trained

console = Console(width=140)


def row(name: str, accuracy: float, found: list[Verification], seconds: float) -> list[str]:
    def mean(get: Callable[[Verification], float]) -> str:
        return f"{statistics.fmean(map(get, found)):.3f}"

    return [
        name,
        f"{accuracy:.3f}",
        f"{mean(lambda v: v.edges.spearman)} / {mean(lambda v: v.edges.pearson)}",
        f"{mean(lambda v: v.paths.spearman)} / {mean(lambda v: v.paths.pearson)}",
        f"{mean(lambda v: v.units.spearman)} / {mean(lambda v: v.units.pearson)}",
        f"{mean(lambda v: v.removal.recall)}",
        f"{mean(lambda v: v.removal.recall_without_strongest)} / {mean(lambda v: v.removal.recall_without_random)}",
        f"{seconds:.1f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SMALL, default=[name for name in SMALL if name != "convnext"])
    parser.add_argument("--classes", type=int, default=3)
    parser.add_argument("--images", type=int, default=32, help="of each class, for the graph and for its proof")
    parser.add_argument("--train-images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--reference", choices=get_args(Closed), help="by default the masks' own, optimal")
    parser.add_argument("--estimator", choices=["gradient", "midpoint"], default="midpoint")
    parser.add_argument("--units", type=int, default=12)
    options = parser.parse_args()
    torch.set_num_threads(1)
    images, labels = (part[: options.train_images] for part in pixels("train", console))
    held_images, held_labels = (part[:2000] for part in pixels("test", console))
    table = Table(
        "network", "accuracy", "edges", "paths", "units", "recall", "without strongest / random", "s a graph",
        title=f"rank correlation / Pearson; means over {options.classes} classes, {options.images} images",
    )  # fmt: skip
    for name in options.models:
        model = trained(f"flow-{name}", SMALL[name], images, labels, options.epochs, ADAMW, console)
        with torch.no_grad():
            accuracy = float(model(held_images).argmax(1).eq(held_labels).double().mean())
        loader = list(zip(images[:4000].split(100), labels[:4000].split(100), strict=True))
        masks = nadhooks.learn(model, loader, tasks=list(range(options.classes)))
        found, seconds = [], []
        for label in range(options.classes):
            own = images[labels == label][: options.images]
            begin = time.perf_counter()
            graph = nadhooks.unit_flow(
                model, masks, label, own, reference=options.reference, estimator=options.estimator
            )
            seconds.append(time.perf_counter() - begin)
            begin = time.perf_counter()
            found.append(nadhooks.verify(model, masks, graph, own, units=options.units))
            console.print(
                f"{name}, class {label}: {graph.graph['estimator']}, {len(graph)} nodes, {graph.number_of_edges()} "
                f"edges, verified in {time.perf_counter() - begin:.0f} s"
            )
        table.add_row(*row(name, accuracy, found, statistics.fmean(seconds)))
    console.print(table)


if __name__ == "__main__":
    main()
