"""Mask files as a stranger might make them: any header over any tensors, and files changed at random."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Mapping, Sequence
from random import Random
from typing import Any

import safetensors.torch

from nadhooks.errors import MaskFileError
from nadhooks.formats import mask_file
from nadhooks.masks import Masks
from nadhooks.tasks import TEXT

Entry = tuple[str, list[int], bytes]  # type, shape and bytes of a tensor


def encoded(header: Any, tensors: Mapping[str, Entry | None]) -> bytes:
    """A safetensors file that holds just this, true or not; tensors that are None are left out."""
    entries: dict[str, Any] = {"__metadata__": {"nadhooks": header if isinstance(header, str) else json.dumps(header)}}
    data = b""
    for name, entry in tensors.items():
        if entry is not None:
            dtype, shape, content = entry
            entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(content)]}
            data += content
    text = json.dumps(entries).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data


def header_and_tensors(data: bytes) -> tuple[dict[str, Any], dict[str, Entry]]:
    """The inverse of `encoded`."""
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    header = json.loads(entries.pop("__metadata__")["nadhooks"])
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry["data_offsets"]
        tensors[name] = (entry["dtype"], entry["shape"], data[start + begin : start + end])
    return header, tensors


HOSTILE_VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 2**31, 2**63, 10**30, 0.5, 1.0, -0.0, 1e308, "", "a", "b@input", "input",
    "output", "../../etc/passwd", "C:\\NUL", "a\0b", "\x1b[2J", "\u202e", "\ud800", "x" * 1001, "n01440764", "zero",
    "mean", [], {}, [[]], [{}], [0, 1], [3, 1], [2**62, 4], {"a": 1}, {"__proto__": []}, "BOOL", "U8", "F32", "I64",
]  # fmt: skip


def mutated(data: bytes, other: bytes, random: Random) -> bytes:
    """A file like `data`, changed in one to four places: in its bytes, its header or what it says of its tensors."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        change = random.choice((*CHANGES_OF_BYTES, *CHANGES_OF_HEADERS * 2))
        try:
            data = change(data, other, random)
        except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
            continue  # no longer a file whose header could be changed
    return data


def _flipped(data: bytes, other: bytes, random: Random) -> bytes:
    changed = bytearray(data)
    for _ in range(random.randint(1, 8)):
        changed[random.randrange(len(changed))] = random.randrange(256)
    return bytes(changed)


def _other_gates(data: bytes, other: bytes, random: Random) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    content = bytearray(data[start:])
    content[random.randrange(len(content))] = random.randrange(256)
    return data[:start] + bytes(content)


def _cut(data: bytes, other: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + (data[random.randint(start, len(data)) :] if random.random() < 0.5 else b"")


def _inserted(data: bytes, other: bytes, random: Random) -> bytes:
    start = random.randrange(len(data) + 1)
    return data[:start] + random.randbytes(random.randint(1, 16)) + data[start:]


def _spliced(data: bytes, other: bytes, random: Random) -> bytes:
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _with_header(data: bytes, other: bytes, random: Random) -> bytes:
    header, tensors = header_and_tensors(data)
    return encoded(_changed_inside(header, header_and_tensors(other)[0], random), tensors)


def _with_entry(data: bytes, other: bytes, random: Random) -> bytes:
    start = 8 + int.from_bytes(data[:8], "little")
    entries = _changed_inside(json.loads(data[8:start]), json.loads(data[8:start]), random)
    text = json.dumps(entries).encode(errors="surrogatepass")
    return len(text).to_bytes(8, "little") + text + data[start:]


CHANGES_OF_BYTES = (_flipped, _cut, _inserted, _spliced)
CHANGES_OF_HEADERS = (_with_header, _with_entry, _other_gates)


def _changed_inside(value: Any, donor: Any, random: Random) -> Any:
    """With one value somewhere inside replaced, renamed, repeated or left out."""
    if not isinstance(value, (dict, list)) or not value or random.random() < 0.1:
        return random.choice([*HOSTILE_VALUES, donor])
    key = random.choice(list(value) if isinstance(value, dict) else range(len(value)))
    way = random.random()
    changed: Any = dict(value) if isinstance(value, dict) else list(value)
    if way < 0.08:
        del changed[key]
    elif way < 0.16 and isinstance(changed, dict):
        changed[random.choice([text for text in HOSTILE_VALUES if isinstance(text, str)])] = changed.pop(key)
    elif way < 0.16:
        changed *= random.choice((2, 50))
    else:
        changed[key] = _changed_inside(value[key], donor, random)
    return changed


class Watch:
    """Opens a stranger's file as a user would, and says what went wrong.

    Right are a load, all gates in [0, 1] and the same bytes when it is written again and loaded, and MaskFileError.
    Wrong are any other error, code that runs, files that are written, and memory beyond a multiple of the file.
    """

    MULTIPLE, BASE = 40, 400_000  # bytes of memory for each byte of the file, and for the interpreter's own tables

    def __init__(self, seeds: Sequence[bytes]) -> None:
        self.events: list[str] = []
        self.watching = self.warm = False
        self.loaded = 0
        sys.addaudithook(self._hear)
        for data in (b"", *seeds, *(encoded({"format": 2}, header_and_tensors(seed)[1]) for seed in seeds)):
            self.wrong(data)  # what is imported and compiled once
        self.warm = True

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
        forbidden = event in ("exec", "compile", "import", "pickle.find_class", "subprocess.Popen", "os.system")
        changes = event in ("os.remove", "os.rename", "os.mkdir", "os.symlink", "socket.connect", "ctypes.dlopen")
        if self.watching and (writes or forbidden or changes):
            self.events.append(event)

    def wrong(self, data: bytes, memory: bool = False) -> str:
        """What is wrong, or nothing."""
        self.events.clear()
        self.watching = True
        if memory:
            tracemalloc.start()
        try:
            parts = mask_file.from_bytes(data)
            tables = [parts.values[site.name] for site in parts.sites]
            Masks(*parts)
        except MaskFileError as error:
            return "" if TEXT.fullmatch(str(error)) and len(str(error)) < 4000 else f"an unfit message: {error!r}"
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        finally:
            self.watching = False
            peak = tracemalloc.get_traced_memory()[1] if memory else 0
            if memory:
                tracemalloc.stop()
            if self.warm and self.events:
                raise AssertionError(f"{self.events} while a file was read")
            if peak > self.BASE + self.MULTIPLE * len(data):
                raise AssertionError(f"{peak:,} bytes of memory for a file of {len(data):,}")
        self.loaded += 1
        if not all(bool(((table >= 0) & (table <= 1)).all()) for table in tables):
            return "gates outside [0, 1]"
        try:
            safetensors.torch.load(data)  # never looser than the format that it is
            again = mask_file.from_bytes(mask_file.to_bytes(parts))
        except BaseException as error:
            return f"{type(error).__name__} when it was read otherwise or written: {error}"
        return "" if Masks(*again) == Masks(*parts) else "it changes when it is written again"
