"""The demo: a small timm network on scikit-learn's digits, its masks, their worth and their pictures."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import zoo
from .data import cache_dir, load_images
from .flow import flow_graph
from .formats.drawing import settings
from .formats.writing import write_bytes
from .masks import Masks
from .rendering import render

MODEL = "timm:resnet18,in_chans=1,num_classes=10,channels=(32,64,128,256)"
SITES = ["maxpool", "layer?.*"]  # the stem and the eight blocks
SIZE = 32  # the 8 x 8 digits are enlarged, or the network would pool them away
EPOCHS = 12

Batches = list[tuple[Tensor, Tensor]]


def digits(batch: int = 128) -> tuple[Batches, Batches]:
    """Training and held-out digits as (images (batch, 1, 32, 32), labels (batch,)) batches in memory."""
    model = zoo.load_model(MODEL)
    zoo.set_image_size(model, SIZE)
    transform = zoo.transform_for(model)
    train, test = (load_images("digits", split, transform).dataset for split in ("train", "test"))
    return list(DataLoader(train, batch)), list(DataLoader(test, batch))


def trained_model(train: Batches, seed: int, progress: Callable[[int, int], None]) -> nn.Module:
    """The network, trained once for each seed and kept in the cache directory."""
    model = zoo.load_model(MODEL)
    kept = cache_dir() / f"demo-digits-{seed}.safetensors"
    if kept.is_file():
        zoo.load_weights(model, str(kept))
        return model.eval()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = zoo.load_model(MODEL)
        _train(model, train, progress)
    kept.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(kept, safetensors.torch.save(model.state_dict()))
    return model.eval()


def _train(model: nn.Module, train: Batches, progress: Callable[[int, int], None]) -> None:
    images, labels = (torch.cat(parts) for parts in zip(*train, strict=True))
    steps = EPOCHS * (len(images) // 64)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    model.train()
    for step in range(steps):
        place = step % (len(images) // 64)
        if place == 0:
            order = torch.randperm(len(images))
        chosen = order[64 * place : 64 * (place + 1)]
        shift = torch.randint(-3, 4, (2,)).tolist()
        shifted = torch.roll(images[chosen], shift, (2, 3))  # up to 3 pixels: digits are not all in the middle
        optimizer.zero_grad()
        F.cross_entropy(model(shifted), labels[chosen]).backward()
        optimizer.step()
        schedule.step()
        progress(step + 1, steps)


def write_results(folder: Path, masks: Masks) -> list[Path]:
    """Everything that the demo leaves: masks, a page, a picture per class and one of all, and the similarity matrix."""
    folder.mkdir(parents=True, exist_ok=True)
    masks.save(folder / "masks.safetensors")
    render(masks, folder / "flow.html")
    written = [folder / "masks.safetensors", folder / "flow.html"]
    for name in masks.tasks:
        written.append(folder / f"flow-{quote(name, safe='')}.svg")  # names of classes may hold a slash
        render(flow_graph(masks, name), written[-1])
    written.append(folder / "flow-all.svg")
    render(flow_graph(masks), written[-1])
    similarity = masks.jaccard()
    table = io.StringIO()
    lines = csv.writer(table, lineterminator="\n")
    lines.writerow(["task", *masks.tasks])
    for name, row in zip(masks.tasks, similarity.tolist(), strict=True):
        lines.writerow([name, *(f"{value:.4f}" for value in row)])
    written.append(folder / "similarity.csv")
    write_bytes(written[-1], table.getvalue().encode())
    written.append(folder / "similarity.svg")
    write_bytes(written[-1], similarity_picture(similarity, masks.tasks))
    return written


def similarity_picture(similarity: Tensor, names: Sequence[str]) -> bytes:
    """(tasks, tasks) similarities as an SVG heat map with numbers."""
    from matplotlib.figure import Figure

    with settings(**{"svg.hashsalt": "nadhooks", "svg.fonttype": "none"}):  # the same matrix gives the same bytes
        figure = Figure(figsize=(0.45 * len(names), 0.45 * len(names)))
        axes = figure.add_axes((0, 0, 1, 1))  # names and title lie outside, and the picture grows to hold them
        others = similarity[~torch.eye(len(names), dtype=torch.bool)] if len(names) > 1 else similarity
        low, high = float(others.min()) - 0.02, float(others.max()) + 0.02
        axes.imshow(similarity.numpy(), cmap="Blues", vmin=low, vmax=high)
        slanted: dict[str, Any] = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"}
        axes.set_xticks(range(len(names)), names, **(slanted if max(map(len, names)) > 3 else {}))
        axes.set_yticks(range(len(names)), names)
        axes.set_title("Jaccard similarity of the\nunits kept, mean over sites", fontsize=9)
        for i, row in enumerate(similarity.tolist()):
            for j, value in enumerate(row):
                dark = value > 0.4 * low + 0.6 * high
                axes.text(
                    j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if dark else "black"
                )
        data = io.BytesIO()
        figure.savefig(data, format="svg", bbox_inches="tight", metadata={"Date": None})
        return data.getvalue()
