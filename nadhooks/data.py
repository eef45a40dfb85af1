"""Data sets by name or directory, with labels that are the model's own output indices."""

from __future__ import annotations

import gzip
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor
from torch.utils.data import Dataset, Subset

from .errors import DataError
from .formats.writing import write_bytes

Split = Literal["train", "test"]
Transform = Callable[[Any], Tensor]

BUILT_IN = ("digits", "fashion-mnist")
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # the Debian package dataset-fashion-mnist


@dataclass(frozen=True)
class Images:
    """A data set of (image, label) and the names of its labels, {label: name}."""

    dataset: Dataset[tuple[Tensor, int]]
    names: dict[int, str]


def load_images(source: str, split: Split, transform: Transform, class_index: dict[str, int] | None = None) -> Images:
    """`digits`, `fashion-mnist`, or an ImageFolder directory (with `train` and `val` or `test` in it, or without).

    class_index: {folder name: output index} where folders are named after a known data set's classes.
    A folder without splits is split four to one, the same way each time. Raises DataError.
    """
    if source == "digits":
        return _digits(split, transform)
    if source == "fashion-mnist":
        return _fashion(split, transform)
    return _folder(Path(source), split, transform, class_index or {})


def cache_dir() -> Path:
    """Where nadhooks keeps what it made once: $NADHOOKS_CACHE, $XDG_CACHE_HOME/nadhooks or ~/.cache/nadhooks."""
    own, shared = os.environ.get("NADHOOKS_CACHE"), os.environ.get("XDG_CACHE_HOME")
    return Path(own) if own else (Path(shared) if shared else Path.home() / ".cache") / "nadhooks"


class _Arrays(Dataset[tuple[Tensor, int]]):
    """Grey images in memory, (number, height, width) uint8, and their labels."""

    def __init__(self, images: Any, labels: Any, transform: Transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        from PIL import Image

        return self.transform(Image.fromarray(self.images[index])), int(self.labels[index])


def _digits(split: Split, transform: Transform) -> Images:
    """scikit-learn's 1,797 digits of 8 x 8 pixels (UCI, 1998), every fifth held out."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError("the data set 'digits' comes with scikit-learn; pip install 'nadhooks[demo]'") from error
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype("uint8")
    chosen = [index for index in range(len(images)) if (index % 5 == 0) == (split == "test")]
    return Images(_Arrays(images[chosen], digits.target[chosen], transform), {d: str(d) for d in range(10)})


def _fashion(split: Split, transform: Transform) -> Images:
    """Fashion-MNIST (Xiao et al., 2017), read by torchvision from the cache, Debian's package, or the network."""
    from torchvision.datasets import FashionMNIST

    root = cache_dir()
    raw = root / "FashionMNIST" / "raw"
    if not raw.is_dir() and DEBIAN_FASHION.is_dir():
        raw.mkdir(parents=True)
        for packed in DEBIAN_FASHION.glob("*.gz"):
            with gzip.open(packed) as file:
                write_bytes(raw / packed.stem, file.read())
    try:
        dataset = FashionMNIST(str(root), train=split == "train", transform=transform, download=True)
    except Exception as error:  # downloads fail in many ways
        shutil.rmtree(raw, ignore_errors=True)
        raise DataError(
            f"Fashion-MNIST is neither in {root} nor can it be downloaded ({error}); "
            "install Debian's dataset-fashion-mnist, or put the four idx files into " + str(raw)
        ) from error
    return Images(dataset, dict(enumerate(dataset.classes)))


def _folder(root: Path, split: Split, transform: Transform, class_index: dict[str, int]) -> Images:
    from torchvision.datasets import ImageFolder

    if not root.is_dir():
        raise DataError(f"expected a directory of images or one of {', '.join(BUILT_IN)}, got {str(root)!r}")
    parts = {"train": ("train",), "test": ("val", "test")}
    found = [root / name for name in parts[split] if (root / name).is_dir()]
    try:
        folder = ImageFolder(str(found[0] if found else root), transform)
    except FileNotFoundError as error:
        raise DataError(f"{root}: expected one folder of images per class (ImageFolder): {error}") from error
    trained = folder.classes
    if found and (root / "train").is_dir():  # held-out folders mean what the training folders of that name do
        trained = sorted(part.name for part in (root / "train").iterdir() if part.is_dir())
    known = dict(zip(trained, _folder_labels(trained, class_index), strict=True))
    strange = [name for name in folder.classes if name not in known]
    if strange:
        raise DataError(f"{found[0]}: the folder {strange[0]!r} has no counterpart in {root / 'train'}")
    labels = [known[name] for name in folder.classes]
    folder.target_transform = labels.__getitem__
    names = dict(zip(labels, folder.classes, strict=True))
    if found:
        return Images(folder, names)
    chosen = [index for index in range(len(folder)) if (index % 5 == 0) == (split == "test")]
    return Images(Subset(folder, chosen), names)


def _folder_labels(folders: list[str], class_index: dict[str, int]) -> list[int]:
    """Output indices of folders: their known class names or WordNet ids, numbers, or else their alphabetical order."""
    if class_index and all(name in class_index for name in folders):
        return [class_index[name] for name in folders]
    if all(name.isdigit() for name in folders):
        return [int(name) for name in folders]
    return list(range(len(folders)))
