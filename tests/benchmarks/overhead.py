"""What gates cost a forward pass: python tests/benchmarks/overhead.py [--batch 8] [--rounds 15] [--threads 1]

Times a bare model, the same with gates attached but not in force, and with the gates of every block in force, in turn,
and prints the ratio of the fastest rounds to the bare model's.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn

import nadhooks
from nadhooks import zoo

MODELS = ("timm:resnet50", "timm:vit_base_patch16_224", "timm:convnext_tiny")


def seconds(run: Callable[[], object], device: torch.device) -> float:
    begun = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure(model: nn.Module, batch: int, rounds: int, device: torch.device) -> dict[str, float]:
    """{what: the fastest of its rounds, in seconds}; rounds of all kinds alternate."""
    images = torch.randn(batch, *zoo.example_for(model).shape[1:], device=device)
    fastest: dict[str, float] = {}

    def take(name: str, context: object) -> None:
        with context, torch.no_grad():  # type: ignore[attr-defined]
            fastest[name] = min(fastest.get(name, float("inf")), seconds(lambda: model(images), device))

    for _ in range(rounds + 1):
        take("bare", nullcontext())
        with nadhooks.attach(model, tasks=2) as gates:
            with torch.no_grad():
                for logits in gates.logits.values():
                    logits[1, ::2] = 0
            take("attached", nullcontext())
            take("open", gates(0))
            take("half closed", gates(1))
            take("each sample its own", gates(torch.arange(batch) % 2))
    return fastest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    print(f"| model | bare, ms | {' | '.join(('attached', 'open', 'half closed', 'each sample its own'))} |")
    print("| --- | --- | --- | --- | --- | --- |")
    for spec in MODELS:
        torch.manual_seed(0)
        found = measure(zoo.load_model(spec).to(device), options.batch, options.rounds, device)
        ratios = " | ".join(f"{found[name] / found['bare'] - 1:+.1%}" for name in list(found)[1:])
        print(f"| {spec} | {1000 * found['bare']:.0f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
