from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path

import networkx as nx
import pytest
import safetensors.torch
import torch

import nadhooks
from nadhooks.errors import MaskFileError, SiteError, TaskError
from nadhooks.formats import mask_file
from nadhooks.formats.writing import write_bytes
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import Tasks

SITES = (Site("a", 1, 4, "a"), Site("b@input", 2, 2, "b", "input", None, 8))


def wiring() -> nx.DiGraph:
    return nx.freeze(nx.DiGraph([("input", "a"), ("a", "b@input"), ("b@input", "output")]))


def masks(a: list[list[float]], b: list[list[float]], **more: object) -> Masks:
    values = {"a": torch.tensor(a), "b@input": torch.tensor(b)}
    return Masks(SITES, values, Tasks.of({index: f"t{index}" for index in range(len(a))}), wiring(), **more)  # type: ignore[arg-type]


THREE = masks([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]], [[1, 0], [0, 0], [0, 0]])


def test_kept_is_the_share_of_units_above_a_half() -> None:
    torch.testing.assert_close(THREE.kept(), torch.tensor([3 / 6, 2 / 6, 0]))
    assert masks([[0.5, 0.6, 0.4, 1]], [[0, 0]]).kept().tolist() == pytest.approx([2 / 6])


def test_jaccard_is_the_mean_over_sites_and_empty_sets_are_equal() -> None:
    # a: {0,1} and {0,2} share one of three; b: {0} and {} share nothing; {} and {} are the same
    expected = [
        [1, (1 / 3 + 0) / 2, 0],
        [(1 / 3 + 0) / 2, 1, (0 + 1) / 2],
        [0, (0 + 1) / 2, 1],
    ]
    assert not THREE.jaccard().isnan().any()
    torch.testing.assert_close(THREE.jaccard(), torch.tensor(expected, dtype=torch.float64))


def test_jaccard_agrees_with_pairs_counted_one_by_one() -> None:
    random = torch.Generator().manual_seed(0)
    many = masks(torch.rand(7, 4, generator=random).tolist(), torch.rand(7, 2, generator=random).tolist())
    for i in range(7):
        for j in range(7):
            parts = []
            for site in SITES:
                a, b = (set((many[site.name][k] > 0.5).nonzero()[:, 0].tolist()) for k in (i, j))
                parts.append(len(a & b) / len(a | b) if a | b else 1.0)
            assert float(many.jaccard()[i, j]) == pytest.approx(sum(parts) / 2)


def test_hard_and_select_and_sets() -> None:
    soft = masks([[0.2, 0.8, 0.5, 0.51]], [[1, 0]])
    assert soft.hard()["a"].tolist() == [[0, 1, 0, 1]]
    assert soft.hard(0.1)["a"].tolist() == [[1, 1, 1, 1]]
    assert THREE & THREE.select(["t2", "t1", "t0"]) == THREE  # tasks meet by label, not by row
    with pytest.raises(TaskError, match="unknown task 0"):
        THREE.select(["t0", "t1"]) & THREE.select(["t1", "t2"])
    with pytest.raises(SiteError, match="closed units put out 'zero', got 'mean'"):
        THREE & masks([[0, 0, 0, 0]], [[0, 0]], closed="mean", means={"a": torch.zeros(4), "b@input": torch.zeros(2)})
    chosen = THREE.select(["t1", 0])
    assert chosen.tasks == ("t1", "t0")
    assert chosen.labels == (1, 0)
    assert torch.equal(chosen["a"], THREE["a"][[1, 0]])
    assert THREE.select("t2").tasks == THREE.select(2).tasks == ("t2",)
    both, either, only = (op(THREE, THREE.select("t0"))["a"] for op in (Masks.__and__, Masks.__or__, Masks.__sub__))
    assert both.tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert either.tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 0, 0]]
    assert only.tolist() == [[0, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]


def test_wrong_values_are_refused() -> None:
    with pytest.raises(SiteError, match=r"a: expected mask values in \[0, 1\]"):
        masks([[float("nan"), 0, 0, 0]], [[0, 0]])
    with pytest.raises(SiteError, match=r"a: expected a mask of shape \(1, 4\), got shape \(1, 3\)"):
        masks([[0, 0, 0]], [[0, 0]])
    with pytest.raises(SiteError, match="needs the units' means"):
        masks([[0, 0, 0, 0]], [[0, 0]], closed="mean")
    with pytest.raises(SiteError, match="no site 'c': the sites are a, b@input"):
        THREE["c"]
    with pytest.raises(TaskError, match=r"unknown task 't9'"):
        THREE.select("t9")
    with pytest.raises(TaskError, match="at least one task"):
        THREE.select([])
    with pytest.raises(TaskError, match="every task name once, got 'x'"):
        Tasks.of({0: "x", 1: "x"})


def test_masks_are_read_only_and_copy() -> None:
    with pytest.raises(TypeError):
        THREE.values["a"] = torch.zeros(3, 4)  # type: ignore[index]
    with pytest.raises(AttributeError):
        THREE.closed = "mean"  # type: ignore[misc]
    assert copy.deepcopy(THREE) == pickle.loads(pickle.dumps(THREE)) == THREE


def test_files_give_back_what_was_saved(tmp_path: Path) -> None:
    means = {"a": torch.randn(4), "b@input": torch.randn(2)}
    soft = masks([[0.25, 0.5, 1, 0]], [[1, 0]], closed="mean", means=means, provenance={"method": "x", "n": [1, 2]})
    for each in (soft, THREE):
        each.save(tmp_path / "m.safetensors")
        again = nadhooks.load(tmp_path / "m.safetensors")
        assert again == each
        assert dict(again.provenance) == dict(each.provenance)
        assert list(again.wiring.edges(data=True)) == list(each.wiring.edges(data=True))
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_files_are_safetensors_with_one_json_key_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    data = mask_file.to_bytes(*THREE.to_parts())
    assert data == mask_file.to_bytes(*copy.deepcopy(THREE).to_parts())
    assert mask_file.to_bytes(*mask_file.from_bytes(data)) == data
    (tmp_path / "m").write_bytes(data)
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        assert list(file.metadata()) == ["nadhooks"]
        assert json.loads(file.metadata()["nadhooks"])["tasks"][1] == {"label": 1, "name": "t1"}
        assert file.get_tensor("mask/a").dtype == torch.bool  # hard masks take a byte per unit


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = mask_file.to_bytes(*THREE.to_parts())
    path = tmp_path / "m.safetensors"
    cases = {
        b"": "safetensors",
        b"hello": "safetensors",
        whole[:-3]: "safetensors",
        whole[: len(whole) // 2]: "safetensors",
        safetensors.torch.save({"a": torch.zeros(2)}): "metadata key 'nadhooks'",
        safetensors.torch.save({"a": torch.zeros(2)}, {"nadhooks": "{"}): "expected JSON",
        safetensors.torch.save({"a": torch.zeros(2)}, {"nadhooks": "[]"}): "a JSON object",
        safetensors.torch.save({"a": torch.zeros(2)}, {"nadhooks": "{}"}): "expected mask file format 1, got None",
        safetensors.torch.save({"a": torch.zeros(2)}, {"nadhooks": '{"format": 99}'}): "format 1, got 99; a newer",
        safetensors.torch.save({"a": torch.zeros(2)}, {"nadhooks": '{"format": 1}'}): "not a valid mask file: KeyError",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(MaskFileError, match=message):
            nadhooks.load(path)
    with pytest.raises(MaskFileError, match="No such file"):
        nadhooks.load(tmp_path / "missing")
    with pytest.raises(MaskFileError, match="directory"):
        nadhooks.load(tmp_path)
    with pytest.raises(MaskFileError, match="expected the path of a mask file, got None"):
        nadhooks.load(None)  # type: ignore[arg-type]


def test_headers_that_contradict_themselves_are_refused() -> None:
    def changed(**changes: object) -> None:
        header, tensors = THREE.to_parts()
        with pytest.raises(MaskFileError):
            Masks.from_parts({**header, **changes}, tensors)

    changed(sites=[])
    changed(sites=[{"name": "a"}])
    changed(sites=[vars(SITES[0])] * 2)
    for field, value in (("axis", "q"), ("axis", 0), ("side", "left"), ("leaf", "q"), ("units", 4.0), ("name", 3)):
        changed(sites=[{**vars(SITES[0]), field: value}, vars(SITES[1])])
    changed(provenance="abc")
    changed(wiring=["ab"])
    changed(tasks=[{"label": index, "name": None} for index in range(3)])
    changed(tasks=[{"label": index + 0.5, "name": str(index)} for index in range(3)])
    changed(tasks=[])
    changed(tasks=[{"label": 0, "name": "x"}] * 3)
    changed(closed="mean")
    changed(closed="maybe")
    changed(wiring=[{"source": "input", "target": "zzz"}])
    changed(wiring=[{"source": "a", "target": "b@input"}, {"source": "b@input", "target": "a"}])


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.safetensors"
    THREE.save(path)
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(MaskFileError, match=r"cannot write .*: No space left on device"):
        THREE.select("t0").save(path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["m.safetensors"]
    with pytest.raises(MaskFileError, match="cannot write"):
        THREE.save(tmp_path / "no" / "m.safetensors")


def test_written_files_have_the_users_permissions(tmp_path: Path) -> None:
    write_bytes(tmp_path / "ours", b"x")
    (tmp_path / "theirs").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode
