from __future__ import annotations

import io
import logging
import time
import urllib.request
from functools import partial
from http.client import HTTPMessage
from pathlib import Path
from typing import Any

import fsspec
import huggingface_hub
import pytest
from huggingface_hub import constants

from nadhooks.errors import MaskFileError
from nadhooks.formats import hub as client
from nadhooks.formats import remote

from .hub import NOWHERE, Hub, reach

DATA = {"masks.safetensors": b"abc" * 100, "other.safetensors": b"other", "README.md": b"hello"}


def got(address: str, **more: int) -> bytes:
    found = remote.fetch(address, **more)
    return found if isinstance(found, bytes) else found.read_bytes()


def downloads(hub: Hub) -> list[str]:
    return [line for line in hub.log if line.startswith("GET") and not line.startswith("GET /api/")]


def refusal(address: str, **more: int) -> str:
    with pytest.raises(MaskFileError) as caught:
        remote.fetch(address, **more)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_addresses_have_a_scheme_and_paths_have_none() -> None:
    assert all(map(remote.is_remote, ["hf://a/b", "https://x/y", "S3://x/y", "what://ever"]))
    assert not any(map(remote.is_remote, ["a/b", "/a", "C://x", "C:\\x", "hf:/a/b", "a b://c", Path("hf://a/b"), 3]))


def test_an_address_on_the_hub_names_repository_revision_and_file() -> None:
    assert client.place("hf://us/r-1.x") == ("us/r-1.x", None, "masks.safetensors")
    assert client.place("hf://us/r/") == ("us/r", None, "masks.safetensors")
    assert client.place("hf://us/r@v1") == ("us/r", "v1", "masks.safetensors")
    assert client.place("hf://us/r@refs/pr/1/a/b") == ("us/r", "refs/pr/1", "a/b")
    assert client.place("hf://us/r@a%2Fb/a@b") == ("us/r", "a/b", "a@b")
    assert client.place("hf://us/r/a b.safetensors") == ("us/r", None, "a b.safetensors")
    for wrong in ("hf://us", "hf://", "hf://us/", "hf://us/r@", "hf:///us/r", "hf://us/r?x=1"):
        with pytest.raises(MaskFileError, match="expected hf://org/name"):
            client.place(wrong)
    for wrong in ("hf://us/r/../../x", "hf://us/r//etc/x", "hf://us/r@..", "hf://us/r@%2Fetc", "hf://us/r@a%2F..%2F.."):
        with pytest.raises(MaskFileError, match=r"without '\.\.' and leading slash"):  # in the cache they are paths
            client.place(wrong)


# --- from the Hub ----------------------------------------------------------------------------------------------------


def test_files_come_from_the_hub_once_and_then_from_the_cache(hub: Hub) -> None:
    commit = hub.made("us/r", DATA)
    assert got("hf://us/r") == DATA["masks.safetensors"]
    assert got("hf://us/r/README.md") == b"hello"
    assert len(downloads(hub)) == 2
    hub.log.clear()
    assert got("hf://us/r") == DATA["masks.safetensors"]
    assert downloads(hub) == []
    assert hub.log  # but the Hub was asked whether it is still the newest
    hub.log.clear()
    assert got(f"hf://us/r@{commit}") == DATA["masks.safetensors"]
    assert hub.log == []  # a commit stays what it is


def test_a_revision_is_a_branch_a_tag_a_pull_request_or_a_commit(hub: Hub) -> None:
    first = hub.made("us/r", DATA)
    repo = hub.repos["us/r"]
    for ref in ("main", "v2", "team/try", "refs/pr/3"):
        repo.commit(ref, "main", {"masks.safetensors": ref.encode()}, ref)
    assert got("hf://us/r") == b"main"
    assert got("hf://us/r@v2") == b"v2"
    assert got("hf://us/r@team%2Ftry") == b"team/try"
    assert got("hf://us/r@refs/pr/3") == b"refs/pr/3"
    assert got(f"hf://us/r@{first}/masks.safetensors") == DATA["masks.safetensors"]


def test_links_from_a_browser_lead_through_the_cache_too(hub: Hub) -> None:
    hub.made("us/r", DATA, private=True)
    for way in ("blob", "resolve"):
        path = remote.fetch(f"{hub.url}/us/r/{way}/main/other.safetensors?download=true")
        assert isinstance(path, Path)
        assert path.read_bytes() == b"other"
    assert client.address_of(f"{hub.url}/us/r") is None
    assert client.address_of("https://example.org/us/r/blob/main/a") is None


def test_what_the_hub_does_not_have_is_named(hub: Hub) -> None:
    hub.made("us/r", DATA)
    assert refusal("hf://us/r/x.safetensors") == (
        "us/r has no file 'x.safetensors'; it has masks.safetensors, other.safetensors"
    )
    hub.made("us/empty", {"README.md": b"hello"})
    assert refusal("hf://us/empty").endswith("no file 'masks.safetensors', nor any other safetensors file")
    assert refusal("hf://us/r@v9") == "us/r has no revision 'v9'"
    assert refusal("hf://us/none").startswith(f"{hub.url} has no model repository us/none, or a private one")
    assert refusal("hf://us/--r").startswith("Repo id must use alphanumeric chars")


def test_what_the_caller_may_not_read_is_refused_with_a_remedy(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.made("them/private", DATA, private=True)
    hub.made("them/gated", DATA, gated=True)
    assert "or a private one; if it is yours, log in with `hf auth login`, or set HF_TOKEN" in refusal(
        "hf://them/private"
    )
    assert f"accept its conditions, on {hub.url}/them/gated" in refusal("hf://them/gated")
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped")
    assert "does not let you do that with them/gated; log in" in refusal("hf://them/gated")


def test_large_files_are_refused_before_they_are_downloaded(hub: Hub) -> None:
    hub.made("us/r", DATA)
    assert refusal("hf://us/r", limit=299).startswith("expected a mask file of at most 299 bytes, got 300")
    assert downloads(hub) == []
    assert got("hf://us/r", limit=300) == DATA["masks.safetensors"]


def test_a_hub_that_is_down_is_noticed_at_once_and_the_cache_serves(
    hub: Hub, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.made("us/r", DATA)
    got("hf://us/r")
    begun = time.monotonic()
    hub.broken = 503
    assert got("hf://us/r") == DATA["masks.safetensors"]
    assert refusal("hf://us/r2") == (
        f"{hub.url} cannot be reached (it answers 503); masks.safetensors of us/r2 is not in the cache either"
    )
    reach(monkeypatch, NOWHERE)
    assert got("hf://us/r@main") == DATA["masks.safetensors"]
    assert refusal("hf://us/r@v2").startswith(f"{NOWHERE} cannot be reached (")
    assert time.monotonic() - begun < 5
    assert capfd.readouterr() == ("", "")


def test_offline_the_cache_alone_decides(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.made("us/r", DATA)
    got("hf://us/r")
    hub.log.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert got("hf://us/r") == got(f"hf://us/r@{commit}") == DATA["masks.safetensors"]
    assert refusal("hf://us/r@v2/x") == "x of us/r at v2 is not in the cache, and HF_HUB_OFFLINE forbids to fetch it"
    with pytest.raises(MaskFileError, match="cannot upload to us/r: HF_HUB_OFFLINE forbids it"):
        client.upload("us/r", {}, message="m")
    assert hub.log == []


def test_the_clients_logging_and_progress_bars_are_left_as_they_were(hub: Hub) -> None:
    hub.made("us/r", DATA)
    huggingface_hub.logging.set_verbosity(logging.INFO)
    try:
        got("hf://us/r")
        refusal("hf://us/r/no")
        assert huggingface_hub.logging.get_verbosity() == logging.INFO
    finally:
        huggingface_hub.logging.set_verbosity(logging.WARNING)
    assert not huggingface_hub.utils.are_progress_bars_disabled()


@pytest.mark.skipif(huggingface_hub.__version__ < "1", reason="clients before 1.0 wait all the same")
def test_without_waiting_an_unreachable_hub_is_treated_as_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with client.without_waiting():
        assert not constants.HF_HUB_OFFLINE
    hub.broken = 503
    with client.without_waiting():
        assert constants.HF_HUB_OFFLINE
    reach(monkeypatch, NOWHERE)
    with client.without_waiting():
        assert constants.HF_HUB_OFFLINE
        begun = time.monotonic()
        with pytest.raises(FileNotFoundError):
            huggingface_hub.hf_hub_download("us/r", "masks.safetensors")
        assert time.monotonic() - begun < 2  # of itself it tries for 23 s
    assert not constants.HF_HUB_OFFLINE


# --- to the Hub ------------------------------------------------------------------------------------------------------


def test_an_upload_is_one_commit_in_a_new_repository(hub: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    address = client.upload("us/r", DATA, message="why", private=True)
    repo = hub.repos["us/r"]
    assert address == f"hf://us/r@{repo.refs['main']}"
    assert repo.private
    assert repo.messages == ["initial", "why"]
    assert DATA.items() <= repo.commits[repo.refs["main"]].items()
    assert set(hub.large.values()) == {DATA["masks.safetensors"], b"other"}  # README.md is no large file
    assert got(address) == DATA["masks.safetensors"]
    assert capfd.readouterr() == ("", "")


def test_the_same_upload_again_is_no_new_commit(hub: Hub) -> None:
    address = client.upload("us/r", DATA, message="first")
    assert client.upload("us/r", DATA, message="second") == address
    assert client.upload("us/r", {**DATA, "README.md": b"new"}, message="third") != address
    assert hub.repos["us/r"].messages == ["initial", "first", "third"]


def test_a_pull_request_leaves_the_branch_alone(hub: Hub) -> None:
    hub.made("them/r", DATA)
    address = client.upload("them/r", {"masks.safetensors": b"better"}, message="please", create_pr=True)
    assert address == "hf://them/r@refs/pr/1"
    assert got(address) == b"better"
    assert got("hf://them/r") == DATA["masks.safetensors"]


def test_refused_uploads_say_why_in_one_line(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(repo: str = "us/r", files: dict[str, bytes] = DATA, **more: Any) -> str:
        with pytest.raises(MaskFileError) as caught:
            client.upload(repo, files, message="m", **more)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    hub.made("us/r", DATA)
    hub.made("them/r", DATA)
    assert refused("r") == "expected a repository org/name, got 'r'"
    assert "does not let you do that with them/new; log in" in refused("them/new")
    assert "does not let you do that with them/r; log in" in refused("them/r")
    assert "does not let you do that" in refused(token="hf_mistyped")
    assert refused(revision="v2") == "us/r has no revision 'v2'"
    wrong = refused(files={"README.md": b"---\nlicense: mine\n---\n"})
    assert wrong.startswith('Invalid metadata in README.md. - "license" must be one of [apache-2.0')
    begun = time.monotonic()
    hub.broken = 500
    assert refused() == f"{hub.url} cannot be reached (it answers 500)"
    reach(monkeypatch, NOWHERE)
    assert refused().startswith(f"{NOWHERE} cannot be reached (")
    assert time.monotonic() - begun < 5
    assert all(len(repo.messages) == 1 for repo in hub.repos.values())


# --- from the web ----------------------------------------------------------------------------------------------------


def test_files_come_from_the_web_and_over_redirects(hub: Hub) -> None:
    hub.web["a"] = (200, {}, b"x" * 3_000_000)
    hub.web["b"] = (302, {"Location": "/web/a"}, b"")
    assert got(f"{hub.url}/web/a") == got(f"{hub.url}/web/b") == b"x" * 3_000_000


def test_the_web_is_bounded_by_what_it_says_and_by_what_it_sends(hub: Hub) -> None:
    hub.web["a"] = (200, {}, b"x" * 1000)
    hub.web["silent"] = (200, {"Content-Length": "", "Connection": "close"}, b"x" * 1000)
    hub.web["short"] = (200, {"Content-Length": "2000", "Connection": "close"}, b"x" * 1000)
    assert got(f"{hub.url}/web/silent", limit=1000) == b"x" * 1000
    assert refusal(f"{hub.url}/web/a", limit=999).startswith("expected a mask file of at most 999 bytes, got 1,000;")
    assert refusal(f"{hub.url}/web/silent", limit=999).startswith("expected a mask file of at most 999 bytes, got more")


def test_a_connection_that_is_cut_is_no_file(hub: Hub) -> None:
    cut = iter([b"x" * 600, b"x" * 400, b""])
    with pytest.raises(MaskFileError, match="the connection ended after 1,000 of 2,000 bytes"):
        remote._counted(lambda _: next(cut), 2000, 10_000)


def test_a_web_server_that_says_no_is_quoted(hub: Hub) -> None:
    hub.web["loop"] = (302, {"Location": "/web/loop"}, b"")
    hub.web["file"] = (302, {"Location": "file:///etc/passwd"}, b"")
    hub.web["ftp"] = (302, {"Location": f"ftp://{hub.url.partition('//')[2]}/x"}, b"")
    assert refusal(f"{hub.url}/web/none") == "the server answers 404 (Not Found)"
    assert "infinite loop" in refusal(f"{hub.url}/web/loop")
    assert "not allowed" in refusal(f"{hub.url}/web/file")
    assert "sends us on to ftp://" in refusal(f"{hub.url}/web/ftp")
    assert refusal(f"{NOWHERE}/x").startswith("the server cannot be reached (")
    for wrong in ("http://", "http://[/x", "http://127.0.0.1:a/x"):
        assert refusal(wrong)


def test_redirects_do_not_lead_from_https_to_http() -> None:
    secure = urllib.request.Request("https://example.org/a")
    redirected: Any = partial(remote._Redirects().redirect_request, secure, io.BytesIO(), 302, "Found", HTTPMessage())
    with pytest.raises(MaskFileError, match=r"on to http://example\.org/b, expected an address with https:"):
        redirected("http://example.org/b")
    followed = redirected("https://example.org/b")
    assert followed is not None
    assert followed.full_url == "https://example.org/b"


# --- from stores -----------------------------------------------------------------------------------------------------


def test_files_come_from_stores_through_fsspec(tmp_path: Path) -> None:
    with fsspec.open("memory://nadhooks/a", "wb") as file:
        file.write(b"abc")
    assert got("memory://nadhooks/a") == b"abc"
    (tmp_path / "a").write_bytes(b"def")
    assert got(f"file://{tmp_path}/a") == b"def"
    assert refusal("memory://nadhooks/a", limit=2).startswith("expected a mask file of at most 2 bytes, got 3;")
    assert refusal("memory://nadhooks/b") == "there is no such file"
    assert refusal(f"file://{tmp_path}") == "expected the address of a file, got that of a directory"
    assert refusal("memory://").startswith("expected the address of a file")


def test_a_store_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install it to access it")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    assert refusal("s3://bucket/a") == "s3:// needs s3fs: pip install 'nadhooks[s3]'"
    assert refusal("gs://bucket/a") == "gs:// needs gcsfs: pip install 'nadhooks[gs]'"
    assert refusal("az://bucket/a") == "az:// needs adlfs: pip install 'adlfs'"


def test_other_schemes_and_chains_are_refused() -> None:
    assert refusal("ftp://host/a").endswith("got ftp://")
    assert refusal("zip://a::https://host/b").endswith("got zip://")
    assert refusal("memory://a::file:///etc/passwd") == "expected the address of one file, got a chain with `::`"
