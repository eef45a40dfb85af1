"""How long making a model, attaching gates to its blocks and wiring them take: python tests/benchmarks/attaching.py

Every N-th model of both zoos (by name), at the image size that it is made for, and the largest one on the meta device.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

import nadhooks
from nadhooks import zoo

LARGEST = "timm:vit_7b_patch16_dinov3"  # 6.7 billion parameters


def seconds(spec: str, device: str) -> tuple[float, float]:
    """(to make it, to attach and wire)."""
    begun = time.perf_counter()
    with torch.device(device):
        model = zoo.load_model(spec)
    made = time.perf_counter()
    with nadhooks.attach(model):
        return made - begun, time.perf_counter() - made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--every", type=int, default=37, metavar="N")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sums = []
    for spec in list(zoo.model_names())[:: options.every]:
        made, attached = seconds(spec, "cpu")
        sums.append(made + attached)
        print(f"{spec:50} {made:6.2f} s to make, {attached:6.2f} s to attach", flush=True)
    print(f"median of {len(sums)} models: {statistics.median(sums):.2f} s")
    print(f"{LARGEST} on the meta device: {sum(seconds(LARGEST, 'meta')):.2f} s")


if __name__ == "__main__":
    main()
