"""Mask files as a stranger might make them: any header over any tensors, and files changed at random."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

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
