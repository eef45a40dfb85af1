"""Checkpoints of the NAD authors' code (github hujiecpp/NAD, findpath.py): a folder for each class, a file an epoch.

Such a file, CLASS/net_iterEPOCH.pth, is a pickled {"mask.0": logits (1, channels, 1, 1), "mask.1": …}, in the order in
which the masked layers fire. It is read with weights_only, so that no code in it can run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import MaskFileError

Logits = list[Tensor]  # (channels,) of each layer, in the order of firing


def read(folder: Path, epoch: int | None = None) -> dict[int, Logits]:
    """The logits of each class at one epoch, by default its last. Raises MaskFileError."""
    if not folder.is_dir():
        raise MaskFileError(f"{folder}: expected a folder with a folder for each class")
    found = [path for path in sorted(folder.iterdir()) if path.is_dir() and re.fullmatch("[0-9]+", path.name)]
    classes = {int(path.name): path for path in found}
    if twice := [path for path in found if classes[int(path.name)] != path]:
        raise MaskFileError(f"{folder}: {twice[0].name} and {classes[int(twice[0].name)].name} are one class")
    if not classes:
        raise MaskFileError(
            f"{folder}: expected folders named by class numbers (000, 001, …), found none; "
            "give the folder of one data set and network, such as checkpoint/imagenet/resnet50"
        )
    return {label: _logits(_checkpoint(classes[label], epoch)) for label in sorted(classes)}


def by_site(classes: Mapping[int, Logits], sites: Sequence[tuple[str, int]]) -> dict[str, Tensor]:
    """{site: (classes, units) gates σ(logit)}; sites are (name, units) in firing order. Raises MaskFileError."""
    for label, layers in classes.items():
        theirs, ours = [len(layer) for layer in layers], [units for _, units in sites]
        if theirs != ours:
            at = next(
                (i for i, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b), min(len(theirs), len(ours))
            )
            raise MaskFileError(
                f"class {label}: its {len(theirs)} layers have {_few(theirs)} units, the {len(ours)} chosen sites "
                f"{_few(ours)}; they differ from number {at} on. Choose the sites that were masked: for ResNet50, "
                "--sites maxpool 'layer?.*'"
            )
    return {
        name: torch.stack([layers[index].sigmoid() for layers in classes.values()])
        for index, (name, _) in enumerate(sites)
    }


def _checkpoint(folder: Path, epoch: int | None) -> Path:
    found = {}
    for path in folder.glob("net_iter*.pth"):
        number = re.fullmatch(r"net_iter([0-9]+)\.pth", path.name)
        if number:
            found[int(number[1])] = path
    if not found or (epoch is not None and epoch not in found):
        wanted = "net_iterEPOCH.pth" if epoch is None else f"net_iter{epoch:03d}.pth"
        raise MaskFileError(f"{folder}: expected {wanted}, found epochs {sorted(found) or 'none'}")
    return found[max(found) if epoch is None else epoch]


def _logits(path: Path) -> Logits:
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, if it is damaged
        why = (str(error).splitlines() or [type(error).__name__])[0]
        raise MaskFileError(f"{path}: not a checkpoint that can be read safely ({why})") from error
    if not isinstance(saved, dict) or not saved or set(saved) != {f"mask.{index}" for index in range(len(saved))}:
        raise MaskFileError(f"{path}: expected tensors mask.0, mask.1, …, as the authors' save_masks writes them")
    logits = [saved[f"mask.{index}"] for index in range(len(saved))]
    for index, layer in enumerate(logits):
        plain = isinstance(layer, Tensor) and layer.layout == torch.strided and not layer.is_meta
        if not plain or not layer.is_floating_point() or layer.isnan().any():
            raise MaskFileError(f"{path}: mask.{index} is not a tensor of logits")
        if layer.dim() != 4 or layer.shape[1] != layer.numel():
            raise MaskFileError(f"{path}: expected mask.{index} of shape (1, channels, 1, 1), got {tuple(layer.shape)}")
    return [layer.detach().float().flatten() for layer in logits]


def _few(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers[:6])) + (", …" if len(numbers) > 6 else "")
