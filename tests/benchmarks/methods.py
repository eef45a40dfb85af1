"""What each learning method costs and what its masks are worth, beside the authors' algorithm, on Fashion-MNIST.

    python tests/benchmarks/methods.py                 # about 20 minutes on one core, the network's training included
    python tests/benchmarks/methods.py --classes 2 --rounds 1

A ResNet of nine sites and 1,024 units is trained once and kept in the cache directory. Then, in alternation and on one
thread: the reference, written here after the authors' description without any of nadhooks' learning code, and the
library's methods. Figures are means over the classes, on held-out images of all ten classes; seconds are a class's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import nadhooks
from nadhooks import methods
from nadhooks.data import cache_dir, load_images
from nadhooks.evaluation import recognition, shuffled
from nadhooks.formats.writing import write_bytes

SITES = ["maxpool", "layer?.*"]
OWN_IMAGES = 512  # per class, as many as make the reference's 21 epochs 672 steps of 16
BETA = 0.2
console = Console()


def fashion(split: str) -> tuple[Tensor, Tensor]:
    """(images (n, 1, 28, 28) normalised, labels (n,)) in memory."""
    data = load_images("fashion-mnist", split, lambda image: image).dataset  # type: ignore[arg-type]
    pixels: Tensor = data.data  # type: ignore[attr-defined]
    labels: Tensor = data.targets  # type: ignore[attr-defined]
    return ((pixels.float() / 255 - 0.286) / 0.353)[:, None], labels


def network(images: Tensor, labels: Tensor, epochs: int = 5) -> nn.Module:
    model: nn.Module = timm.create_model("resnet18", in_chans=1, channels=(32, 64, 128, 256), num_classes=10)
    kept = cache_dir() / "benchmark-fashion-resnet.safetensors"
    if kept.is_file():
        model.load_state_dict(safetensors.torch.load_file(kept))
        return model.eval()
    steps = epochs * (len(images) // 128)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
    for epoch in range(epochs):
        console.print(f"training the network, epoch {epoch + 1} of {epochs}")
        for chosen in torch.randperm(len(images)).split(128)[: len(images) // 128]:
            flipped = torch.where(torch.rand(len(chosen), 1, 1, 1) < 0.5, images[chosen].flip(3), images[chosen])
            optimizer.zero_grad()
            F.cross_entropy(model(flipped), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, safetensors.torch.save(model.state_dict()))
    return model.eval()


class Mask(nn.Module):
    def __init__(self, units: int):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(1, units, 1, 1))

    def forward(self, module: nn.Module, args: object, output: Tensor) -> Tensor:
        self.output = self.logits.sigmoid() * output
        return self.output


def reference(teacher: nn.Module, student: nn.Module, units: list[int], images: Tensor, label: int) -> list[Tensor]:
    """The authors' algorithm as they run it: two networks, one class, weight gradients computed and thrown away."""
    masks = [Mask(number) for number in units]
    originals: list[Tensor] = []
    sites = ["maxpool", *(f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1))]
    handles = [student.get_submodule(name).register_forward_hook(mask) for name, mask in zip(sites, masks, strict=True)]
    handles += [
        teacher.get_submodule(name).register_forward_hook(lambda module, args, output: originals.append(output))
        for name in sites
    ]
    labels = torch.full((len(images),), label)
    for _ in range(21):
        for chosen in torch.randperm(len(images)).split(16):
            originals.clear()
            with torch.no_grad():
                right = teacher(images[chosen]).argmax(1) == label
            outputs = student(images[chosen])
            if not right.any():
                continue
            loss = F.cross_entropy(outputs, labels[chosen])
            for mask, original in zip(masks, originals, strict=True):
                loss = loss + F.mse_loss(mask.output[right], original[right])
            penalty = sum((mask.logits.sigmoid() ** 2).mean() for mask in masks)
            (loss / len(masks) + BETA * penalty / len(masks)).backward()
            for mask in masks:
                assert mask.logits.grad is not None
                mask.logits.data -= 0.1 * F.normalize(mask.logits.grad)
                mask.logits.grad = None
    for handle in handles:
        handle.remove()
    return [mask.logits.detach().sigmoid().flatten() for mask in masks]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2, help="seeds; each runs every method once, in alternation")
    parser.add_argument("--test-images", type=int, default=2000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    images, labels = fashion("train")
    model = network(images, labels)
    test_images, test_labels = (part[: options.test_images] for part in fashion("test"))
    test = [(test_images, test_labels)]
    order = torch.randperm(len(images))
    images, labels = images[order], labels[order]
    loader = list(zip(images.split(128), labels.split(128), strict=True))
    classes = list(range(options.classes))
    own = {label: images[labels == label][:OWN_IMAGES] for label in classes}
    own_loader = [(x, torch.full((len(x),), label)) for label in classes for x in own[label].split(128)]
    gates = nadhooks.attach(model, SITES, tasks=classes, example=images[:1])
    teacher = timm.create_model("resnet18", in_chans=1, channels=(32, 64, 128, 256), num_classes=10).eval()
    teacher.load_state_dict(model.state_dict())
    student = timm.create_model("resnet18", in_chans=1, channels=(32, 64, 128, 256), num_classes=10).eval()
    student.load_state_dict(model.state_dict())
    units = [site.units for site in gates.sites]

    def authors(seed: int) -> nadhooks.Masks:
        torch.manual_seed(seed)
        rows = [reference(teacher, student, units, own[label], label) for label in classes]
        table = {
            site.name: torch.stack(parts) for site, parts in zip(gates.sites, zip(*rows, strict=True), strict=True)
        }
        return gates.masks().replaced(table)

    def learnt(
        method: str | methods.Method, data: list[tuple[Tensor, Tensor]], **more: object
    ) -> Callable[[int], nadhooks.Masks]:
        return lambda seed: nadhooks.learn(model, data, SITES, tasks=classes, method=method, seed=seed, **more)  # type: ignore[arg-type]

    runs: dict[str, Callable[[int], nadhooks.Masks]] = {
        "reference": authors,
        "nad": learnt(methods.nad(beta=BETA), own_loader),
        "class-only": learnt("class-only", loader),
        "class-only, zero": learnt("class-only", loader, closed="zero"),
        "contrastive": learnt("contrastive", loader),
        "contrastive, zero": learnt("contrastive", loader, closed="zero"),
        "contrastive, zero, keep 0.3": learnt("contrastive", loader, closed="zero", keep=0.3),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    worth: dict[str, list[list[float]]] = {"full network": [figures(recognition(gates, test))]}
    for seed in range(options.rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            masks = run(seed)
            seconds[name].append((time.perf_counter() - begun) / len(classes))
            console.print(f"round {seed + 1}: {name}, {seconds[name][-1]:.2f} s a class", highlight=False)
            soft = name in ("reference", "nad")
            if soft:
                worth.setdefault(f"{name}, soft", []).append(figures(recognition(gates, test, masks)))
            worth.setdefault(f"{name}, hard" if soft else name, []).append(
                figures(recognition(gates, test, masks.hard()))
            )
            if name == "contrastive":
                random = shuffled(masks, seed)
                worth.setdefault("random, of contrastive's size", []).append(figures(recognition(gates, test, random)))
    report(seconds, worth, options.rounds)


def figures(measured: list[nadhooks.evaluation.Recognition]) -> list[float]:
    keys = ("kept", "recall", "fpr", "auc", "fpr95")
    return [statistics.mean(getattr(row, key) for row in measured) for key in keys]


def report(seconds: dict[str, list[float]], worth: dict[str, list[list[float]]], rounds: int) -> None:
    table = Table(box=None, header_style="bold", title=f"means over classes and {rounds} seeds")
    for heading in ("masks", "kept", "recall", "false pos.", "AUC", "false pos. at recall 95%"):
        table.add_column(heading, justify="left" if heading == "masks" else "right")
    for name, rows in worth.items():
        means = [statistics.mean(column) for column in zip(*rows, strict=True)]
        table.add_row(name, f"{means[0]:.2f}", *(f"{value:.3f}" for value in means[1:]))
    console.print(table)
    table = Table(box=None, header_style="bold", title="time, one thread; the ratio is the median of round by round")
    for heading in ("method", "s a class", "reference / method"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, times in seconds.items():
        ratio = statistics.median(ours / own for ours, own in zip(seconds["reference"], times, strict=True))
        table.add_row(name, f"{statistics.median(times):.2f}", f"{ratio:.1f}")
    console.print(table)


if __name__ == "__main__":
    main()
