"""Data sets by name or directory, with labels that are the model's own output indices."""

from __future__ import annotations

import gzip
import os
from collections.abc import Callable, Sequence
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
    """A data set of (image, label), the names of its labels, {label: name}, and the label of each image."""

    dataset: Dataset[tuple[Tensor, int]]
    names: dict[int, str]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.labels)

    def of(self, label: object) -> list[int]:
        """Where the images of a label are; none of them is opened for that."""
        return [place for place, each in enumerate(self.labels) if each == label]

    def at(self, places: Sequence[int]) -> Images:
        """Some of the images."""
        return Images(Subset(self.dataset, places), self.names, [self.labels[place] for place in places])

    def few(self, number: int) -> Images:
        """So many images of each label, spread evenly over them, or all where there are no more."""
        of_label: dict[int, list[int]] = {}
        for place, label in enumerate(self.labels):
            of_label.setdefault(label, []).append(place)
        chosen: list[int] = []
        for places in of_label.values():
            some = min(number, len(places))
            chosen += [places[index * len(places) // some] for index in range(some)]
        return self.at(sorted(chosen))


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
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype("uint8")
    chosen = [index for index in range(len(images)) if (index % 5 == 0) == (split == "test")]
    labels = digits.target[chosen]
    return Images(_Arrays(images[chosen], labels, transform), {d: str(d) for d in range(10)}, labels.tolist())


def _fashion(split: Split, transform: Transform) -> Images:
    """Fashion-MNIST (Xiao et al., 2017), read by torchvision from the cache, Debian's package, or the network."""
    from torchvision.datasets import FashionMNIST

    root = cache_dir()
    raw = root / "FashionMNIST" / "raw"
    for packed in DEBIAN_FASHION.glob("*.gz"):
        if not (raw / packed.stem).is_file():  # another process may be at it too
            raw.mkdir(parents=True, exist_ok=True)
            with gzip.open(packed) as file:
                write_bytes(raw / packed.stem, file.read())
    try:
        dataset = FashionMNIST(str(root), train=split == "train", transform=transform, download=True)
    except Exception as error:  # downloads fail in many ways
        raise DataError(
            f"Fashion-MNIST is neither in {root} nor can it be downloaded ({error}); "
            "install Debian's dataset-fashion-mnist, or put the four idx files into " + str(raw)
        ) from error
    return Images(dataset, dict(enumerate(dataset.classes)), dataset.targets.tolist())


def _folder(root: Path, split: Split, transform: Transform, class_index: dict[str, int]) -> Images:
    from torchvision.datasets import ImageFolder

    if not root.is_dir():
        raise DataError(f"expected a directory of images or one of {', '.join(BUILT_IN)}, got {str(root)!r}")
    part = _part(root, split)
    try:
        folder = ImageFolder(str(part), transform, loader=_open_image)
        # held-out folders mean what the training folders of that name do
        trained = folder.classes if part == root else folder.find_classes(str(root / "train"))[0]
    except FileNotFoundError as error:
        raise DataError(f"{root}: expected one folder of images per class (ImageFolder): {error}") from error
    known = _folder_labels(root, trained, class_index)
    strange = [name for name in folder.classes if name not in known]
    if strange:
        raise DataError(f"{part}: the folder {strange[0]!r} has no counterpart in {root / 'train'}")
    labels = [known[name] for name in folder.classes]
    folder.target_transform = labels.__getitem__
    of_image = [labels[target] for target in folder.targets]
    if part != root:
        return Images(folder, dict(zip(labels, folder.classes, strict=True)), of_image)
    chosen = [index for index in range(len(folder)) if (index % 5 == 0) == (split == "test")]
    if not chosen:
        raise DataError(
            f"{root}: expected images to learn from beside every fifth, which is held out; got {len(folder)}"
        )
    shown = sorted({folder.targets[index] for index in chosen})  # a small class may be missing from a split
    names = {labels[index]: folder.classes[index] for index in shown}
    return Images(Subset(folder, chosen), names, [of_image[index] for index in chosen])


def _part(root: Path, split: Split) -> Path:
    """The folder of that split, or `root` itself where there are no splits."""
    splits = [name for name in ("train", "val", "test") if (root / name).is_dir()]
    if splits and "train" not in splits:
        raise DataError(f"{root}: expected a folder train beside {splits[0]}, got none")
    if splits == ["train"] and split == "test":
        raise DataError(
            f"{root}: expected a folder val or test beside train, to measure on, got none; add one, or pass --no-test"
        )
    return root / splits[0 if split == "train" else 1] if splits else root


def _folder_labels(root: Path, folders: list[str], class_index: dict[str, int]) -> dict[str, int]:
    """{folder: output index} by known class name or WordNet id, by number, or else in alphabetical order."""
    known = [name for name in folders if name in class_index]
    unknown = [name for name in folders if name not in class_index]
    if known and unknown:
        few = ", ".join(map(repr, unknown[:5])) + (", …" if len(unknown) > 5 else "")
        raise DataError(
            f"{root}: {known[0]!r} is a class of the model, but not {few}; name all folders by class or WordNet id"
        )
    if known:
        labels = {name: class_index[name] for name in folders}
    elif all(name.isdecimal() for name in folders):
        labels = {name: int(name) for name in folders}
    else:
        labels = {name: label for label, name in enumerate(folders)}
    folder_of: dict[int, str] = {}
    for name, label in labels.items():
        if folder_of.setdefault(label, name) != name:
            raise DataError(
                f"{root}: the folders {folder_of[label]!r} and {name!r} both mean label {label}; rename one"
            )
    return labels


def _open_image(path: str) -> Any:
    """An image in colour. Raises DataError that names the file."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            if image.mode == "F":
                raise ValueError("its values are floating-point numbers of an unknown range; save it with 8 or 16 bits")
            if image.mode.startswith("I"):  # 16 bits: without scaling, all above 255 would be white
                return image.convert("I").point(lambda value: value * (1 / 257)).convert("RGB")
            return image.convert("RGB")
    except Exception as error:  # broken images raise many kinds
        raise DataError(f"{path}: expected an image, got a damaged file or none: {error}") from error
