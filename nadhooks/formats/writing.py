"""Files that appear whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from os import PathLike
from pathlib import Path


def check_writable(path: str | PathLike[str]) -> None:
    """Raises OSError where `write_bytes` would, and leaves everything as it is."""
    path = _target(Path(path))
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return
    try:
        with tempfile.NamedTemporaryFile(prefix=_prefix(path), dir=path.parent):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path.parent)) from error


def write_bytes(path: str | PathLike[str], data: bytes) -> None:
    """Writes to a temporary file in the same directory, then renames. Raises OSError; never leaves half a file.

    Links are followed. Devices and pipes stay what they are, and are written to.
    """
    path = _target(Path(path))
    if _is_special(path):
        path.write_bytes(data)
        return
    mask = os.umask(0)
    os.umask(mask)
    try:
        handle, temporary = tempfile.mkstemp(prefix=_prefix(path), dir=path.parent)
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


def _target(path: Path) -> Path:
    if "\0" in str(path):  # or ValueError, from wherever the name is used first
        raise OSError(errno.EINVAL, "a null character in its name", str(path))
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _prefix(path: Path) -> str:
    """Of the temporary file's name, which has to be no longer than names may be."""
    return f".{path.name[:40]}."
