"""Files out of and into the Hugging Face Hub's repositories. The only file that knows huggingface_hub by name."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from .._version import __version__
from ..errors import MaskFileError

SCHEME = "hf://"
FILE = "masks.safetensors"  # what a repository's mask file is called where nobody says otherwise
PATIENCE = 10  # seconds to wait for an answer
LOG_IN = "log in with `hf auth login`, or set HF_TOKEN"
NAME = re.compile(r"[\w.-]+/[\w.-]+")
ADDRESS = re.compile(rf"hf://({NAME.pattern})(?:@(refs/(?:pr|convert)/[^/@]+|[^/@]+))?(?:/(.*))?")
PAGE = re.compile(rf"/({NAME.pattern})/(?:blob|resolve|raw)/([^/?#]+)/([^?#]+)")


class Place(NamedTuple):
    """A file in a repository: `org/name`, a branch, tag or commit (None: main), and the path inside."""

    repo: str
    revision: str | None
    file: str

    def __str__(self) -> str:
        return f"{self.file} of {self.repo}{f' at {self.revision}' if self.revision else ''}"


def place(address: str) -> Place:
    """Of `hf://org/name[@revision][/file]`. A revision's slashes are %2F, except in refs/pr/N. Raises MaskFileError."""
    parts = ADDRESS.fullmatch(address)
    if parts is None:
        raise MaskFileError("expected hf://org/name, hf://org/name@revision or hf://org/name@revision/file")
    revision = unquote(parts[2]) if parts[2] else None
    for what, path in (("revision", revision or ""), ("file", parts[3] or "")):
        if path.startswith("/") or ".." in path:  # they become paths in the cache
            raise MaskFileError(f"expected a {what} without '..' and leading slash, got {path!r}")
    return Place(parts[1], revision, parts[3] or FILE)


def address_of(url: str) -> str | None:
    """The hf:// address of a file's page or download link on the Hub; None for any other URL."""
    page = PAGE.fullmatch(url.removeprefix(_endpoint()).partition("?")[0]) if url.startswith(_endpoint()) else None
    return f"{SCHEME}{page[1]}@{page[2]}/{unquote(page[3])}" if page else None


def fetch(address: str, limit: int) -> Path:
    """The file's path in the Hub's cache; downloaded where that is not the newest, and of at most `limit` bytes.

    Offline (HF_HUB_OFFLINE), and where the Hub cannot be reached, the cache alone decides. Raises MaskFileError.
    """
    import huggingface_hub

    wanted = place(address)
    named: dict[str, Any] = {"repo_id": wanted.repo, "filename": wanted.file, "revision": wanted.revision}
    with _quiet(), _explained(wanted.repo, wanted.revision):
        cached = huggingface_hub.try_to_load_from_cache(**named)
        path = Path(cached) if isinstance(cached, str) else None  # else None, or a mark that there is no such file
        if path is not None and re.fullmatch("[0-9a-f]{40}", wanted.revision or ""):  # a commit stays what it is
            return path
        if _offline():
            return _or_fail(path, f"{wanted} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it")
        try:
            if huggingface_hub.__version__ < "1":
                _answer()  # some of these clients cannot be told to ask once
            url = huggingface_hub.hf_hub_url(**named)
            size = huggingface_hub.get_hf_file_metadata(url, timeout=PATIENCE).size
        except Exception as error:  # of huggingface_hub, requests, httpx, httpx2: by its version
            if _missing(error):
                raise MaskFileError(f"{wanted.repo} has no file {wanted.file!r}{_others(wanted)}") from error
            if not _unreachable(error):
                raise
            return _or_fail(path, f"{_reason(error, *wanted[:2])}; {wanted} is not in the cache either", error)
        if size is None or size > limit:
            got = "one of unknown size" if size is None else f"{size:,}"
            raise MaskFileError(f"expected a mask file of at most {limit:,} bytes, got {got}; download it yourself")
        named |= {"library_name": "nadhooks", "library_version": __version__, "etag_timeout": PATIENCE}
        return Path(huggingface_hub.hf_hub_download(**named))


def upload(
    repo: str,
    files: Mapping[str, bytes],
    *,
    message: str,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """One commit with these files, {path: bytes}; returns its address, `hf://org/name@commit`.

    The repository is made where there is none, private or not (None: as the organisation has it); one that exists
    stays as it is. revision: an existing branch, main by default. create_pr: as a pull request to it, whose address
    is `hf://org/name@refs/pr/N`. Files that the repository has already are not sent again. Raises MaskFileError.
    """
    import huggingface_hub

    if not NAME.fullmatch(repo):
        raise MaskFileError(f"expected a repository org/name, got {repo!r}")
    if _offline():
        raise MaskFileError(f"cannot upload to {repo}: HF_HUB_OFFLINE forbids it")
    api = huggingface_hub.HfApi(token=token, library_name="nadhooks", library_version=__version__)
    # streams, not bytes: they are sent by plain HTTP with every version, with and without hf_xet. That would cut files
    # into chunks that others may have too, which packed bits never have
    added = [huggingface_hub.CommitOperationAdd(path, io.BytesIO(data)) for path, data in files.items()]
    with _quiet(), _explained(repo, revision):
        _answer()
        api.create_repo(repo, private=private, exist_ok=True)
        commit = api.create_commit(
            repo, operations=added, commit_message=message, revision=revision, create_pr=create_pr
        )
    return f"{SCHEME}{repo}@{commit.pr_revision or commit.oid}"


def front_matter(**fields: Any) -> str:
    """The YAML that a model card begins with, for the Hub's search."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**fields).to_yaml()}\n---"


@contextmanager
def without_waiting() -> Iterator[None]:
    """While the Hub is down, its client (from 1.0 on) looks into its cache alone, instead of trying for 23 s a file."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not before:
        try:
            _answer()
        except Exception:  # whatever the reason is, the client will find it too
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


# --- pieces ----------------------------------------------------------------------------------------------------------


def _endpoint() -> str:
    from huggingface_hub import constants

    return constants.ENDPOINT


def _offline() -> bool:
    from huggingface_hub import constants

    return constants.HF_HUB_OFFLINE


def _answer() -> None:
    """Whether the Hub answers at all, asked once. The client would ask six times, or wait for one answer for ever."""
    from huggingface_hub.utils import get_session

    status = get_session().head(_endpoint(), timeout=PATIENCE).status_code
    if status >= 500:
        raise ConnectionError(f"it answers {status}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the client's warnings, for every one comes back as an error, and its progress bars: files are small."""
    from huggingface_hub import utils

    verbosity, bars = utils.logging.get_verbosity(), not utils.are_progress_bars_disabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        utils.logging.set_verbosity_error()
        utils.disable_progress_bars()
        try:
            yield
        finally:
            utils.logging.set_verbosity(verbosity)
            if bars:
                utils.enable_progress_bars()


@contextmanager
def _explained(repo: str, revision: str | None) -> Iterator[None]:
    """Every error of the client's, of which there are many kinds, as a MaskFileError of one line."""
    try:
        yield
    except MaskFileError:
        raise
    except Exception as error:
        raise MaskFileError(_reason(error, repo, revision)) from error


def _reason(error: Exception, repo: str, revision: str | None) -> str:
    from huggingface_hub import errors

    host, status = _endpoint(), _status(error)
    if isinstance(error, errors.GatedRepoError):
        return f"{repo} is open to those who accept its conditions, on {host}/{repo}; then {LOG_IN}"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{host} has no model repository {repo}, or a private one; if it is yours, {LOG_IN}"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{repo} has no revision {revision!r}"
    if status in (401, 403):
        return f"{host} does not let you do that with {repo}; {LOG_IN}, with a token that may"
    if status is not None and status >= 500:
        return f"{host} cannot be reached (it answers {status})"
    if _unreachable(error):
        return f"{host} cannot be reached ({_one_line(error)})"
    return _one_line(error)


def _one_line(error: Exception) -> str:
    """What the server said, else the message, without its pages of advice."""
    cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error  # of an upload's thread
    text = " ".join(str(getattr(cause, "server_message", None) or cause).split()) or type(cause).__name__
    text = text.partition(" For more information check: ")[0]
    return text if len(text) <= 300 else f"{text[:299]}…"


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _missing(error: Exception) -> bool:
    from huggingface_hub import errors

    return isinstance(error, errors.EntryNotFoundError) and _status(error) == 404


def _unreachable(error: Exception) -> bool:
    """No answer, or that of a server out of order. The libraries that raise it differ, but all of them raise it."""
    status = _status(error)
    away = type(error).__module__.partition(".")[0] in ("httpx", "httpx2", "httpcore", "requests", "urllib3")
    return status >= 500 if status is not None else away or isinstance(error, (ConnectionError, TimeoutError))


def _or_fail(path: Path | None, otherwise: str, cause: Exception | None = None) -> Path:
    if path is None:
        raise MaskFileError(otherwise) from cause
    return path


def _others(wanted: Place) -> str:
    """The files that could have been meant."""
    import huggingface_hub

    found = huggingface_hub.HfApi().model_info(wanted.repo, revision=wanted.revision, timeout=PATIENCE)
    known = sorted(each.rfilename for each in found.siblings or () if each.rfilename.endswith(".safetensors"))
    more = f" and {len(known) - 5} more" if len(known) > 5 else ""
    return f"; it has {', '.join(known[:5])}{more}" if known else ", nor any other safetensors file"
