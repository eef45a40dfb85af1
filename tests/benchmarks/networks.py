"""The small networks on Fashion-MNIST that benchmarks look into: trained once, kept in the cache directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

from nadhooks.data import cache_dir, load_images
from nadhooks.errors import NadhooksError
from nadhooks.formats.writing import write_bytes
from nadhooks.learning import emulated


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: with one cycle of learning rates up to `rate`."""

    optimizer: Callable[..., torch.optim.Optimizer]
    rate: float
    batch: int
    flips: bool = False
    autocast: torch.dtype | None = None


ADAMW = Recipe(partial(torch.optim.AdamW, weight_decay=0.05), 2e-3, 64)
SGD = Recipe(
    partial(torch.optim.SGD, momentum=0.9, weight_decay=5e-4, nesterov=True), 0.1, 128, flips=True,
    autocast=torch.bfloat16,
)  # fmt: skip


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    channels = 1
    for width, pool in ((32, False), (32, True), (64, False), (64, True), (128, False), (128, True)):
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(inplace=True)]
        layers += [nn.MaxPool2d(2)] if pool else []
        channels = width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


VGG_SITES = ["2", "6", "9", "13", "16", "20"]  # each ReLU, or the max-pool after it
RESNET_SITES = ["maxpool", "layer?.*"]


def resnet(*channels: int) -> nn.Module:
    return timm.create_model("resnet18", in_chans=1, channels=channels, num_classes=10)


SMALL: dict[str, Callable[[], nn.Module]] = {  # by ADAMW, 20,000 images and four epochs
    "resnet": partial(resnet, 32, 64, 96, 128),
    "vgg": vgg,
    "densenet": partial(
        timm.create_model, "densenet121", in_chans=1, growth_rate=12, block_config=(4, 4, 4), num_classes=10
    ),
    "seresnet": partial(
        timm.create_model, "seresnet18", in_chans=1, channels=(32, 64, 96, 128), num_classes=10
    ),
    "vit": partial(
        timm.create_model, "vit_tiny_patch16_224", in_chans=1, img_size=28, patch_size=4, embed_dim=96, depth=4,
        num_heads=4, num_classes=10,
    ),
    "convnext": partial(
        timm.create_model, "convnext_tiny", in_chans=1, patch_size=2, output_stride=8, depths=(1, 1, 2, 1),
        dims=(32, 64, 96, 128), num_classes=10,
    ),
}  # fmt: skip


def pixels(split: str, console: Console) -> tuple[Tensor, Tensor]:
    """(images (n, 1, 28, 28) normalised, labels (n,)): Fashion-MNIST, or where it is not to be had, digits."""
    try:
        data = load_images("fashion-mnist", split, lambda image: image).dataset  # type: ignore[arg-type]
        images, labels = data.data.float() / 255, data.targets  # type: ignore[attr-defined]
    except NadhooksError as error:
        console.print(f"{error}; digits instead")
        from sklearn.datasets import load_digits

        digits = load_digits()
        chosen = slice(None, 1437) if split == "train" else slice(1437, None)
        images = F.interpolate(torch.tensor(digits.images[chosen]).float()[:, None] / 16, (28, 28))[:, 0]
        labels = torch.tensor(digits.target[chosen])
    return ((images - 0.286) / 0.353)[:, None], labels


def trained(
    name: str,
    build: Callable[[], nn.Module],
    images: Tensor,
    labels: Tensor,
    epochs: int,
    recipe: Recipe,
    console: Console,
) -> nn.Module:
    """A network in eval mode, from the cache if it was trained before. name: what it is kept by."""
    torch.manual_seed(0)
    model = build()
    kept = cache_dir() / f"benchmark-{name}-{len(images)}-{epochs}.safetensors"
    if kept.is_file():
        model.load_state_dict(safetensors.torch.load_file(kept))
        return model.eval()
    half = recipe.autocast is not None and not emulated(recipe.autocast)  # or hours instead of minutes
    each = len(images) // recipe.batch
    optimizer = recipe.optimizer(model.parameters(), recipe.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.rate, total_steps=epochs * each)
    for epoch in range(epochs):
        console.print(f"training {name}, epoch {epoch + 1} of {epochs}")
        for chosen in torch.randperm(len(images)).split(recipe.batch)[:each]:
            shown = images[chosen]
            if recipe.flips:
                shown = torch.where(torch.rand(len(chosen), 1, 1, 1) < 0.5, shown.flip(3), shown)
            optimizer.zero_grad()
            with torch.autocast("cpu", recipe.autocast, enabled=half):
                outputs = model(shown)
            F.cross_entropy(outputs.float(), labels[chosen]).backward()
            optimizer.step()
            schedule.step()
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, safetensors.torch.save(model.state_dict()))
    return model.eval()
