from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from nadhooks.batching import copied, digest, forms, join, moved, nbytes, pick, pickable, singles, size

X = torch.arange(6.0).reshape(3, 2)
NAMES = ["a", "b", "c"]


class Plain:
    def __init__(self, value: int) -> None:
        self.value = value


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        (X, 3),
        ((X, X[:, 0]), 3),
        ({"x": X, "names": NAMES}, 3),
        ((NAMES,), 3),
        ((X, torch.tensor(2.0)), 3),  # a number for all samples
        ((X, 2.0), 3),
        ((X, X[:2]), None),
        ({}, None),
        (5, None),
        (torch.tensor(1.0), None),
    ],
)
def test_the_number_of_samples_is_what_all_parts_agree_in(inputs: Any, expected: int | None) -> None:
    assert size(inputs) == expected


@pytest.mark.parametrize("places", [torch.tensor([2, 0]), torch.tensor([True, False, True])])
def test_samples_are_picked_from_every_part(places: torch.Tensor) -> None:
    order = [2, 0] if places.dtype == torch.long else [0, 2]
    picked = pick({"x": X, "more": (NAMES, 7.0, torch.tensor(3.0)), "none": None}, places)
    assert picked["x"].tolist() == X[order].tolist()
    assert picked["more"] == ([NAMES[i] for i in order], 7.0, torch.tensor(3.0))
    assert picked["none"] is None


def test_parts_put_together_again_are_the_whole() -> None:
    inputs = ({"x": X}, NAMES, torch.tensor(3.0), "same", None)
    parts = singles(inputs, 3)
    assert [part[1] for part in parts] == [["a"], ["b"], ["c"]]
    joined = join(parts)
    assert torch.equal(joined[0]["x"], X)
    assert joined[1:] == (NAMES, torch.tensor(3.0), "same", None)


def test_single_samples_do_not_keep_their_batch_in_memory() -> None:
    assert [part.untyped_storage().nbytes() for part in singles(X, 3)] == [8, 8, 8]


def test_equal_samples_are_known_by_the_same_and_others_are_not() -> None:
    assert digest((X, "a")) == digest((X.clone(), "a"))
    others = [(X + 1, "a"), (X, "b"), (X.reshape(2, 3), "a")]
    assert len({digest(other) for other in [(X, "a"), *others]}) == 4
    assert digest(X.T.contiguous().T) == digest(X)  # whatever its order in memory
    long = np.zeros(2000)
    assert digest([long]) == digest([long.copy()])
    first, again, other = (Plain(value) for value in (1, 1, 2))
    assert digest([first]) == digest([again]) != digest([other])  # wherever they lie
    assert digest([long]) != digest([np.where(np.arange(2000) == 1000, 1, long)])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.bool, torch.int64, torch.float64])
def test_samples_of_every_type_are_known_again(dtype: torch.dtype) -> None:
    assert digest(X.to(dtype)) == digest(X.to(dtype))
    assert digest(X.to(dtype)) != digest((X == 0).to(dtype))
    assert digest(torch.tensor(1, dtype=dtype)) != digest(torch.tensor(0, dtype=dtype))


def test_bytes_are_those_of_all_tensors() -> None:
    assert nbytes({"x": X, "more": (X.double(), NAMES)}) == 6 * 4 + 6 * 8


def test_only_images_change_their_order_in_memory() -> None:
    images, vectors = copied((torch.zeros(2, 1, 4, 5), X), torch.channels_last)
    assert images.stride() == (20, 1, 5, 1)  # of one channel too
    assert vectors.stride() == X.stride()
    assert torch.equal(vectors, X)
    assert vectors.data_ptr() != X.data_ptr()  # a model may write into it
    assert moved([X, "a"], torch.device("cpu"))[0] is X


def test_what_has_an_entry_for_each_sample_can_be_picked_from() -> None:
    collated = {"x": X, "names": tuple(NAMES), "more": (np.arange(3), (1, 2, 3), np.array(NAMES))}
    found = pick(pickable(collated, 3), torch.tensor([2, 0]))
    assert found["names"] == ["c", "a"]
    numbers, plain, words = found["more"]
    assert numbers.tolist() == [2, 0]
    assert plain == [3, 1]
    assert words == ["c", "a"]
    assert pickable((X, X, X), 3) == (X, X, X)  # three parts, and not three samples
    assert pickable(NAMES, 3) is NAMES


def test_the_form_of_samples_is_their_shapes_however_many_there_are() -> None:
    wide, tall = torch.zeros(3, 4, 5), torch.zeros(3, 5, 4)
    assert forms(X) == forms(X[:1]) != forms(X[:, :1])
    assert forms((X, wide[None])) == forms((X[:2], wide[None])) != forms((X, tall[None]))
    assert forms(([wide, wide],)) == forms(([wide],)) != forms(([wide, tall],))
    assert forms(({"x": X, "n": ["a"]},)) == forms(({"x": X[:2], "n": ["b", "c"]},))
    assert forms(5) == ()
