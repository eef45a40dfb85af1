"""How much faster a shrunken sub-architecture is: python tests/benchmarks/shrinking.py [MODEL] [--keep 0.55]

Random hard masks of every convolution and linear layer, folded, then shrunk; forward passes of the folded and of the
smaller model in turn, and the ratio of the medians. Prints one row for each batch size and each multiple of widths.
"""

from __future__ import annotations

import argparse
from typing import cast

import torch

import nadhooks
from nadhooks import zoo
from nadhooks.shrinking import Shrinking, speed_up


def random_masks(model: torch.nn.Module, keep: float, closed: str) -> nadhooks.Masks:
    """A share `keep` of the units of each convolution and linear layer but the last, at random; one task."""
    generator = torch.Generator().manual_seed(0)
    with nadhooks.attach(model, nadhooks.sites.channels()) as gates, torch.no_grad():
        for site in gates.sites[:-1]:
            order = torch.randperm(site.units, generator=generator)
            gates.logits[site.name][0, order[round(keep * site.units) :]] = 0
        if closed == "mean":
            gates.calibrate([zoo.example_for(model)])
        return gates.masks()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", default="torchvision:resnet50")
    parser.add_argument("--keep", type=float, default=0.55)
    parser.add_argument("--closed", choices=("zero", "mean"), default="zero")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--multiple", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model = zoo.load_model(options.model).to(options.device)
    folded = nadhooks.sub_architecture(model, random_masks(model, options.keep, options.closed))
    print(f"{options.model}, {options.keep:.0%} kept, closed={options.closed}: {folded.folding}")
    print("| widths a multiple of | parameters | largest difference | batch | speed-up |")
    print("| --- | --- | --- | --- | --- |")
    shape = zoo.example_for(model).shape[1:]
    for multiple in options.multiple:
        small = nadhooks.shrink(folded, multiple=multiple)
        report = cast(Shrinking, small.shrinking)
        before, after = report.parameters
        for batch in options.batch:
            images = torch.randn(batch, *shape, device=options.device)
            ratio = speed_up(folded, small, images, options.rounds)
            print(
                f"| {multiple} | {after / before:.0%} | {report.difference:.1e} of {report.largest:.1e} "
                f"| {batch} | {ratio:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
