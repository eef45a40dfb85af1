"""safetensors files from strangers: every number checked before anything is allocated, tensors read when asked for.

Written are such files by the safetensors package. Reading is done here, for what it does not give: the whole header
bounded and checked beforehand, single rows of a tensor, bytes and files alike, and an error in one sentence.
"""

from __future__ import annotations

import json
import math
import os
import stat
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import MaskFileError

HEADER_BYTES = 16 * 2**20  # of the header, escapes included; ImageNet's 1,000 tasks take 0.1 MB
NAME_CHARACTERS = 2_000  # of a tensor
DIMENSIONS = 4
AT_ONCE = 2**20  # bytes; a file up to this is read whole when it is opened
TYPES = {  # that mask files use
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
Read = Callable[[int, int], bytes]  # the bytes from start to end


@dataclass(frozen=True)
class Entry:
    """A tensor's type, shape and place in the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class Container:
    """An opened safetensors file: `metadata`, and `entries` by name; `tensor` reads one, whole or some rows of it.

    Raises MaskFileError for whatever is not exactly such a file, tensors without gaps that fill it to the end.
    """

    def __init__(self, read: Read, size: int):
        self._read = read
        start = int.from_bytes(self._bytes(0, 8, size), "little")
        if not 2 <= start <= size - 8:
            _refuse(f"a header of {start:,} bytes in a file of {size:,}: another kind of file, or one that was cut off")
        if start > HEADER_BYTES:
            _refuse(f"a header of {start:,} bytes, where {HEADER_BYTES:,} are the most that is read")
        header = strict_json(self._bytes(8, 8 + start, size), "the header")
        if not isinstance(header, dict):
            _refuse(f"a header that is {type(header).__name__} instead of an object")
        self._header_end = 8 + start
        self.metadata: Any = header.pop("__metadata__", {})
        self.entries = {name: _entry(name, entry) for name, entry in header.items()}
        place = 0
        for name, entry in sorted(self.entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start != place:
                _refuse(f"tensor {name!r} at byte {entry.start:,}, where the one before it ends at {place:,}")
            place = entry.end
        if self._header_end + place != size:
            _refuse(f"tensors of {place:,} bytes, where {size - self._header_end:,} follow the header")

    def tensor(self, name: str, rows: Sequence[int] | None = None) -> Tensor:
        """A tensor, or some rows (positions of its first axis) of it, in a memory of its own."""
        entry = self.entries[name]
        start, end = self._header_end + entry.start, self._header_end + entry.end
        if rows is None:
            data = self._bytes(start, end, end)
        else:
            width = (end - start) // max(1, entry.shape[0])
            data = b"".join(self._bytes(start + row * width, start + (row + 1) * width, end) for row in rows)
        shape = entry.shape if rows is None else (len(rows), *entry.shape[1:])
        if not data:
            return torch.empty(shape, dtype=TYPES[entry.dtype])
        if entry.dtype == "BOOL" and data.strip(b"\0\1"):  # torch would keep other bytes, which are neither
            _refuse(f"tensor {name!r} with booleans that are neither 0 nor 1")
        return torch.frombuffer(bytearray(data), dtype=TYPES[entry.dtype]).reshape(shape)

    def _bytes(self, start: int, end: int, size: int) -> bytes:
        data = self._read(start, end) if end <= size else b""
        if len(data) != end - start:
            raise MaskFileError("expected a safetensors file, got something shorter, or a file that was cut off")
        return data


def of_bytes(data: bytes) -> Container:
    return Container(lambda start, end: data[start:end], len(data))


def of_file(path: str | PathLike[str]) -> Container:
    """The tensors stay those of this file if another takes its name: a large one is kept open.

    A small one is not, for shards are opened by the hundred, and systems allow a process 256 open files, or 1,024.
    Raises OSError.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for ever
        raise MaskFileError("expected a file, got a directory, a device or a pipe")
    file = _File(path)
    return of_bytes(file.read(0, file.size)) if file.size <= AT_ONCE else Container(file.read, file.size)


class _File:
    def __init__(self, path: str | PathLike[str]):
        file = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, file)
        self._file, self.size = file, os.fstat(file).st_size

    def read(self, start: int, end: int) -> bytes:
        if hasattr(os, "pread"):
            return os.pread(self._file, end - start, start)
        os.lseek(self._file, start, os.SEEK_SET)  # on Windows
        return os.read(self._file, end - start)


def strict_json(data: bytes, what: str) -> Any:
    """JSON without repeated keys and numbers that are none. Raises MaskFileError."""
    try:
        return json.loads(data.decode(), object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        reason = "brackets in brackets without end" if isinstance(error, RecursionError) else error
        raise MaskFileError(f"expected a safetensors file, got one with {what} in no valid JSON ({reason})") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key that is there twice")
    return found


def _finite(text: str) -> float:
    number = float(text)
    return number if math.isfinite(number) else _no_number(text)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")


def _entry(name: str, entry: Any) -> Entry:
    """A tensor's line of the header, its numbers checked against each other."""
    if len(name) > NAME_CHARACTERS:
        _refuse(f"a tensor with a name of {len(name):,} characters")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        _refuse(f"tensor {name!r} without dtype, shape and data_offsets alone")
    dtype, shape, place = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in TYPES:
        _refuse(f"tensor {name!r} of a type other than {', '.join(TYPES)}")
    if not _whole(shape) or len(shape) > DIMENSIONS or not _whole(place) or len(place) != 2:
        _refuse(f"tensor {name!r} whose shape or data_offsets are not whole numbers of at least 0")
    if place[1] - place[0] != math.prod(shape) * TYPES[dtype].itemsize:
        _refuse(f"tensor {name!r} of shape {shape} and type {dtype} in {place[1] - place[0]:,} bytes")
    return Entry(dtype, tuple(shape), *place)


def _whole(numbers: Any) -> bool:
    return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 2**63 for n in numbers)


def _refuse(what: str) -> NoReturn:
    raise MaskFileError(f"expected a safetensors file, got one with {what}")
