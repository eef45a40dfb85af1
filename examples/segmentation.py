"""Which part of a segmentation network finds which digit: masks for outputs that are no classes, but pictures.

    python -m examples.segmentation [--out DIR]

A small U-Net is trained to say, for each pixel of a canvas, which of ten digits it belongs to, or none. A canvas shows
two or three digits, so its labels are a row of 0 and 1; and what a digit's sub-architecture should do is said by an
objective on all pixels, `pixelwise`. Then each digit is looked for with the full network, with its own
sub-architecture, with those of other digits, and with random masks of the same size.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.torch
import torch
import torch.nn.functional as F
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

import nadhooks
from nadhooks.data import Split, cache_dir, load_images
from nadhooks.evaluation import shuffled
from nadhooks.formats.writing import write_bytes
from nadhooks.methods import Pass, Samples, from_objective
from nadhooks.methods import Table as Gates
from nadhooks.objectives import binary_kl, per_task

DIGITS, BACKGROUND = 10, 10  # the network's outputs: ten digits, and what is none
CELL, DIGIT = 20, 16  # pixels: a canvas has two by two cells, and some of them a digit somewhere within
NOISE = 0.1
INK = 0.35  # pixels brighter than this belong to the digit
STEPS, BATCH = 350, 32  # of training
COLOURS = ["C0", "C1", "C2", "C3", "C4", "C5", "C6", "black", "C8", "C9"]  # C7 is the grey of the canvases
SHOWN = 5, 3  # digits whose sub-architectures the picture shows, side by side


# --- canvases --------------------------------------------------------------------------------------------------------


class Canvases(NamedTuple):
    """images (batch, 1, 40, 40), labels (batch, 10) of 0 and 1: which digits they show, pixels (batch, 40, 40)."""

    images: Tensor
    labels: Tensor
    pixels: Tensor


def digits(split: Split, kinds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """scikit-learn's digits of these kinds, enlarged: (number, 16, 16) from 0 to 1, and which they are."""
    every = list(load_images("digits", split, lambda image: pil_to_tensor(image) / 255).dataset)  # type: ignore[call-overload]
    small = torch.stack([image for image, _ in every])
    large = F.interpolate(small, size=(DIGIT, DIGIT), mode="bilinear", align_corners=False)
    known = torch.tensor([label for _, label in every])
    chosen = torch.isin(known, torch.tensor(kinds))
    return large[chosen, 0], known[chosen]


def canvases(split: Split, seed: int, kinds: Sequence[int] = range(DIGITS), batch: int = BATCH) -> Iterator[Canvases]:
    """Without end: two or three digits, each in a cell of its own, on noise."""
    images, known = digits(split, kinds)
    random = torch.Generator().manual_seed(seed)

    def chance(below: int) -> int:
        return int(torch.randint(below, (), generator=random))

    while True:
        canvas = NOISE * torch.randn(batch, 1, 2 * CELL, 2 * CELL, generator=random)
        labels = torch.zeros(batch, DIGITS, dtype=torch.long)
        pixels = torch.full((batch, 2 * CELL, 2 * CELL), BACKGROUND)
        for sample in range(batch):
            for cell in torch.randperm(4, generator=random)[: 2 + chance(2)].tolist():
                which = chance(len(images))
                top = cell // 2 * CELL + chance(CELL - DIGIT + 1)
                left = cell % 2 * CELL + chance(CELL - DIGIT + 1)
                place = slice(top, top + DIGIT), slice(left, left + DIGIT)
                canvas[sample, 0][place] += images[which]
                pixels[sample][place][images[which] > INK] = known[which]
                labels[sample, known[which]] = 1
        yield Canvases(canvas, labels, pixels)


# --- the network -----------------------------------------------------------------------------------------------------


class Block(nn.Sequential):
    def __init__(self, inputs: int, outputs: int):
        first = (nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        second = (nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())
        super().__init__(*first, *second)


class UNet(nn.Module):
    """Blocks on the way down to a quarter of the size, and up again beside what was there on the way down."""

    def __init__(self, widths: tuple[int, ...]):
        super().__init__()
        self.down = nn.ModuleList(itertools.starmap(Block, itertools.pairwise((1, *widths))))
        self.up = nn.ModuleList(Block(deep + flat, flat) for flat, deep in reversed(list(itertools.pairwise(widths))))
        self.head = nn.Conv2d(widths[0], DIGITS + 1, 1)

    def forward(self, x: Tensor) -> Tensor:  # (B, 1, H, W) -> (B, 11, H, W)
        passed: list[Tensor] = []
        for block in self.down:
            passed.append(block(F.max_pool2d(passed[-1], 2) if passed else x))
        x = passed.pop()
        for block in self.up:
            x = block(torch.cat([F.interpolate(x, scale_factor=2.0), passed.pop()], 1))
        return self.head(x)


def trained(
    steps: int = STEPS, widths: tuple[int, ...] = (16, 32, 64), kinds: Sequence[int] = range(DIGITS)
) -> nn.Module:
    """The network, trained once and kept in the cache directory."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UNet(widths)
    kept = cache_dir() / f"segmentation-{'-'.join(map(str, (steps, *widths, 'of', *kinds)))}.safetensors"
    if kept.is_file():
        model.load_state_dict(safetensors.torch.load_file(kept))
        return model.eval()
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for batch in itertools.islice(canvases("train", 0, kinds), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(batch.images), batch.pixels).backward()
        optimizer.step()
        schedule.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, safetensors.torch.save(model.state_dict()))
    return model.eval()


# --- masks -----------------------------------------------------------------------------------------------------------


def pixelwise(student: Pass, teacher: Pass, samples: Samples, gates: Gates) -> dict[str, Tensor]:
    """How far "this pixel is of the digit" has moved from the full network: on canvases with the digit, and without.

    Outputs are (samples, 11, height, width), and `samples.classes` says the digit whose gates a sample went through.
    """
    tasks = len(next(iter(gates.values())))
    before, after = (side.outputs.permute(0, 2, 3, 1) for side in (teacher, student))  # (samples, height, width, 11)
    digit = samples.classes[:, None, None].expand(before.shape[:3])
    far = binary_kl(after.flatten(0, 2), before.flatten(0, 2), digit.flatten())
    far = far.reshape(len(samples.classes), -1).mean(1)  # (samples,)
    return {
        name: per_task(far[part], samples.rows[part], tasks)
        for name, part in (("with the digit", samples.positive), ("without", ~samples.positive))
    }


METHOD = replace(from_objective(pixelwise), steps=180, positives=4, negatives=4, images=None)


def learnt(model: nn.Module, batches: int = 20, kinds: Sequence[int] = range(DIGITS), **options: Any) -> nadhooks.Masks:
    """A mask for each digit, of the network's blocks; options as for `nadhooks.learn`."""
    loader = [(batch.images, batch.labels) for batch in itertools.islice(canvases("train", 1, kinds), batches)]
    return nadhooks.learn(model, loader, **{"method": METHOD, **options})


# --- how good they are -----------------------------------------------------------------------------------------------


def overlaps(answer: Callable[[Tensor], Tensor], held_out: list[Canvases]) -> Tensor:
    """(10,) intersection over union of each digit's pixels, over all canvases. answer: images -> (batch, 11, …)."""
    both, either = torch.zeros(DIGITS), torch.zeros(DIGITS)
    for batch in held_out:
        with torch.no_grad():
            said = answer(batch.images).argmax(1)
        for digit in range(DIGITS):
            a, b = said == digit, batch.pixels == digit
            both[digit] += (a & b).sum()
            either[digit] += (a | b).sum()
    return both / either.clamp(min=1)


def measured(model: nn.Module, masks: nadhooks.Masks, held_out: list[Canvases], draws: int = 3) -> dict[str, Tensor]:
    """{network: (tasks,)} overlap of the tasks' digits, with the full network and with parts of it."""
    digits = [int(label) for label in masks.labels]

    def table(part: nadhooks.Masks) -> Tensor:
        """(tasks, tasks): what each task's part makes of each task's digit."""
        gates.load(part)
        rows = []
        for digit in digits:
            with gates(digit):
                rows.append(overlaps(model, held_out)[digits])
        return torch.stack(rows)

    with nadhooks.attach(model, masks.sites, example=held_out[0].images[:1]) as gates:
        full = overlaps(model, held_out)[digits]
        own = table(masks)
        random = torch.stack([table(shuffled(masks, seed)).diagonal() for seed in range(draws)]).mean(0)
    others = (own.sum(0) - own.diagonal()) / (len(digits) - 1)
    return {"full network": full, "its own part": own.diagonal(), "other digits' parts": others, "random part": random}


def show(masks: nadhooks.Masks, figures: dict[str, Tensor]) -> None:
    table = Table("digit", "kept", *figures, box=None, header_style="bold", title="IoU on held-out canvases")
    for row, name in enumerate(masks.tasks):
        table.add_row(name, f"{masks.kept()[row]:.0%}", *(f"{values[row]:.3f}" for values in figures.values()))
    means = (f"{values.mean():.3f}" for values in figures.values())
    table.add_row("mean", f"{masks.kept().mean():.0%}", *means, style="bold")
    Console(highlight=False).print(table)


def picture(model: nn.Module, masks: nadhooks.Masks, held_out: Canvases, shown: Sequence[int], rows: int = 4) -> Figure:
    """Canvases that show these digits and others, and what the full network and these digits' parts make of them."""
    wanted = held_out.labels[:, list(shown)].sum(1) * 10 + held_out.labels.sum(1)
    chosen = wanted.argsort(descending=True, stable=True)[:rows]
    images = held_out.images[chosen]
    with torch.no_grad(), nadhooks.attach(model, masks.sites, example=images[:1]) as gates:
        gates.load(masks)
        columns = {"canvas": None, "full network": model(images).argmax(1)}
        for digit in shown:
            with gates(digit):
                columns[f"part for {digit}"] = model(images).argmax(1)
    figure = Figure(figsize=(1.5 * len(columns), 1.5 * rows + 0.7), layout="constrained")
    for place, axes in enumerate(figure.subplots(rows, len(columns), squeeze=False).flat):
        row, (title, said) = place // len(columns), list(columns.items())[place % len(columns)]
        axes.imshow(images[row, 0].numpy(), cmap="gray_r", vmin=-0.2, vmax=1.6 if said is None else 4)
        if said is not None:
            empty = (said[row] == BACKGROUND).numpy()
            axes.imshow(
                np.ma.array(said[row].numpy(), mask=empty), cmap=ListedColormap(COLOURS), vmin=0, vmax=DIGITS - 1
            )
        axes.set(xticks=[], yticks=[], title=title if row == 0 else "")
    patches = [Patch(color=colour, label=str(digit)) for digit, colour in enumerate(COLOURS)]
    figure.legend(handles=patches, loc="outside lower center", ncols=DIGITS, frameon=False, handlelength=1)
    return figure


def main(out: Path) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    begun = time.monotonic()
    model = trained()
    print(f"trained, {time.monotonic() - begun:.0f} s", flush=True)
    masks = learnt(model)
    print(f"{masks!r}, {time.monotonic() - begun:.0f} s", flush=True)
    held_out = list(itertools.islice(canvases("test", seed=2), 6))
    show(masks, measured(model, masks, held_out))
    masks.save(out / "masks.safetensors")
    nadhooks.render(nadhooks.flow_graph(masks, SHOWN[0]), out / f"flow-{SHOWN[0]}.svg")
    picture(model, masks, held_out[0], SHOWN).savefig(out / "canvases.png", dpi=150)
    print(f"masks, flow graph and picture are in {out}/, {time.monotonic() - begun:.0f} s")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("segmentation"), help="folder (default: %(default)s)")
    main(parser.parse_args().out)
