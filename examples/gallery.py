"""The pictures of docs/gallery.md: `python -m examples.gallery docs/images/gallery [network ...]`.

Small networks of seven families are trained on scikit-learn's digits, masks are learnt and drawn.
"""

from __future__ import annotations

import io
import sys
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import networkx as nx
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models.convnext import ConvNeXt
from timm.models.densenet import DenseNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import nadhooks
from nadhooks.demo import SITES, Batches, digits
from nadhooks.formats import draw, points, scene

from .darts import Network

BATCH, CLASSES = 48, 10
STEPS = {"swin": 900, "vit": 900, "darts": 500}  # of training; others take 280
Made = tuple[Callable[[], nn.Module], list[str] | None]  # the network, and its sites
NETWORKS: dict[str, Made] = {
    "resnet": (lambda: timm.create_model("resnet18", in_chans=1, num_classes=10, channels=(32, 64, 128, 256)), SITES),
    "vgg": (lambda: _vgg(16, 16, 0, 32, 32, 0, 64, 64, 0), None),
    "densenet": (lambda: DenseNet(8, (4, 6, 6), num_classes=CLASSES, in_chans=1), ["**.denselayer?", "**.transition?"]),
    "darts": (lambda: Network(channels=6, cells=6, classes=CLASSES), ["stem?", "cells.*"]),
    "convnext": (lambda: ConvNeXt(1, CLASSES, patch_size=2, depths=(2, 2, 6, 2), dims=(24, 48, 96, 192)), None),
    "swin": (
        lambda: SwinTransformer(32, 4, 1, CLASSES, embed_dim=32, depths=(2, 2), num_heads=(2, 4), window_size=4),
        None,
    ),
    "vit": (lambda: VisionTransformer(32, 4, 1, CLASSES, embed_dim=48, depth=12, num_heads=4), None),
}


def _vgg(*widths: int) -> nn.Sequential:
    """Convolutions of these widths, a pooling layer for each 0, and a classifier."""
    layers: list[nn.Module] = []
    before = 1
    for width in widths:
        if width:
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        else:
            layers.append(nn.MaxPool2d(2))
    features = nn.Sequential(*layers)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, CLASSES))
    return nn.Sequential(OrderedDict(features=features, classifier=head))


def trained(make: Callable[[], nn.Module], steps: int, train: Batches, test: Batches) -> tuple[nn.Module, float]:
    """A network, and its accuracy on held-out digits."""
    torch.manual_seed(0)
    model = make()
    three = isinstance(model, Network)  # takes colours
    images, labels = torch.cat([x for x, _ in train]), torch.cat([y for _, y in train])
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    model.train()
    for _ in range(steps):
        chosen = torch.randint(len(images), (BATCH,))
        shifted = torch.roll(images[chosen], torch.randint(-2, 3, (2,)).tolist(), (2, 3))
        optimizer.zero_grad()
        F.cross_entropy(model(_coloured(shifted, three)), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
    model.eval()
    with torch.no_grad():
        right = sum(int((model(_coloured(x, three)).argmax(1) == y).sum()) for x, y in test)
    return model, right / sum(len(y) for _, y in test)


def _coloured(images: torch.Tensor, three: bool) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1) if three else images


def save(graph: nx.DiGraph, path: Path, width: str = "double") -> None:
    shrink(draw(scene(graph, points(width)), "png"), path)


def shrink(png: bytes, path: Path) -> None:
    """A PNG of few colours: a page of documentation is no paper."""
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(32, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"  {path}: {path.stat().st_size // 1024} KiB", flush=True)


def main(folder: Path, *names: str) -> None:
    """Draws the networks of these names, or all."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    train, test = digits()
    for name in names or NETWORKS:
        make, sites = NETWORKS[name]
        begun = time.monotonic()
        model, accuracy = trained(make, STEPS.get(name, 280), train, test)
        loader = [(_coloured(x, isinstance(model, Network)), y) for x, y in train]
        masks = nadhooks.learn(model, loader, sites, keep=0.5, method=nadhooks.methods.contrastive(steps=80))
        masks = masks.replaced(masks.values, provenance={"model": f"digits:{name}"})
        print(f"{name}: accuracy {accuracy:.3f}, {masks!r}, {time.monotonic() - begun:.0f} s", flush=True)
        save(nadhooks.flow_graph(masks, "3"), folder / f"{name}.png")
        if name == "resnet":
            more(model, masks, loader, test, folder)


def more(model: nn.Module, masks: nadhooks.Masks, loader: Batches, test: Batches, folder: Path) -> None:
    """Of one network: a single column, all classes, two classes, a page, and what units see."""
    save(nadhooks.flow_graph(masks, "3"), folder / "resnet-single.png", "single")
    save(nadhooks.flow_graph(masks), folder / "resnet-all.png")
    save(nadhooks.flow_graph(masks.select(["3", "8"])), folder / "resnet-3-8.png")
    nadhooks.render(masks, folder / "resnet.html")
    graph = nadhooks.flow_graph(masks, "3")
    last = masks.sites[-1].name
    kept = (masks.select("3")[last][0] > 0.5).nonzero().flatten().tolist()[:4]
    units = {masks.sites[2].name: [0, 1, 2, 3], last: kept}
    seen = nadhooks.what_units_see(model, graph, masks.sites, test, units=units, top=7)
    nadhooks.contact_sheet(seen, folder / "resnet-sees.png")
    shrink((folder / "resnet-sees.png").read_bytes(), folder / "resnet-sees.png")
    if hasattr(nadhooks, "unit_flow"):
        images = torch.cat([x[y == 3] for x, y in test])[:8]
        save(nadhooks.unit_flow(model, masks, "3", images), folder / "resnet-units.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
