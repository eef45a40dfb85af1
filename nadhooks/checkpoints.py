"""A run of learning on disk, so that it can go on after it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from os import PathLike, fspath
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import safetensors
import safetensors.torch
from torch import Tensor

from .batching import digest, moved
from .errors import LearningError
from .formats.writing import check_writable, write_bytes

KEY, DIGEST = "nadhooks-run", "nadhooks-digest"
VERSION = 7

Tables = Mapping[str, Mapping[str, Tensor]]  # what each is -> {site: values}


class Stand(NamedTuple):
    """How far a phase is: what is learnt, and its updates' memory, before that step, counted from 0; -1 is finished.

    samples: that went through gates until then, in this phase and those before. keys: a hash of what they are known by.
    """

    step: int
    tables: dict[str, dict[str, Tensor]]
    samples: int = 0
    keys: str = ""


class Held(str):
    """The path of a checkpoint that stays when its run is over."""


@contextmanager
def held(path: str | PathLike[str] | None) -> Iterator[Held | None]:
    """A checkpoint for `learn` that goes when the block is over without an error: when its masks are written, too.

        with nadhooks.checkpoints.held("run.safetensors") as run:
            nadhooks.learn(model, loader, checkpoint=run).save("masks.safetensors")

    None is no checkpoint.
    """
    file = None if path is None else Path(path).absolute()
    yield None if path is None else Held(fspath(path))
    if file is not None and _digest_of(file):  # masks may have been written there
        file.unlink()


class Checkpoint:
    """Where a run of several phases stands: each phase a loop over steps, in the same order whenever it is run.

    path: a safetensors file, None for nowhere. every: seconds between writings. run: what must be the same for the run
    to go on.

    Raises LearningError for a file that is no checkpoint or that of another run, and where another run, a second of the
    same call too, writes to it meanwhile.
    """

    def __init__(self, path: str | PathLike[str] | None, every: float, run: Mapping[str, Any]):
        if not (path is None or isinstance(path, (str, PathLike))):
            raise LearningError(f"checkpoint: expected a path, got {path!r}")
        self.path, self.held = None if path is None else Path(path), isinstance(path, Held)
        self.file = None if path is None else Path(path).absolute()  # wherever the process goes meanwhile
        self.every, self.run = every, json.loads(json.dumps(run))
        self.data = self.found_data = ""  # what the run learns from, here and in the file
        self.mine: str | None = None  # the digest of the file as this run found or left it
        self.phases: list[Stand] = []
        self.phase = -1
        self.written = time.monotonic()
        if self.path is not None:
            self._check(self.path)
            self.phases = self._read(self.path) if self.path.exists() else []
        self.resumed = bool(self.phases)

    def learns_from(self, data: Any) -> None:
        """What the run learns from, which must be the same as well, once it is read."""
        self.data = "" if self.path is None else digest(data).hex()

    def refuse(self, why: str) -> NoReturn:
        raise LearningError(
            f"{self.path} is the checkpoint of another run{why}; delete it to begin anew, or name another file"
        )

    def begin(self, tables: Tables) -> Stand:
        """The next phase: from its first step on, or where it stood."""
        self.phase += 1
        if self.phase < len(self.phases):
            stand = self.phases[self.phase]
            shapes = [
                {(part, name): x.shape for part in tables for name, x in found.get(part, {}).items()}
                for found in (stand.tables, tables)
            ]
            if shapes[0] != shapes[1]:
                self.refuse(", of other tasks")
            if self.data != self.found_data:
                self.refuse(": its data is other than here")
            device = next(x.device for table in tables.values() for x in table.values())
            return stand._replace(tables=moved(stand.tables, device))
        if self.path is not None:
            self.phases.append(Stand(0, _copied(tables)))
        return Stand(0, _copied(tables))

    def note(self, index: int, tables: Tables, samples: int = 0, keys: str = "") -> None:
        """After so many steps of the phase; -1 when it is finished. Writes if it is time to."""
        if self.path is None:
            return
        for name, x in (item for table in tables.values() for item in table.items()):
            if not isinstance(x, Tensor):
                raise LearningError(
                    f"a checkpoint holds tensors, got {type(x).__name__} for {name!r} in the state of an update; make "
                    "it a tensor"
                )
        self.phases[self.phase] = Stand(index, _copied(tables), samples, keys)
        if time.monotonic() - self.written >= self.every:
            self.write()

    def write(self) -> None:
        if self.file is None or not self.phases:
            return
        if _digest_of(self.file) not in (None, self.mine):
            raise LearningError(
                f"the checkpoint {self.path} was written by another run meanwhile; name another file for one of them"
            )
        tensors = {
            f"{number}/{part}/{name}": x.detach().cpu().contiguous()
            for number, stand in enumerate(self.phases)
            for part, table in stand.tables.items()
            for name, x in table.items()
        }
        # the file has them by name; the order of sites counts for methods that take them by turns
        about = {"version": VERSION, "run": self.run, "data": self.data, "tensors": list(tensors)}
        about |= {"steps": [stand.step for stand in self.phases], "keys": [stand.keys for stand in self.phases]}
        about["samples"] = [stand.samples for stand in self.phases]
        text = json.dumps(about, sort_keys=True)
        told = {KEY: text, DIGEST: digest([text, *tensors.values()]).hex()}
        try:
            write_bytes(self.file, safetensors.torch.save(tensors, told))
        except OSError as error:
            raise LearningError(f"cannot write the checkpoint {self.path}: {error.strerror}") from error
        self.mine, self.written = told[DIGEST], time.monotonic()

    def described(self) -> str:
        """What there is to go on from, after a failure."""
        there = self.file is not None and self.file.exists()
        return f"the last good state is in {self.path}" if there else ""

    def remove(self) -> None:
        """When the run is over."""
        if self.file is not None and not self.held and _digest_of(self.file) == self.mine:
            self.file.unlink(missing_ok=True)

    @staticmethod
    def _check(path: Path) -> None:
        """Better now than after a long time."""
        try:
            check_writable(path)
            other = path.exists() and not path.is_file()
        except OSError as error:
            raise LearningError(f"cannot write the checkpoint {path}: {error.strerror}") from error
        if other:
            raise LearningError(
                f"{path} is not a checkpoint of nadhooks: it is a folder or a device; name another file"
            )

    def _read(self, path: Path) -> list[Stand]:
        try:
            with safetensors.safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
                told = json.loads(metadata[KEY])
                self._check_run(told.get("version"), told["run"])  # before the rest, which versions differ in
                self.found_data = told["data"]
                stands = zip(told["steps"], told["samples"], told["keys"], strict=True)
                phases = [Stand(step, {}, samples, keys) for step, samples, keys in stands]
                tensors = {key: file.get_tensor(key) for key in told["tensors"]}
            self.mine = metadata[DIGEST]
            if digest([metadata[KEY], *tensors.values()]).hex() != self.mine:
                raise LearningError(f"the checkpoint {path} is damaged; delete it to begin anew")
            for key, x in tensors.items():
                number, part, name = key.split("/", 2)
                phases[int(number)].tables.setdefault(part, {})[name] = x
        except LearningError:
            raise
        except Exception as error:  # of many kinds
            raise LearningError(f"{path} is not a checkpoint of nadhooks: {error}; name another file") from error
        return phases

    def _check_run(self, version: object, found: dict[str, Any]) -> None:
        differs = [name for name in {**self.run, **found} if found.get(name) != self.run.get(name)]
        if differs:
            name = differs[0]
            one, other = repr(found.get(name)), repr(self.run.get(name))
            self.refuse(f": its {name} is {_short(one, other)}, here {_short(other, one)}")
        if version != VERSION:
            self.refuse(f": its version is {version!r}, here {VERSION}")


def _digest_of(path: Path) -> str | None:
    """What the file at the path holds now: None without a file, empty where it is no checkpoint."""
    try:
        with safetensors.safe_open(str(path), framework="pt") as file:
            return (file.metadata() or {}).get(DIGEST, "")
    except FileNotFoundError:
        return None
    except (OSError, safetensors.SafetensorError):
        return ""


def _copied(tables: Tables) -> dict[str, dict[str, Tensor]]:
    return {part: dict(table) for part, table in tables.items()}


def _short(text: str, other: str) -> str:
    """At most 80 characters of it, about where it begins to differ from the other."""
    if len(text) <= 80:
        return text
    pairs = enumerate(zip(text, other, strict=False))
    begin = max(0, next((place for place, (a, b) in pairs if a != b), 0) - 40)
    end = begin + 78
    return "…" * (begin > 0) + text[begin:end] + "…" * (end < len(text))
