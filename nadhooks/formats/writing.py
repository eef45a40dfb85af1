"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from os import PathLike
from pathlib import Path


def check_writable(path: str | PathLike[str]) -> None:
    """Raises OSError where `write_bytes` would, and leaves everything as it is."""
    path = Path(path)
    try:
        with tempfile.NamedTemporaryFile(prefix=f".{path.name}.", dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent)) from error


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Writes to a temporary file in the same directory, then renames. Raises OSError; never leaves half a file."""
    path = Path(path)
    mask = os.umask(0)
    os.umask(mask)
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:  # it would name a file that nobody asked for
        raise OSError(error.errno, error.strerror, str(path.parent)) from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private; the user's own setting counts
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
