"""Mask files: safetensors with one JSON text in the metadata. Bytes apart from paths, in inverse pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from ..errors import MaskFileError
from .writing import write_bytes

KEY = "nadhooks"


def to_bytes(header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> bytes:
    """The same content gives the same bytes: all metadata stands in one key, with sorted JSON."""
    text = json.dumps(header, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return safetensors.torch.save(dict(tensors), metadata={KEY: text})


def from_bytes(data: bytes) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises MaskFileError when the bytes are not safetensors or carry no header of nadhooks."""
    try:
        tensors = safetensors.torch.load(data)
        length = int.from_bytes(data[:8], "little")  # safetensors' own layout: header length, header as JSON, tensors
        metadata = json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError, KeyError) as error:
        raise MaskFileError(f"expected a safetensors file, got something else or a truncated one ({error})") from error
    return _header(metadata), tensors


def write(path: str | PathLike[str], header: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    try:
        write_bytes(path, to_bytes(header, tensors))
    except OSError as error:
        raise MaskFileError(f"cannot write {path}: {error.strerror or error}") from error


def read(path: str | PathLike[str]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Raises MaskFileError as `from_bytes` does, and when the file cannot be read."""
    try:
        return from_bytes(Path(path).read_bytes())
    except OSError as error:
        raise MaskFileError(f"cannot read it: {error.strerror or error}") from error


def _header(metadata: Mapping[str, str]) -> dict[str, Any]:
    if KEY not in metadata:
        raise MaskFileError(f"expected a mask file, got safetensors without the metadata key {KEY!r}")
    try:
        header = json.loads(metadata[KEY])
    except ValueError as error:
        raise MaskFileError(f"expected JSON in the metadata key {KEY!r} ({error})") from error
    if not isinstance(header, dict):
        raise MaskFileError(f"expected a JSON object in the metadata key {KEY!r}, got {type(header).__name__}")
    return header
