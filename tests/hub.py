"""A stand-in for the Hugging Face Hub: what huggingface_hub asks of it, on this machine, in memory.

Repositories with branches, tags, pull requests and commits; regular files in the commit, large ones (*.safetensors,
*.png) by git-lfs and behind a redirect to another host; who may read and write; broken servers. Beside it any file
under /web/, for plain downloads.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants, file_download

NOWHERE = "http://127.0.0.1:9"  # the port `discard`, where nothing listens
TOKENS = {"hf_writer": {"us"}, "hf_reader": set[str]()}  # the organisations that each may write to


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, parent: str, files: dict[str, bytes], message: str) -> str:
        whole = {**self.commits.get(self.refs.get(parent, ""), {}), **files}
        oid = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[oid], self.refs[ref] = whole, oid
        self.messages.append(message)
        return oid

    def at(self, revision: str) -> str | None:
        return self.refs.get(revision) or (revision if revision in self.commits else None)


@dataclass
class Hub:
    """What the server knows. `broken`: the status that every request gets. `log`: "METHOD path" of every request."""

    repos: dict[str, Repo] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    web: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    broken: int | None = None
    log: list[str] = field(default_factory=list)
    url: str = ""

    def made(self, repo: str, files: dict[str, bytes], **more: Any) -> str:
        """The commit of a repository with these files on main."""
        self.repos[repo] = Repo(**more)
        return self.repos[repo].commit("main", "main", files, "first")


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def reach(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Has this process take that server for the Hub. Other processes: HF_ENDPOINT."""
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(file_download, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)  # before 1.0


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(status, code, message)


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self.answered()

    do_GET = do_POST = do_PUT = do_HEAD

    def answered(self) -> None:
        parts = urlsplit(self.path)
        self.hub.log.append(f"{self.command} {parts.path}")
        self.query = parse_qs(parts.query)
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            if self.hub.broken:
                raise _Refused(self.hub.broken)
            for method, pattern, answer in ROUTES:
                found = re.fullmatch(pattern, parts.path)
                if found and (self.command == method or (method == "GET" and self.command == "HEAD")):
                    answer(self, *map(unquote, found.groups()))
                    return
            raise _Refused(404)
        except _Refused as refused:
            status, code, message = refused.args
            headers = {"X-Error-Code": code, "X-Error-Message": message}
            self.send(status, b"", **{key: value for key, value in headers.items() if value})

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, body: object, status: int = 200) -> None:
        self.send(status, json.dumps(body).encode(), Content_Type="application/json")

    # --- who may do what ---

    def may(self, org: str) -> bool | None:
        """Whether the caller may write there; None for a stranger."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in TOKENS:
            raise _Refused(401, "", "Invalid credentials in Authorization header")
        return org in TOKENS[token] if token else None

    def repo(self, name: str, write: bool = False) -> Repo:
        repo, may = self.hub.repos.get(name), self.may(name.partition("/")[0])
        if repo is None or (repo.private and not may):
            raise _Refused(401 if may is None else 404, "RepoNotFound", "Repository not found")
        if repo.gated and not may:
            raise _Refused(401 if may is None else 403, "GatedRepo", f"Access to model {name} is restricted.")
        if write and not may and "create_pr" not in self.query:
            raise _Refused(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")
        return repo

    def commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.at(revision)
        if oid is None:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    # --- what it does ---

    def front(self) -> None:
        self.send(200, b"hello")

    def create(self) -> None:
        asked = json.loads(self.body)
        name, may = f"{asked['organization']}/{asked['name']}", self.may(asked["organization"])
        if not may:
            raise _Refused(401 if may is None else 403, "", "You don't have the rights to create a model there")
        known = name in self.hub.repos
        if not known:
            self.hub.repos[name] = Repo(private=asked.get("visibility", asked.get("private")) in ("private", True))
            self.hub.repos[name].commit("main", "main", {".gitattributes": b"*.safetensors filter=lfs"}, "initial")
        self.json({"url": f"{self.hub.url}/{name}"}, 409 if known else 200)

    def validate(self) -> None:
        """The front matter of a card, as strict about licences as the Hub is."""
        content = json.loads(self.body)["content"]
        data = yaml.safe_load(content.split("---\n")[1]) if content.startswith("---\n") else {}
        errors = [{"message": f'"{key}" must be a string'} for key in data if not isinstance(key, str)]
        if data.get("license", "mit") not in ("apache-2.0", "mit", "cc-by-4.0", "other"):
            errors.append({"message": '"license" must be one of [apache-2.0, mit, cc-by-4.0, other]'})
        self.json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        old = repo.commits[self.commit_of(repo, revision)]
        self.json({"files": [self.mode(old, each["path"]) for each in json.loads(self.body)["files"]]})

    def mode(self, old: dict[str, bytes], path: str) -> dict[str, Any]:
        large = path.endswith((".safetensors", ".png"))
        oid = (_sha256 if large else _git_oid)(old[path]) if path in old else None
        return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

    def batch(self, name: str) -> None:
        asked = json.loads(self.body)
        self.repo(name, write="ref" in asked)  # whoever proposes a change names no branch
        objects = asked["objects"]
        for each in objects:
            if each["oid"] not in self.hub.large:
                target = {"href": f"{self.storage}/large/{each['oid']}"}
                each["actions"] = {"upload": target, "verify": {"href": f"{self.hub.url}/verify/{each['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    def store(self, oid: str) -> None:
        self.no_token()
        if _sha256(self.body) != oid:
            raise _Refused(400, "", "not the announced content")
        self.hub.large[oid] = self.body
        self.send(200, b"")

    def no_token(self) -> None:
        if "Authorization" in self.headers:
            raise _Refused(400, "", "a token has left the Hub")

    def verify(self, oid: str) -> None:
        self.json({}, 200 if oid in self.hub.large else 404)

    def commit(self, name: str, revision: str) -> None:
        repo = self.repo(name, write=True)
        self.commit_of(repo, revision)
        files, message = {}, ""
        for line in self.body.splitlines():
            item = json.loads(line)
            if item["key"] == "header":
                message = item["value"]["summary"]
            elif item["key"] == "file":
                files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
            elif item["key"] == "lfsFile":
                files[item["value"]["path"]] = self.hub.large[item["value"]["oid"]]
        number = sum(ref.startswith("refs/pr/") for ref in repo.refs) + 1
        proposed = "create_pr" in self.query
        oid = repo.commit(f"refs/pr/{number}" if proposed else revision, revision, files, message)
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid}
        self.json(answer | ({"pullRequestUrl": f"{self.hub.url}/{name}/discussions/{number}"} if proposed else {}))

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.repo(name)
        oid = self.commit_of(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[oid]]
        self.json({"id": name, "modelId": name, "sha": oid, "private": repo.private, "siblings": siblings})

    def resolve(self, name: str, revision: str, path: str) -> None:
        repo = self.repo(name)
        oid = self.commit_of(repo, revision)
        if path not in repo.commits[oid]:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        data = repo.commits[oid][path]
        if path.endswith((".safetensors", ".png")):
            self.hub.large[_sha256(data)] = data
            linked = {"X_Linked_Etag": f'"{_sha256(data)}"', "X_Linked_Size": str(len(data))}
            where = f"{self.storage}/large/{_sha256(data)}"
            self.send(302, b"", X_Repo_Commit=oid, ETag=f'"{oid}"', Location=where, **linked)
        else:
            self.send(200, data, X_Repo_Commit=oid, ETag=f'"{_git_oid(data)}"')

    def stored(self, oid: str) -> None:
        self.no_token()
        self.send(200, self.hub.large[oid])

    def page(self, path: str) -> None:
        if path not in self.hub.web:
            raise _Refused(404)
        status, headers, body = self.hub.web[path]
        self.send(status, body, **headers)

    @property
    def storage(self) -> str:
        """Large files lie on another host than the Hub."""
        return self.hub.url.replace("127.0.0.1", "localhost")


NAME = "([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/", _Handler.front),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/api/models/{NAME}/commit/(.+)", _Handler.commit),
    ("GET", f"/api/models/{NAME}", _Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", _Handler.info),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", "/large/([0-9a-f]+)", _Handler.store),
    ("GET", "/large/([0-9a-f]+)", _Handler.stored),
    ("POST", "/verify/([0-9a-f]+)", _Handler.verify),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("GET", "/web/(.+)", _Handler.page),
]


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
