from __future__ import annotations

import gzip
import struct
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_tensor

from nadhooks import data
from nadhooks.errors import DataError


def idx(array: Tensor) -> bytes:
    """The idx format of Fashion-MNIST: type, number of dimensions, sizes, bytes."""
    return struct.pack(f">BBBB{array.dim()}I", 0, 0, 8, array.dim(), *array.shape) + array.numpy().tobytes()


def fashion(folder: Path) -> None:
    for prefix, number in (("train", 20), ("t10k", 10)):
        pixels = torch.arange(number * 28 * 28).reshape(number, 28, 28).to(torch.uint8)
        labels = (torch.arange(number) % 10).to(torch.uint8)
        (folder / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(pixels)))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels)))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NADHOOKS_CACHE", str(tmp_path / "cache"))


def test_digits_are_split_four_to_one() -> None:
    train, test = (data.load_images("digits", split, to_tensor) for split in ("train", "test"))
    assert (len(train.dataset), len(test.dataset)) == (1437, 360)  # type: ignore[arg-type]
    image, label = train.dataset[0]
    assert image.shape == (1, 8, 8)
    assert float(torch.stack([train.dataset[i][0] for i in range(50)]).max()) == 1
    assert train.names[label] == str(label)


def test_fashion_mnist_is_read_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fashion(tmp_path)
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path)
    train = data.load_images("fashion-mnist", "train", to_tensor)
    assert len(train.dataset) == 20  # type: ignore[arg-type]
    assert train.dataset[3][0].shape == (1, 28, 28)
    assert train.dataset[13][1] == 3
    assert train.names[9] == "Ankle boot"
    assert len(data.load_images("fashion-mnist", "test", to_tensor).dataset) == 10  # type: ignore[arg-type]


def test_some_images_of_each_label_are_spread_over_all_of_it() -> None:
    test = data.load_images("digits", "test", to_tensor)
    few = test.few(3)
    assert sorted(few.labels) == sorted([*range(10)] * 3)
    fours = test.of(4)
    chosen = [fours[0], fours[len(fours) // 3], fours[2 * len(fours) // 3]]
    assert few.labels == [label for _, label in few.dataset]  # type: ignore[attr-defined]
    shown = [image for image, label in few.dataset if label == 4]  # type: ignore[attr-defined]
    assert all(torch.equal(image, test.dataset[place][0]) for image, place in zip(shown, chosen, strict=True))
    assert len(test.few(1000)) == len(test) == 360


def test_without_fashion_mnist_the_cures_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from torchvision.datasets import FashionMNIST

    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path / "none")
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    mine = data.cache_dir() / "FashionMNIST" / "raw" / "t10k-labels-idx1-ubyte"
    mine.parent.mkdir(parents=True)
    mine.write_bytes(b"one of four")
    for _ in range(2):
        with pytest.raises(DataError, match="dataset-fashion-mnist, or put the four idx files into"):
            data.load_images("fashion-mnist", "train", to_tensor)
    assert mine.read_bytes() == b"one of four"


def test_fashion_mnist_is_completed_from_debians_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process finds it that comes while another is unpacking, or after one that could not download."""
    fashion(tmp_path)
    raw = data.cache_dir() / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-labels-idx1-ubyte").write_bytes(idx((torch.arange(20) % 5).to(torch.uint8)))
    monkeypatch.setattr(data, "DEBIAN_FASHION", tmp_path)
    train = data.load_images("fashion-mnist", "train", to_tensor)
    assert train.labels == [place % 5 for place in range(20)]


def folders(root: Path, *names: str, images: int = 5) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        for number in range(images):
            Image.new("L", (4, 4), number).save(root / name / f"{number}.png")
    return root


def test_folders_are_labelled_by_name_number_or_order(tmp_path: Path) -> None:
    def names(root: Path, known: dict[str, int] | None = None) -> dict[int, str]:
        return data.load_images(str(root), "train", to_tensor, known).names

    assert names(folders(tmp_path / "a", "cat", "dog")) == {0: "cat", 1: "dog"}
    assert names(tmp_path / "a", {"dog": 7, "cat": 3, "cow": 4}) == {3: "cat", 7: "dog"}
    assert names(folders(tmp_path / "b", "10", "2")) == {10: "10", 2: "2"}


def test_folders_are_split_by_subfolder_or_four_to_one(tmp_path: Path) -> None:
    root = folders(tmp_path / "a", "cat", "dog")
    sizes = [len(data.load_images(str(root), split, to_tensor).dataset) for split in ("train", "test")]  # type: ignore[arg-type]
    assert sizes == [8, 2]
    folders(tmp_path / "b" / "train", "cat", images=3)
    folders(tmp_path / "b" / "val", "cat", images=2)
    sizes = [len(data.load_images(str(tmp_path / "b"), split, to_tensor).dataset) for split in ("train", "test")]  # type: ignore[arg-type]
    assert sizes == [3, 2]


def test_held_out_folders_have_the_labels_of_the_training_folders(tmp_path: Path) -> None:
    folders(tmp_path / "train", "cat", "dog", "eel")
    folders(tmp_path / "val", "dog", "eel")
    assert data.load_images(str(tmp_path), "test", to_tensor).names == {1: "dog", 2: "eel"}
    folders(tmp_path / "val", "ant")
    with pytest.raises(DataError, match="the folder 'ant' has no counterpart in"):
        data.load_images(str(tmp_path), "test", to_tensor)


def test_two_folders_of_one_label_are_named(tmp_path: Path) -> None:
    folders(tmp_path / "a", "1", "01", "2")
    with pytest.raises(DataError, match="the folders '01' and '1' both mean label 1; rename one"):
        data.load_images(str(tmp_path / "a"), "train", to_tensor)
    folders(tmp_path / "b", "tench", "n01440764")
    with pytest.raises(DataError, match="the folders 'n01440764' and 'tench' both mean label 0"):
        data.load_images(str(tmp_path / "b"), "train", to_tensor, {"tench": 0, "n01440764": 0})


def test_only_decimal_numbers_are_labels(tmp_path: Path) -> None:
    assert data.load_images(str(folders(tmp_path, "3", "²")), "train", to_tensor).names == {0: "3", 1: "²"}


def test_folders_that_are_no_class_of_the_model_are_named_where_others_are(tmp_path: Path) -> None:
    folders(tmp_path, "tench", "goldfisch", "eel")
    with pytest.raises(DataError, match="'tench' is a class of the model, but not 'eel', 'goldfisch'; name all"):
        data.load_images(str(tmp_path), "train", to_tensor, {"tench": 0, "goldfish": 1})


def test_splits_that_are_missing_are_named(tmp_path: Path) -> None:
    folders(tmp_path / "a" / "val", "cat")
    with pytest.raises(DataError, match="expected a folder train beside val, got none"):
        data.load_images(str(tmp_path / "a"), "train", to_tensor)
    folders(tmp_path / "b" / "train", "cat")
    assert data.load_images(str(tmp_path / "b"), "train", to_tensor).names == {0: "cat"}
    with pytest.raises(DataError, match=r"expected a folder val or test beside train, .*; add one, or pass --no-test"):
        data.load_images(str(tmp_path / "b"), "test", to_tensor)


def test_names_are_those_of_labels_that_have_images_in_the_split(tmp_path: Path) -> None:
    folders(folders(tmp_path, "ant", images=6), "bee", images=3)
    assert data.load_images(str(tmp_path), "train", to_tensor).names == {0: "ant", 1: "bee"}
    assert data.load_images(str(tmp_path), "test", to_tensor).names == {0: "ant"}


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_images_of_16_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a").mkdir()
    pixels = torch.tensor([[0, 257 * 10, 257 * 200, 65535]], dtype=torch.uint16).numpy()
    if suffix == "pgm":
        (tmp_path / "a" / "0.pgm").write_bytes(b"P5 4 1 65535\n" + pixels.astype(">u2").tobytes())
    else:
        Image.fromarray(pixels).save(tmp_path / "a" / f"0.{suffix}")
    image, _ = data.load_images(str(tmp_path), "test", to_tensor).dataset[0]
    assert (image[0] * 255).round().tolist() == [[0, 10, 200, 255]]


def test_images_of_an_unknown_range_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("F", (4, 4), 0.5).save(tmp_path / "a" / "0.tiff")
    with pytest.raises(DataError, match=r"a/0.tiff: .* floating-point numbers of an unknown range"):
        data.load_images(str(tmp_path), "test", to_tensor).dataset[0]


def test_one_image_is_too_few_to_learn_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected images to learn from beside every fifth, which is held out; got 1"):
        data.load_images(str(folders(tmp_path, "a", images=1)), "train", to_tensor)


@pytest.mark.parametrize("damage", [b"", b"text", b"half"])
def test_damaged_images_are_named(tmp_path: Path, damage: bytes) -> None:
    path = folders(tmp_path, "a", images=1) / "a" / "0.png"
    Image.effect_noise((64, 64), 9).save(path)
    path.write_bytes(path.read_bytes()[:2000] if damage == b"half" else damage)
    with pytest.raises(DataError, match=r"a/0.png: expected an image, got a damaged file or none"):
        data.load_images(str(tmp_path), "test", to_tensor).dataset[0]


def test_labels_of_folders_are_the_models_outputs(tmp_path: Path) -> None:
    root = folders(tmp_path / "a", "cat", "dog")
    images = data.load_images(str(root), "train", to_tensor, {"cat": 281, "dog": 5}).dataset
    assert {images[i][1] for i in range(8)} == {281, 5}


def test_other_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a directory of images or one of digits, fashion-mnist, got 'mnist'"):
        data.load_images("mnist", "train", to_tensor)
    with pytest.raises(DataError, match="expected one folder of images per class"):
        data.load_images(str(tmp_path), "train", to_tensor)
    folders(tmp_path / "c", "empty", images=0)
    with pytest.raises(DataError, match="expected one folder of images per class"):
        data.load_images(str(tmp_path / "c"), "train", to_tensor)


def test_the_cache_is_where_the_user_wants_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert data.cache_dir() == tmp_path / "cache"
    monkeypatch.delenv("NADHOOKS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert data.cache_dir() == Path("/x/nadhooks")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert data.cache_dir() == Path.home() / ".cache" / "nadhooks"
