"""Mask files: what was saved comes back, and nothing else is taken for it."""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import re
import struct
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import networkx as nx
import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import nadhooks
from nadhooks.errors import MaskFileError
from nadhooks.formats import container, mask_file
from nadhooks.formats.writing import check_writable, write_bytes
from nadhooks.masks import Masks
from nadhooks.sites import Site
from nadhooks.tasks import LONGEST, TEXT, Tasks

from .strangers import Watch, encoded, header_and_tensors, mutated
from .test_masks import SITES, THREE, masks, optimal

DATA = Path(__file__).parent / "data"
MEANS = {"a": torch.tensor([0.5, 1, -1, 2]), "b@input": torch.tensor([0, 0.125])}
SOFT = masks([[0.25, 0.5, 1, 0]], [[1, 0]], closed="mean", constants=MEANS, provenance={"method": "x", "n": [1, 2]})


OPTIMAL = optimal(3)


def as_bytes(each: Masks) -> bytes:
    return mask_file.to_bytes(each.parts())


def from_bytes(data: bytes) -> Masks:
    """Everything read, as a user's loop would."""
    again = Masks(*mask_file.from_bytes(data))
    for site in again.sites:
        assert again[site.name].shape == (len(again), site.units)
    return again


def changed(whole: Masks = THREE, tensors: Any = None, **fields: Any) -> bytes:
    """A file with other header fields or tensors than the masks', which no writer of ours would make."""
    header, entries = header_and_tensors(as_bytes(whole))
    return encoded({**header, **fields}, {**entries, **(tensors or {})})


@pytest.mark.parametrize(
    "each", [SOFT, OPTIMAL, THREE, THREE.replaced(quality={"auc": torch.tensor([0.5, math.nan, 1])})]
)
def test_files_give_back_what_was_saved(each: Masks, tmp_path: Path) -> None:
    each.save(tmp_path / "m.safetensors")
    again = nadhooks.load(tmp_path / "m.safetensors")
    assert again == each
    assert copy.deepcopy(again) == pickle.loads(pickle.dumps(again)) == each
    assert dict(again.provenance) == dict(each.provenance)
    assert list(again.wiring.edges(data=True)) == list(each.wiring.edges(data=True))
    assert again.quality.keys() == each.quality.keys()
    for name, measure in each.quality.items():
        torch.testing.assert_close(again.quality[name], measure, equal_nan=True)
    assert as_bytes(again) == as_bytes(each)
    assert os.listdir(tmp_path) == ["m.safetensors"]


def test_files_are_safetensors_with_one_json_key_and_the_same_bytes_each_time(tmp_path: Path) -> None:
    data = as_bytes(THREE)
    assert data == as_bytes(copy.deepcopy(THREE)) == mask_file.to_bytes(mask_file.from_bytes(data))
    (tmp_path / "m").write_bytes(data)
    with safetensors.safe_open(tmp_path / "m", "pt") as file:
        assert list(file.metadata()) == ["nadhooks"]
        assert json.loads(file.metadata()["nadhooks"])["tasks"][1] == {"label": 1, "name": "t1"}
        assert file.get_tensor("mask/a").tolist() == [[0b0011], [0b0101], [0]]  # a bit per unit, the first one lowest
        assert file.get_tensor("mask/a").dtype == torch.uint8


def test_bits_of_units_that_fill_no_byte() -> None:
    random = torch.Generator().manual_seed(0)
    for units in (1, 7, 8, 9, 64, 100):
        values = {"a": torch.rand(5, units, generator=random).round()}
        wiring = nx.DiGraph([("input", "a"), ("a", "output")])
        each = Masks((Site("a", 1, units, "a"),), values, Tasks.of(5), wiring)
        again = from_bytes(as_bytes(each))
        assert torch.equal(again["a"], values["a"])
        assert torch.equal(again.kept_units("a"), values["a"].bool())


def test_selected_tasks_are_all_that_is_read(tmp_path: Path) -> None:
    kept = torch.rand(1000, 64, generator=torch.Generator().manual_seed(0)).round()
    wiring = nx.DiGraph([("input", "a"), ("a", "output")])
    Masks((Site("a", 1, 64, "a"),), {"a": kept}, Tasks.of(1000), wiring).save(tmp_path / "m")
    reads: list[int] = []
    data = (tmp_path / "m").read_bytes()

    def counted(start: int, end: int) -> bytes:
        reads.append(end - start)
        return data[start:end]

    opened = Masks(*mask_file._parts(container.Container(counted, len(data))))
    few = opened.select([7, 3]).select([3, 7])  # of a selection too
    assert len(reads) == 2  # the header's length, and the header
    assert torch.equal(few["a"], kept[[3, 7]])
    assert reads[2:] == [8, 8]  # 64 bits of two tasks


@pytest.mark.parametrize("at_once", [container.AT_ONCE, 0])
def test_an_opened_file_stays_what_it_was_when_another_takes_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int
) -> None:
    monkeypatch.setattr(container, "AT_ONCE", at_once)
    THREE.save(tmp_path / "m")
    opened = nadhooks.load(tmp_path / "m")
    SOFT.save(tmp_path / "m")
    assert opened == THREE
    opened.save(tmp_path / "m")  # over the file that it comes from
    assert nadhooks.load(tmp_path / "m") == THREE


def test_shards_are_opened_by_the_hundred(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")  # not on Windows
    for task in range(100):
        SOFT.replaced(SOFT.values, Tasks.of([task])).save(tmp_path / f"{task}")
    with (tmp_path / "0").open() as file:
        free = file.fileno()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 20, hard))
    try:
        shards = [nadhooks.load(tmp_path / f"{task}") for task in range(100)]
        merged = nadhooks.masks.merge(shards)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(merged) == 100
    assert all(torch.equal(merged[site][99], SOFT[site][0]) for site in SOFT.values)


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_files_of_the_first_format_stay_readable(name: str) -> None:
    old = nadhooks.load(DATA / f"format-1-{name}.safetensors")
    soft = name == "soft"
    a = [[0.25, 1, 0, 0], [1, 0, 0.5, 0]] if soft else [[1, 1, 0, 0], [1, 0, 1, 0]]
    b = [[1, 0], [0, 0.75]] if soft else [[1, 0], [0, 0]]
    assert old["a"].tolist() == a
    assert old["b@input"].tolist() == b
    assert old.sites == SITES
    assert old.tasks == ("cat", "dog")
    assert old.wiring.edges["b@input", "output"] == {"found": "perturbation"}
    assert old.closed == ("mean" if soft else "zero")
    assert {site: mean.tolist() for site, mean in old.constants.items()} == (
        {"a": [0.5, 1, -1, 2], "b@input": [0, 0.125]} if soft else {}
    )
    assert old.provenance.get("model") == (None if soft else "timm:resnet18")
    assert from_bytes(as_bytes(old)) == old


def test_the_specification_is_all_that_a_reader_needs() -> None:
    """docs/mask-format.md, followed with the safetensors package alone."""
    each = SOFT.replaced({"a": SOFT["a"], "b@input": torch.tensor([[0.0, 1.0]])}, quality={"auc": torch.tensor([0.5])})
    data = as_bytes(each)
    tensors = safetensors.numpy.load(data)
    length = int.from_bytes(data[:8], "little")
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    header = json.loads(metadata.pop("nadhooks"))
    assert not metadata
    assert set(header) == {"format", "sites", "tasks", "wiring", "closed", "provenance"}
    for site in header["sites"]:
        stored = tensors.pop(f"mask/{site['name']}")
        if stored.dtype == np.uint8:
            gates = [[row[unit // 8] >> unit % 8 & 1 for unit in range(site["units"])] for row in stored]
        else:
            gates = stored.tolist()
        assert gates == each[site["name"]].tolist()
        assert tensors.pop(f"mean/{site['name']}").tolist() == each.constants[site["name"]].tolist()
    assert [task["name"] for task in header["tasks"]] == list(each.tasks)
    assert tensors.pop("quality/auc").tolist() == [0.5]
    assert not tensors


def test_constants_are_read_when_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "optimal.safetensors"
    OPTIMAL.save(path)
    opened = nadhooks.load(path)
    two = opened.select(["t2", "t0"])
    assert two == OPTIMAL.select(["t2", "t0"])
    assert two.select("t0").constants["a"].tolist() == [[0, 1, 2, 3]]
    assert opened.hard() == OPTIMAL
    with pytest.raises(KeyError):
        opened.constants["c"]
    path.write_bytes(changed(OPTIMAL, {"optimal/a": ("F32", [3, 4], struct.pack("12f", *[math.nan] * 12))}))
    opened = nadhooks.load(path)
    with pytest.raises(MaskFileError, match="optimal values of 'a' that are not finite"):
        opened.constants["a"]
    for tensors in ({"optimal/a": ("F32", [4], bytes(16))}, {"mean/a": ("F32", [4], bytes(16))}):
        path.write_bytes(changed(OPTIMAL, tensors))
        with pytest.raises(MaskFileError, match="not a valid mask file"):
            nadhooks.load(path)


def test_bytes_of_the_second_format_stay_what_they_are() -> None:
    assert as_bytes(SOFT) == (DATA / "format-2-soft.safetensors").read_bytes()
    assert as_bytes(THREE) == (DATA / "format-2-hard.safetensors").read_bytes()


def test_other_files_are_refused(tmp_path: Path) -> None:
    whole = as_bytes(THREE)
    path = tmp_path / "m.safetensors"
    one = {"a": torch.zeros(2)}
    cases = {
        b"": "safetensors",
        b"hello": "safetensors",
        whole[:-3]: "safetensors",
        whole[: len(whole) // 2]: "safetensors",
        whole + b"\0": "safetensors",
        safetensors.torch.save(one): "metadata key 'nadhooks'",
        safetensors.torch.save(one, {"format": "pt", "nadhooks": "{}"}): "metadata key 'nadhooks'",
        safetensors.torch.save(one, {"nadhooks": "{"}): "no valid JSON",
        safetensors.torch.save(one, {"nadhooks": "[]"}): "a JSON object",
        safetensors.torch.save(one, {"nadhooks": "{}"}): "format 1 to 2, got None; it is none of nadhooks' files",
        safetensors.torch.save(one, {"nadhooks": '{"format": 99}'}): "got 99; a newer nadhooks reads it: pip install",
        safetensors.torch.save(one, {"nadhooks": '{"format": 1}'}): "not a valid mask file: data must contain",
    }
    for data, message in cases.items():
        path.write_bytes(data)
        with pytest.raises(MaskFileError, match=message):
            nadhooks.load(path)
    with pytest.raises(MaskFileError, match="No such file"):
        nadhooks.load(tmp_path / "missing")
    with pytest.raises(MaskFileError, match="directory"):
        nadhooks.load(tmp_path)
    with pytest.raises(MaskFileError, match="null"):
        nadhooks.load("a\0b")
    with pytest.raises(MaskFileError, match="expected the path of a mask file, got None"):
        nadhooks.load(None)  # type: ignore[arg-type]


A, B = ({**vars(site)} for site in SITES)
for fields in (A, B):
    fields.pop("within"), fields.pop("views")
TASK = {"label": 0, "name": "x"}
HOSTILE_HEADERS: dict[str, dict[str, Any]] = {
    "no site": {"sites": []},
    "a site with its name alone": {"sites": [{"name": "a"}]},
    "a site twice": {"sites": [A, A]},
    "a site called input": {"sites": [{**A, "name": "input"}, B]},
    "a site with a control character": {"sites": [{**A, "name": "a\x1b[2J"}, B]},
    "a site with what XML has no place for": {"sites": [{**A, "name": "a\ufffe"}, B]},
    "an axis that is text": {"sites": [{**A, "axis": "q"}, B]},
    "an axis of 0": {"sites": [{**A, "axis": 0}, B]},
    "units that are no whole number": {"sites": [{**A, "units": 4.0}, B]},
    "billions of units": {"sites": [{**A, "units": 2_000_000_000}, B]},
    "more units than any number": {"sites": [{**A, "units": 10**30}, B]},
    "a third side": {"sites": [{**A, "side": "left"}, B]},
    "a leaf that is text": {"sites": [{**A, "leaf": "q"}, B]},
    "a field that no site has": {"sites": [{**A, "command": "rm"}, B]},
    "provenance that is text": {"provenance": "abc"},
    "provenance without end": {"provenance": {"a": "x" * (LONGEST + 1)}},
    "provenance that colours the terminal": {"provenance": {"a": ["\x1b[31m"]}},
    "provenance as deep as a well": {"provenance": json.loads('{"a":' * 40 + "1" + "}" * 40)},
    "wiring that is text": {"wiring": ["ab"]},
    "wiring to nowhere": {"wiring": [{"source": "input", "target": "zzz"}]},
    "wiring in a circle": {"wiring": [{"source": "a", "target": "b@input"}, {"source": "b@input", "target": "a"}]},
    "an edge twice": {"wiring": [{"source": "a", "target": "b@input"}] * 2},
    "a task without a name": {"tasks": [{"label": index, "name": None} for index in range(3)]},
    "a label that is half": {"tasks": [{"label": index + 0.5, "name": str(index)} for index in range(3)]},
    "a label that is 1.0": {"tasks": [{"label": float(index), "name": str(index)} for index in range(3)]},
    "no task": {"tasks": []},
    "a task twice": {"tasks": [TASK] * 3},
    "a name twice": {"tasks": [{"label": index, "name": "x"} for index in range(3)]},
    "a path in a WordNet id": {"tasks": [{**TASK, "wordnet": "../../etc"}, *[TASK] * 2]},
    "fewer tasks than rows": {"tasks": [TASK]},
    "means without any": {"closed": "mean"},
    "a third way to be closed": {"closed": "maybe"},
    "a field that no header has": {"pickle": "gASV"},
}


@pytest.mark.parametrize("what", HOSTILE_HEADERS)
def test_headers_that_lie_are_refused(what: str) -> None:
    with pytest.raises(MaskFileError) as caught:
        from_bytes(changed(**HOSTILE_HEADERS[what]))
    assert len(str(caught.value)) < 600
    assert TEXT.fullmatch(str(caught.value))  # nothing of theirs reaches the terminal unescaped


NAN = np.array([[np.nan, 0, 0, 0]] * 3, "<f4").tobytes()
HOSTILE_TENSORS: dict[str, dict[str, Any]] = {
    "no gates for a site": {"mask/a": None},
    "gates that are NaN": {"mask/a": ("F32", [3, 4], NAN)},
    "gates above 1": {"mask/a": ("F32", [3, 4], np.full((3, 4), 1.5, "<f4").tobytes())},
    "gates of another type": {"mask/a": ("F32", [3, 1], bytes(12))},
    "gates of another shape": {"mask/a": ("U8", [1, 3], bytes(3))},
    "a byte per unit, as in the first format": {"mask/a": ("BOOL", [3, 4], bytes(12))},
    "bits behind the units": {"mask/a": ("U8", [3, 1], b"\xff" * 3)},
    "a passenger": {"mask/zzz": ("U8", [1], b"x")},
    "quality for another number of tasks": {"quality/auc": ("F32", [2], bytes(8))},
    "quality under a name to colour the terminal": {"quality/\x1b[31m": ("F32", [3], bytes(12))},
    "a type of tensors that nobody knows": {"mask/a": ("PICKLE", [3, 1], bytes(3))},
    "a shape with a negative number": {"mask/a": ("U8", [-3, -1], bytes(3))},
    "a shape that overflows": {"mask/a": ("U8", [2**63, 2], bytes(3))},
    "fewer bytes than the shape says": {"mask/a": ("U8", [3, 1], bytes(2))},
}


@pytest.mark.parametrize("what", HOSTILE_TENSORS)
def test_tensors_that_lie_are_refused(what: str) -> None:
    with pytest.raises(MaskFileError) as caught:
        from_bytes(changed(tensors=HOSTILE_TENSORS[what]))
    assert TEXT.fullmatch(str(caught.value))


@pytest.fixture(scope="module")
def watch() -> Watch:
    return Watch([path.read_bytes() for path in sorted(DATA.glob("*.safetensors"))])


@settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(random=st.randoms(use_true_random=False), which=st.tuples(st.integers(0, 3), st.integers(0, 3)))
def test_a_strangers_file_is_loaded_or_refused(watch: Watch, random: Random, which: tuple[int, int]) -> None:
    """`python -m tests.benchmarks.fuzzing` does this 200,000 times."""
    seeds = [path.read_bytes() for path in sorted(DATA.glob("*.safetensors"))]
    assert watch.wrong(mutated(seeds[which[0]], seeds[which[1]], random), memory=True) == ""


def test_the_watch_over_strangers_files_sees_what_is_wrong(watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    good = as_bytes(THREE)
    assert watch.wrong(good) == ""
    whole = mask_file.from_bytes

    def runs_code(data: bytes) -> mask_file.Parts:
        exec("1")
        return whole(data)

    def fills_memory(data: bytes) -> mask_file.Parts:
        return bytes(10_000_000) and whole(data)  # type: ignore[return-value]

    monkeypatch.setattr(mask_file, "from_bytes", runs_code)
    with pytest.raises(AssertionError, match="exec"):
        watch.wrong(good)
    monkeypatch.setattr(mask_file, "from_bytes", fills_memory)
    with pytest.raises(AssertionError, match="bytes of memory"):
        watch.wrong(good, memory=True)
    monkeypatch.setattr(mask_file, "from_bytes", lambda data: 1 / 0)
    assert "ZeroDivisionError" in watch.wrong(good)


def test_booleans_of_the_first_format_are_0_or_1() -> None:
    header, tensors = header_and_tensors((DATA / "format-1-hard.safetensors").read_bytes())
    assert header["format"] == 1
    with pytest.raises(MaskFileError, match="neither 0 nor 1"):
        from_bytes(encoded(header, {**tensors, "mask/a": ("BOOL", [2, 4], bytes(range(8)))}))


def test_means_must_be_finite() -> None:
    with pytest.raises(MaskFileError, match="means that are not finite"):
        from_bytes(changed(SOFT, {"mean/a": ("F32", [4], np.full(4, np.inf, "<f4").tobytes())}))


@pytest.mark.parametrize(
    "header",
    [
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[NaN,1]}}',
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}',
        b'{"a":{"dtype":"U8","shape":[1]}}',
        b'{"a":3}',
        b"[" * 100_000,
        b"[]",
        b'{"a":' + b"9" * 5000 + b"}",
        b"\xff\xfe",
    ],
)
def test_containers_that_are_not_exactly_safetensors_are_refused(header: bytes) -> None:
    with pytest.raises(MaskFileError, match="expected a safetensors file"):
        container.of_bytes(len(header).to_bytes(8, "little") + header + b"\0")


def test_a_header_that_would_fill_the_memory_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m"
    with open(path, "wb") as file:
        file.write((2**34).to_bytes(8, "little"))
        file.truncate(2**35)  # sparse: it takes no room on the disk
    with pytest.raises(MaskFileError, match="16,777,216 are the most that is read"):
        nadhooks.load(path)
    path.write_bytes((2**60).to_bytes(8, "little") + b"{}")
    with pytest.raises(MaskFileError, match="1,152,921,504,606,846,976 bytes in a file of 10: another kind of file"):
        nadhooks.load(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes on this system")
def test_a_pipe_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "m")
    with pytest.raises(MaskFileError, match="expected a file, got a directory, a device or a pipe"):
        nadhooks.load(tmp_path / "m")


def test_the_schema_says_what_the_code_says() -> None:
    schema = mask_file.schema()
    text = schema["definitions"]["text"]
    assert text["maxLength"] == LONGEST
    pattern = re.compile(text["pattern"].removesuffix("$") + r"\Z")
    for letter in map(chr, [*range(0x3000), *range(0xD700, 0xE100), 0x1F408]):
        assert bool(pattern.match(letter)) == bool(TEXT.fullmatch(letter))
    site = schema["properties"]["sites"]["items"]
    assert set(site["properties"]) == set(site["required"]) == set(A)
    assert schema["properties"]["format"]["enum"] == list(range(1, mask_file.NEWEST_READ + 1))


def test_what_has_no_room_in_the_format_is_refused_or_put_into_words(tmp_path: Path) -> None:
    odd = {"beta": math.inf, "path": Path("x"), "notes": "a\nb" + "x" * 2000}
    each = THREE.replaced(provenance=odd)
    each.save(tmp_path / "m")
    again = nadhooks.load(tmp_path / "m").provenance
    assert again["beta"] == "inf"
    assert again["path"] == "x"
    assert again["notes"] == "a?b" + "x" * (LONGEST - 4) + "…"
    with pytest.raises(MaskFileError, match=r"cannot be saved: provenance\.model must be string, got 3"):
        THREE.replaced(provenance={"model": 3}).save(tmp_path / "m")
    assert nadhooks.load(tmp_path / "m") == THREE


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
    with pytest.raises(MaskFileError, match="a null character in its name"):
        THREE.save(tmp_path / "a\0b")


def test_a_writer_killed_at_any_moment_leaves_one_whole_file(tmp_path: Path) -> None:
    """`python -m tests.benchmarks.killing` does this 200 times."""
    from .benchmarks.killing import mixtures

    assert mixtures(tmp_path / "m", times=10) == 0


def test_written_files_have_the_users_permissions(tmp_path: Path) -> None:
    write_bytes(tmp_path / "ours", b"x")
    (tmp_path / "theirs").write_bytes(b"x")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "theirs").stat().st_mode


def test_links_and_devices_stay_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "null").symlink_to("/dev/null")
    for name in ("link", "null"):
        check_writable(tmp_path / name)
        write_bytes(tmp_path / name, b"new")
        assert (tmp_path / name).is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "null"]


def test_names_may_be_as_long_as_the_file_system_has_room_for(tmp_path: Path) -> None:
    for name in ("x" * 255, "模" * 85):
        THREE.save(tmp_path / name)
        assert nadhooks.load(tmp_path / name) == THREE


def test_nothing_is_saved_that_would_not_be_read(tmp_path: Path) -> None:
    constants = {name: torch.zeros(value.shape[1]) for name, value in THREE.values.items()}
    means = replace(THREE, closed="mean", constants=constants)
    wrong = [
        replace(means, constants={**constants, "a": torch.full((4,), torch.nan)}),
        replace(means, constants={**constants, "a": torch.zeros(4).long()}),
        THREE.replaced(quality={"of\nlines": torch.zeros(3)}),
        THREE.replaced(quality={"x" * 3000: torch.zeros(3)}),
    ]
    for each in wrong:
        with pytest.raises(MaskFileError, match="cannot be saved"):
            each.save(tmp_path / "m")
    assert not list(tmp_path.iterdir())
    replace(THREE, constants=constants).save(tmp_path / "m")  # which mean nothing where closed units put out zero
    assert nadhooks.load(tmp_path / "m") == THREE
