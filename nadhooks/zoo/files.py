"""A user's own files: weights, and Python files that make models and say how images become their inputs."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..data import Transform
from ..errors import ModelError


def load_weights(model: nn.Module, path: str) -> None:
    """Loads a safetensors file or a state_dict (also under the key "state_dict"), strictly. Raises ModelError."""
    state = _state_dict(path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ModelError(
            f"{path}: expected the weights of this {type(model).__name__}, got others: "
            f"{_difference(model.state_dict(), state) or error}; name the model that they were saved from"
        ) from error


def _state_dict(path: str) -> dict[str, Any]:
    safe = path.endswith(".safetensors")
    expected = "a safetensors file" if safe else "a state_dict, written by torch.save(model.state_dict(), path)"
    try:
        if safe:
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ModelError(f"no weights file {path}") from error
    except OSError as error:
        raise ModelError(f"the weights file {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # unpickling and safetensors raise many kinds, with pages of advice
        pickled = re.search(r"GLOBAL (\S+)", str(error))
        got = f"a pickled {pickled[1]}" if pickled else "a damaged file or one of another kind"
        raise ModelError(f"{path}: expected {expected}, got {got}") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(key, str) for key in state):
        raise ModelError(f"{path}: expected {expected}, got a {type(state).__name__}")
    return state


def _difference(expected: dict[str, Any], got: dict[str, Any]) -> str:
    """What the names of two state_dicts, or else the shapes of the first tensors that differ, have not in common."""
    missing = [name for name in expected if name not in got]
    unexpected = [name for name in got if name not in expected]
    if missing or unexpected:
        both = ((missing, f"of {len(expected)} keys missing"), (unexpected, "unexpected"))
        return ", ".join(f"{len(names)} {what} (first {names[0]!r})" for names, what in both if names)
    for name, value in expected.items():
        shapes = [tuple(getattr(tensor, "shape", ())) for tensor in (value, got[name])]
        if shapes[0] != shapes[1]:
            return f"{name!r} has shape {shapes[1]}, expected {shapes[0]}"
    return ""


@contextmanager
def imports_beside(path: str) -> Iterator[None]:
    """Inside, a file's imports find the files beside it, as in `python file.py`."""
    folder = str(Path(path).resolve().parent)
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def module_from(path: str) -> Any:
    if not Path(path).is_file():
        raise ModelError(f"no file {path}")
    spec = importlib.util.spec_from_file_location(f"nadhooks_user_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise ModelError(f"{path} is not a Python file")
    if getattr(sys.modules.get(spec.name), "__file__", None) != spec.origin:  # another folder may have its namesake
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # before it runs: its dataclasses look themselves up
        try:
            with imports_beside(path):
                spec.loader.exec_module(module)
        except BaseException as error:  # it is the user's program
            del sys.modules[spec.name]
            if not isinstance(error, (Exception, SystemExit)):
                raise
            raise ModelError(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return sys.modules[spec.name]


def own_transform(spec: str) -> Transform | None:
    """The function `transform` of `file.py:factory`: image -> (channels, height, width). None where there is none."""
    source = spec.partition(":")[0]
    transform = getattr(module_from(source), "transform", None) if source.endswith(".py") else None
    return transform if callable(transform) else None
