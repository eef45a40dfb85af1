"""What a unit-level graph of ResNet50 costs: seconds, and the peak of memory of the whole process.

    python -m tests.benchmarks.flow_costs                            # the defaults: 8 images of 112 x 112
    python -m tests.benchmarks.flow_costs --images 32 --exhaustive   # every kept unit, the 20 strongest edges into each

The network is untrained, but its normalisations know the images; the mask keeps a random 55 % of every site.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch
import torchvision
from torch import nn

import nadhooks
from nadhooks.masks import Masks
from nadhooks.tasks import Tasks


def network(images: torch.Tensor) -> nn.Module:
    torch.manual_seed(0)
    model = torchvision.models.resnet50()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # a plain average
    with torch.no_grad():
        model.train()(images)
    return model.eval()


def random_masks(model: nn.Module, images: torch.Tensor) -> Masks:
    random = torch.Generator().manual_seed(0)
    with nadhooks.attach(model, example=images[:1]) as gates:
        kept = {site.name: (torch.rand(1, site.units, generator=random) < 0.55).double() for site in gates.sites}
        return gates.masks_of(Tasks.of(1), kept, {"model": "resnet50"})


def peak() -> float:
    """GiB that the process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=8)
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--exhaustive", action="store_true")
    parser.add_argument("--estimator", choices=["gradient", "midpoint"], default="midpoint")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    images = torch.randn(options.images, 3, options.size, options.size, generator=torch.Generator().manual_seed(0))
    model = network(images[:8])
    masks = random_masks(model, images)
    before, began, busy = peak(), time.perf_counter(), time.process_time()
    graph = nadhooks.unit_flow(
        model, masks, 0, images, estimator=options.estimator, nodes=1 if options.exhaustive else 0.8,
        top=20 if options.exhaustive else None,
    )  # fmt: skip
    print(
        f"{len(graph)} nodes, {graph.number_of_edges()} edges: {time.perf_counter() - began:.0f} s "
        f"({time.process_time() - busy:.0f} s of the processor), peak {peak():.2f} GiB, {before:.2f} GiB before"
    )


if __name__ == "__main__":
    main()
