"""Mask files: what `docs/mask-format.md` specifies, in bytes and back. Bytes apart from paths, in inverse pairs."""

from __future__ import annotations

import dataclasses
import functools
import importlib.resources
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from os import PathLike
from typing import Any, NamedTuple, NoReturn

import fastjsonschema
import networkx as nx
import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..errors import MaskFileError
from ..gating import Closed
from ..sites import Site
from ..tasks import LONGEST, TEXT, Tasks
from .container import Container, Entry, of_bytes, of_file, strict_json
from .writing import write_bytes

KEY = "nadhooks"  # the one key of the safetensors metadata: of several, the order of bytes would vary
FORMAT = 2
NEWEST_READ = 2
HARD = "U8"  # eight gates to a byte; in format 1 BOOL, a byte each
SOFT = ("F16", "BF16", "F32", "F64")
DEPTH = 16  # of lists and objects in each other, in the provenance


class Parts(NamedTuple):
    """What a mask file holds; the fields of `Masks`."""

    sites: tuple[Site, ...]
    values: Mapping[str, Tensor]
    task_rows: Tasks
    wiring: nx.DiGraph
    closed: Closed
    constants: Mapping[str, Tensor]
    provenance: Mapping[str, Any]
    quality: Mapping[str, Tensor]


class Stored(Mapping[str, Tensor]):
    """A tensor per site in a file, KIND/SITE (tasks, units): read when it is asked for, of some tasks if need be."""

    def __init__(self, container: Container, sites: Sequence[Site], kind: str, rows: Sequence[int] | None = None):
        self._container, self._sites, self._rows = container, {site.name: site for site in sites}, rows
        self._kind = kind

    def __getitem__(self, name: str) -> Tensor:
        value = self._tensor(name)
        if not bool(value.isfinite().all()):
            _refuse(f"{self._kind} values of {name!r} that are not finite")
        return value

    def take(self, rows: Sequence[int]) -> Stored:
        """Those of some tasks, by row."""
        mine = range(self._entry(next(iter(self))).shape[0]) if self._rows is None else self._rows
        return type(self)(self._container, list(self._sites.values()), self._kind, [mine[row] for row in rows])

    def _entry(self, name: str) -> Entry:
        if name not in self._sites:
            raise KeyError(name)
        return self._container.entries[f"{self._kind}/{name}"]

    def _tensor(self, name: str) -> Tensor:
        self._entry(name)
        return self._container.tensor(f"{self._kind}/{name}", self._rows)

    def __contains__(self, name: object) -> bool:
        return name in self._sites  # the inherited way would read the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self._sites)

    def __len__(self) -> int:
        return len(self._sites)


class StoredValues(Stored):
    """Gates in a file: {site: (tasks, units) in [0, 1]}, unpacked when they are read."""

    def __getitem__(self, name: str) -> Tensor:
        hard = self._hard(name)
        if hard is not None:
            return hard.float()
        value = self._tensor(name)
        if not bool(((value >= 0) & (value <= 1)).all()):  # NaN fails too
            _refuse(f"gates of {name!r} outside [0, 1]")
        return value

    def kept(self, name: str) -> Tensor:
        """(tasks, units) booleans: the gates above 0.5."""
        hard = self._hard(name)
        return self[name] > 0.5 if hard is None else hard

    def _hard(self, name: str) -> Tensor | None:
        """(tasks, units) booleans of hard masks; None where the gates are soft."""
        dtype = self._entry(name).dtype
        if dtype in SOFT:
            return None
        stored, units = self._tensor(name), self._sites[name].units
        if dtype == "BOOL":
            return stored
        bits = torch.from_numpy(np.unpackbits(stored.numpy(), axis=1, bitorder="little")).bool()
        if bool(bits[:, units:].any()):
            _refuse(f"bits behind the {units} units of {name!r}")
        return bits[:, :units]


# --- bytes -----------------------------------------------------------------------------------------------------------


def to_bytes(parts: Parts) -> bytes:
    """The same content gives the same bytes. Raises MaskFileError where the format has no room for something."""
    header = {
        "format": FORMAT,
        "sites": [_fields(site) for site in parts.sites],
        "tasks": [_task(parts.task_rows, row) for row in range(len(parts.task_rows))],
        "wiring": [{"source": u, "target": v, **data} for u, v, data in parts.wiring.edges(data=True)],
        "closed": parts.closed,
        "provenance": _plain(parts.provenance),
    }
    _check(header, "cannot be saved: ")
    for name, value in parts.constants.items():
        if not value.is_floating_point() or not bool(value.isfinite().all()):
            raise MaskFileError(f"cannot be saved: what closed units of {name!r} put out are not finite numbers")
    tensors = {f"mask/{name}": _packed(value) for name, value in parts.values.items()}
    if parts.closed != "zero":
        tensors |= {f"{parts.closed}/{name}": value for name, value in parts.constants.items()}
    tensors |= {f"quality/{name}": value.float() for name, value in parts.quality.items()}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return safetensors.torch.save(tensors, metadata={KEY: text})


def from_bytes(data: bytes) -> Parts:
    """Raises MaskFileError for anything that `to_bytes`, of this version or an earlier one, could not have made."""
    return _parts(of_bytes(data))


def write(path: str | PathLike[str], parts: Parts) -> None:
    if not isinstance(path, (str, PathLike)):
        raise MaskFileError(f"expected a path, got {path!r}")
    data = to_bytes(parts)
    try:
        from_bytes(data)
    except MaskFileError as error:
        raise MaskFileError(f"cannot be saved: {error}") from error
    try:
        write_bytes(path, data)
    except OSError as error:
        raise MaskFileError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str | PathLike[str]) -> Parts:
    """Reads all but the gates, which are read when they are asked for. Raises MaskFileError as `from_bytes` does."""
    try:
        return _parts(of_file(path))
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        raise MaskFileError(f"cannot read it: {getattr(error, 'strerror', None) or error}") from error


def _parts(container: Container) -> Parts:
    header = _header(container)
    sites = tuple(_site(fields) for fields in header["sites"])
    names = [site.name for site in sites]
    if len(set(names)) < len(names) or {"input", "output"} & set(names):
        _refuse("a site that is there twice, or called input or output")
    tasks = _tasks(header["tasks"])
    expected = {f"mask/{name}" for name in names}
    expected |= {f"{header['closed']}/{name}" for name in names if header["closed"] != "zero"}
    for name in container.entries:
        if name not in expected and not name.startswith("quality/"):
            _refuse(f"a tensor {name!r} that its header does not speak of")
    for site in sites:
        bits = [len(tasks), -(-site.units // 8)] if header["format"] > 1 else [len(tasks), site.units]
        hard = HARD if header["format"] > 1 else "BOOL"
        _check_tensor(container, f"mask/{site.name}", {hard: bits} | {soft: [len(tasks), site.units] for soft in SOFT})
    constants: Mapping[str, Tensor] = {}
    if header["closed"] == "mean":
        constants = _small(container, {f"mean/{site.name}": [site.units] for site in sites})
        if not all(bool(mean.isfinite().all()) for mean in constants.values()):
            _refuse("means that are not finite")
    elif header["closed"] == "optimal":
        for site in sites:
            _check_tensor(container, f"optimal/{site.name}", {soft: [len(tasks), site.units] for soft in SOFT})
        constants = Stored(container, sites, "optimal")
    quality = _small(container, {name: [len(tasks)] for name in container.entries if name.startswith("quality/")})
    if not all(TEXT.fullmatch(name) for name in quality):
        _refuse("a measure of quality with a name that is none")
    values, wiring = StoredValues(container, sites, "mask"), _wiring(header["wiring"], names)
    return Parts(sites, values, tasks, wiring, header["closed"], constants, header["provenance"], quality)


# --- the header ------------------------------------------------------------------------------------------------------


def schema() -> dict[str, Any]:
    """The JSON Schema of the header, as the package brings it."""
    return json.loads((importlib.resources.files(__package__) / "mask-file.schema.json").read_text())


@functools.cache
def _validator() -> Callable[[Any], Any]:
    return fastjsonschema.compile(schema())


def _header(container: Container) -> dict[str, Any]:
    metadata = container.metadata
    if not isinstance(metadata, dict) or not isinstance(metadata.get(KEY), str) or len(metadata) > 1:
        raise MaskFileError(f"expected a mask file, got safetensors without the one metadata key {KEY!r}")
    header = strict_json(metadata[KEY].encode(errors="replace"), f"the metadata key {KEY!r}")
    if not isinstance(header, dict):
        raise MaskFileError(f"expected a JSON object in the metadata key {KEY!r}, got {type(header).__name__}")
    version = header.get("format")
    if type(version) is not int or not 1 <= version <= NEWEST_READ:
        newer = type(version) is int and version > NEWEST_READ
        more = "a newer nadhooks reads it: pip install --upgrade nadhooks" if newer else "it is none of nadhooks' files"
        raise MaskFileError(f"expected mask file format 1 to {NEWEST_READ}, got {_shown(version)}; {more}")
    _check(header, "not a valid mask file: ")
    return header


def _check(header: dict[str, Any], prefix: str) -> None:
    """Against the schema; and what it cannot say: that strings everywhere are of a length and without controls."""
    try:
        _validator()(header)
    except fastjsonschema.JsonSchemaValueException as error:
        where = str(error.name).removeprefix("data.")
        rule = "has characters that no text has" if error.rule == "pattern" else error.message.removeprefix("data.")
        text = f"{where} {rule}" if error.rule == "pattern" else rule
        raise MaskFileError(f"{prefix}{text[:300]}, got {_shown(error.value)}") from error
    if not _is_plain(header["provenance"]):
        raise MaskFileError(f"{prefix}provenance holds text that is too long, too deep, or not to be printed")


def _shown(value: Any) -> str:
    text = ascii(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _is_plain(value: Any, depth: int = 0) -> bool:
    if isinstance(value, str):
        return len(value) <= LONGEST and TEXT.fullmatch(value) is not None
    if isinstance(value, dict):
        return depth < DEPTH and all(_is_plain(key) and _is_plain(part, depth + 1) for key, part in value.items())
    return not isinstance(value, list) or (depth < DEPTH and all(_is_plain(part, depth + 1) for part in value))


def _plain(provenance: Mapping[str, Any]) -> Any:
    """As JSON knows it; text that is too long for a file is cut, and what cannot be printed becomes a question mark."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {plain(key): plain(part) for key, part in value.items()}
        if isinstance(value, list):
            return [plain(part) for part in value]
        if isinstance(value, float) and not math.isfinite(value):
            return str(value)
        if not isinstance(value, str):
            return value
        text = "".join(letter if TEXT.fullmatch(letter) else "?" for letter in value)
        return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"

    return plain(json.loads(json.dumps(dict(provenance), default=str)))


def _fields(site: Site) -> dict[str, Any]:
    return {each.name: getattr(site, each.name) for each in dataclasses.fields(site) if each.compare}


def _site(fields: Mapping[str, Any]) -> Site:
    if any(type(value) is float for value in fields.values()):  # 1.0 is a whole number to JSON Schema
        _refuse("a site with numbers that are not written as whole ones")
    return Site(**fields)


def _task(tasks: Tasks, row: int) -> dict[str, Any]:
    task: dict[str, Any] = {"label": tasks.labels[row], "name": tasks.names[row]}
    return task | ({"wordnet": tasks.wordnet[row]} if tasks.wordnet and tasks.wordnet[row] else {})


def _tasks(rows: Sequence[Mapping[str, Any]]) -> Tasks:
    labels, names = tuple(row["label"] for row in rows), tuple(row["name"] for row in rows)
    if len(set(labels)) < len(rows) or len(set(names)) < len(rows) or any(type(label) is float for label in labels):
        _refuse("a task whose label or name is there twice, or whose label is neither a whole number nor a text")
    wordnet = tuple(row.get("wordnet", "") for row in rows)
    return Tasks(labels, names, wordnet if any(wordnet) else ())


def _wiring(edges: Sequence[Mapping[str, str]], names: Sequence[str]) -> nx.DiGraph:
    graph = nx.DiGraph()
    graph.add_nodes_from(["input", *names, "output"])
    for edge in edges:
        data = dict(edge)
        source, target = data.pop("source"), data.pop("target")
        if source not in graph or target not in graph:
            _refuse(f"a wiring that names {_shown(source)} -> {_shown(target)}, which are not both sites")
        if graph.has_edge(source, target):
            _refuse(f"a wiring with {_shown(source)} -> {_shown(target)} twice")
        graph.add_edge(source, target)
        graph.edges[source, target].update(data)  # whatever words they go by
    if not nx.is_directed_acyclic_graph(graph):
        _refuse("a wiring with a cycle")
    return nx.freeze(graph)


# --- tensors ---------------------------------------------------------------------------------------------------------


def _packed(value: Tensor) -> Tensor:
    """Hard masks in bits, the first unit in the lowest one; soft masks as they are."""
    value = value.detach().cpu()
    if not bool(((value == 0) | (value == 1)).all()):
        return value
    return torch.from_numpy(np.packbits(value.bool().numpy(), axis=1, bitorder="little"))


def _check_tensor(container: Container, name: str, shapes: Mapping[str, Sequence[int]]) -> None:
    """That it is there, with one of these {type: shape}."""
    entry = container.entries.get(name)
    if entry is None:
        _refuse(f"no tensor {name!r}")
    if entry.dtype not in shapes or list(entry.shape) != list(shapes[entry.dtype]):
        wanted = " or ".join(f"{dtype} {list(shape)}" for dtype, shape in shapes.items() if dtype in (HARD, "F32"))
        _refuse(f"tensor {name!r} of {entry.dtype} {list(entry.shape)} instead of {wanted}")


def _small(container: Container, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Tensors by the part of their names behind the slash, of a number per unit or per task."""
    for name, shape in shapes.items():
        _check_tensor(container, name, dict.fromkeys(SOFT, shape))
    return {name.partition("/")[2]: container.tensor(name) for name in shapes}


def _refuse(what: str) -> NoReturn:
    raise MaskFileError(f"not a valid mask file: it has {what}")
