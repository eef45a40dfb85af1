"""Files at addresses: hf:// through the Hub's cache, https:// and http://, and s3://, gs:// … through fsspec."""

from __future__ import annotations

import http.client
import re
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from .._version import __version__
from ..errors import MaskFileError
from . import hub

MAX_BYTES = 2**30  # 1,000 soft masks over 250,000 units; a stranger's address must not fill the memory or the disk
PATIENCE = 10  # seconds to wait for more bytes
CHUNK = 2**20
STORES = {  # of those that fsspec knows, the ones that hold files and nothing else; what to install for each
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs",
    "oss": "ossfs", "oci": "ocifs", "hdfs": "pyarrow", "sftp": "paramiko", "file": "fsspec", "memory": "fsspec",
}  # fmt: skip
WITH_EXTRAS = {"s3fs": "nadhooks[s3]", "gcsfs": "nadhooks[gs]"}


def is_remote(path: object) -> bool:
    """Whether it is an address, `scheme://…`, and not a path."""
    return isinstance(path, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", path) is not None


def fetch(address: str, *, limit: int = MAX_BYTES) -> Path | bytes:
    """What lies at an address: a path in the Hub's cache for hf://, the bytes themselves for all others.

    Files of more than `limit` bytes are refused, by what the server says of them and by counting. Raises MaskFileError
    with one line that does not repeat the address.
    """
    scheme = address.partition("://")[0].lower()
    if scheme == "hf":
        return hub.fetch(address, limit)
    if scheme in ("http", "https"):
        on_the_hub = hub.address_of(address)  # a link from a browser: through the cache, and with the user's token
        return hub.fetch(on_the_hub, limit) if on_the_hub else _from_web(address, limit)
    if scheme in STORES:
        return _from_store(address, STORES[scheme], limit)
    known = ", ".join(["hf", "https", "http", *STORES])
    raise MaskFileError(f"expected a path or an address that begins with one of {known}, got {scheme}://")


def _from_web(url: str, limit: int) -> bytes:
    try:
        request = urllib.request.Request(url, headers={"User-Agent": f"nadhooks/{__version__}"})
        with urllib.request.build_opener(_Redirects).open(request, timeout=PATIENCE) as response:
            length = response.headers.get("Content-Length", "")
            size = int(length) if length.isdecimal() else None
            return _counted(response.read1, size, limit)
    except urllib.error.HTTPError as error:
        raise MaskFileError(f"the server answers {error.code} ({_one_line(error.reason)})") from error
    except urllib.error.URLError as error:
        raise MaskFileError(f"the server cannot be reached ({error.reason})") from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # timeouts, cut connections, not a URL
        raise MaskFileError(f"cannot fetch it: {_one_line(error)}") from error


class _Redirects(urllib.request.HTTPRedirectHandler):
    """To other web addresses only, and from https to no less."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        allowed = ("https:",) if req.type == "https" else ("https:", "http:")
        if not newurl.lower().startswith(allowed):
            raise MaskFileError(f"the server sends us on to {newurl}, expected an address with {' or '.join(allowed)}")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _from_store(url: str, package: str, limit: int) -> bytes:
    install = f"pip install '{WITH_EXTRAS.get(package, package)}'"
    if "::" in url:  # chains of file systems: archives in archives
        raise MaskFileError("expected the address of one file, got a chain with `::`")
    try:
        import fsspec

        files, path = fsspec.core.url_to_fs(url)
        known = files.info(path)
        if known.get("type") == "directory":
            raise MaskFileError("expected the address of a file, got that of a directory")
        with files.open(path, "rb") as file:
            return _counted(file.read, known.get("size"), limit)
    except MaskFileError:
        raise
    except FileNotFoundError as error:
        raise MaskFileError("there is no such file") from error
    except ImportError as error:
        raise MaskFileError(f"{url.partition('://')[0]}:// needs {package}: {install}") from error
    except Exception as error:  # each store has its own kinds
        raise MaskFileError(f"cannot fetch it: {_one_line(error)}") from error


def _counted(read: Callable[[int], Any], size: int | None, limit: int) -> bytes:
    """Everything, piece by piece, as long as it stays within the limit and is as much as was announced."""
    if size is not None and size > limit:
        raise MaskFileError(f"expected a mask file of at most {limit:,} bytes, got {size:,}; download it yourself")
    data = bytearray()
    while piece := read(CHUNK):
        data += piece
        if len(data) > limit:
            raise MaskFileError(f"expected a mask file of at most {limit:,} bytes, got more; download it yourself")
    if size is not None and len(data) != size:
        raise MaskFileError(f"the connection ended after {len(data):,} of {size:,} bytes")
    return bytes(data)


def _one_line(error: object) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
