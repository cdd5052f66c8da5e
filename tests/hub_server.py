"""A hub on this machine for tests: the upload protocol and downloads, in memory, with faults on demand."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ATTRIBUTES = (
    b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n*.gguf filter=lfs diff=lfs merge=lfs -text\n"
)
TOKENS = {"hf_writes": "write", "hf_reads": "read"}  # too short for a real token's pattern
OWNER = "someone"


@dataclass
class Repository:
    private: bool
    commits: list[dict[str, Any]] = field(default_factory=list)  # {"oid", "title", "files": path -> entry}
    branches: dict[str, dict[str, Any]] = field(default_factory=dict)

    def commit(self, branch: str, title: str, files: dict[str, Any]) -> dict[str, Any]:
        oid = hashlib.sha1(f"{len(self.commits)} {title} {sorted(files)}".encode()).hexdigest()
        self.commits.append({"oid": oid, "title": title, "files": files})
        self.branches[branch] = self.commits[-1]
        return self.commits[-1]

    def at(self, revision: str) -> dict[str, Any] | None:
        known = [commit for commit in self.commits if commit["oid"] == revision]
        return self.branches.get(revision) or (known[0] if known else None)


class Hub:
    """``faults``: (method and path pattern) -> what is done instead of an answer, once each, in order."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}  # LFS objects by sha256
        self.requests: list[str] = []
        self.faults: list[tuple[str, Callable[[_Handler], None]]] = []
        self.refused_cards: str | None = None

    def add(self, repo: str, folder: Path) -> str:
        """A repository that was there before, with the files of ``folder``; its commit."""
        made = self.repositories[repo] = Repository(private=False)
        files = {file.name: {"bytes": file.read_bytes()} for file in folder.iterdir() if file.is_file()}
        return str(made.commit("main", "all", files)["oid"])

    def content(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> bytes of everything at a revision, but git's attributes."""
        commit = self.repositories[repo].at(revision)
        assert commit is not None
        return {p: self.bytes_of(e) for p, e in commit["files"].items() if p != ".gitattributes"}

    def bytes_of(self, entry: dict[str, Any]) -> bytes:
        return self.large[entry["sha256"]] if "sha256" in entry else entry["bytes"]

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, request) is not None for request in self.requests)


def fail(status: int, **headers: str) -> Callable[["_Handler"], None]:
    """Answer with an error."""

    def fault(handler: "_Handler") -> None:
        handler.body()
        handler.answer(status, {"error": f"made up {status}"}, headers)

    return fault


def hang_up(handler: "_Handler") -> None:
    """Read half of what is sent and close the connection."""
    length = int(handler.headers.get("Content-Length", 0))
    handler.rfile.read(length // 2)
    handler.close_connection = True
    handler.connection.close()


@contextmanager
def running() -> Iterator[tuple[Hub, str]]:
    """A hub and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except (ConnectionError, ValueError):  # a client that went, or a connection that a fault closed
            self.close_connection = True

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        url = urlsplit(self.path)
        self.where, self.query = unquote(url.path), parse_qs(url.query)
        asked = f"{self.command} {self.where}"
        with self.lock:
            self.hub.requests.append(asked)
            fault = next((f for f in self.hub.faults if re.search(f[0], asked)), None)
            if fault is not None:
                self.hub.faults.remove(fault)
        if fault is not None:
            return fault[1](self)
        for pattern, name in ROUTES:
            if found := re.fullmatch(pattern, asked):
                with self.lock:
                    return getattr(self, name)(*found.groups())
        self.body()
        self.answer(404, {"error": "Not found"}, {"X-Error-Code": "EntryNotFound"})

    # ---- what a request brings and gets

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    @property
    def role(self) -> str | None:
        return TOKENS.get(self.headers.get("Authorization", "").removeprefix("Bearer "))

    def _found(self, repo: str, revision: str = "main") -> tuple[Repository, dict[str, Any]] | None:
        """The repository and commit, or an error that was answered."""
        known = self.hub.repositories.get(repo)
        if known is None or (known.private and self.role is None):
            self.body()
            self.answer(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            return None
        commit = known.at(revision)
        if commit is None:
            self.body()
            self.answer(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
            return None
        return known, commit

    def _may_write(self) -> bool:
        if self.role != "write":
            self.body()
            self.answer(403 if self.role else 401, {"error": "no permission"})
        return self.role == "write"

    # ---- routes

    def whoami(self) -> None:
        if self.role is None:
            return self.answer(401, {"error": "Invalid credentials"})
        self.answer(200, {"name": OWNER, "type": "user", "auth": {"accessToken": {"role": self.role}}})

    def create(self) -> None:
        if not self._may_write():
            return
        asked = json.loads(self.body())
        owner = asked.get("organization") or OWNER
        if owner != OWNER:
            return self.answer(403, {"error": f"no rights in {owner}"})
        repo = f"{owner}/{asked['name']}"
        url = f"http://{self.headers['Host']}/{repo}"
        if repo in self.hub.repositories:
            return self.answer(409, {"error": "You already created this model repo", "url": url})
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        made = self.hub.repositories[repo] = Repository(private)
        made.commit("main", "initial commit", {".gitattributes": {"bytes": ATTRIBUTES}})
        self.answer(200, {"url": url})

    def refs(self, repo: str) -> None:
        if found := self._found(repo):
            branches = [
                {"name": n, "ref": f"refs/heads/{n}", "targetCommit": c["oid"]}
                for n, c in found[0].branches.items()
            ]
            self.answer(200, {"branches": branches, "tags": [], "converts": []})

    def branch(self, repo: str, name: str) -> None:
        if self._may_write() and (found := self._found(repo)):
            self.body()
            if name in found[0].branches:
                return self.answer(409, {"error": "Reference already exists"})
            found[0].branches[name] = found[1]
            self.answer(200, {})

    def validate(self) -> None:
        content = json.loads(self.body())["content"]
        header = re.match(r"---\n(.*?)\n---", content, re.DOTALL)
        if self.hub.refused_cards or header is None:
            why = self.hub.refused_cards or "empty or missing yaml metadata"
            return self.answer(400, {"errors": [{"message": why}], "warnings": []})
        self.answer(200, {"errors": [], "warnings": []})

    def preupload(self, repo: str, revision: str) -> None:
        if self._may_write() and (found := self._found(repo, revision)):
            answers = []
            for file in json.loads(self.body())["files"]:
                there = found[1]["files"].get(file["path"])
                large = re.search(r"\.(safetensors|gguf)$", file["path"]) is not None
                oid = there and there.get("sha256", _git_hash(there.get("bytes", b"")))
                answers.append(
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if large else "regular",
                        "shouldIgnore": False,
                        "oid": oid,
                    }
                )
            self.answer(200, {"files": answers})

    def batch(self, repo: str) -> None:
        if self._may_write() and self._found(repo):
            base = f"http://{self.headers['Host']}/lfs"
            objects = []
            for asked in json.loads(self.body())["objects"]:
                actions = {"upload": {"href": f"{base}/{asked['oid']}"}, "verify": {"href": f"{base}-verify"}}
                objects.append(asked if asked["oid"] in self.hub.large else {**asked, "actions": actions})
            self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid: str) -> None:
        data = self.body()
        if hashlib.sha256(data).hexdigest() != oid:
            return self.answer(400, {"error": "the content is not what its hash says"})
        self.hub.large[oid] = data
        self.answer(200, b"")

    def verify(self) -> None:
        asked = json.loads(self.body())
        whole = len(self.hub.large.get(asked["oid"], b"")) == asked["size"]
        self.answer(200 if whole else 404, {})

    def commit(self, repo: str, revision: str) -> None:
        if not self._may_write() or (found := self._found(repo, revision)) is None:
            return
        files, title = dict(found[1]["files"]), ""
        for line in self.body().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                files[value["path"]] = {"bytes": base64.b64decode(value["content"])}
            elif key == "lfsFile":
                if value["oid"] not in self.hub.large:
                    return self.answer(400, {"error": f"{value['path']} was not uploaded"})
                files[value["path"]] = {"sha256": value["oid"]}
            elif key == "deletedFile":
                del files[value["path"]]
        made = found[0].commit(revision, title, files)
        self.answer(200, {"commitUrl": f"http://{self.headers['Host']}/{repo}", "commitOid": made["oid"]})

    def tree(self, repo: str, revision: str, _: str | None = None) -> None:
        if found := self._found(repo, revision):
            self.answer(200, [self._entry(path, e) for path, e in sorted(found[1]["files"].items())])

    def _entry(self, path: str, entry: dict[str, Any]) -> dict[str, Any]:
        size = len(self.hub.bytes_of(entry))
        told = {"type": "file", "path": path, "size": size, "oid": _git_hash(entry.get("bytes", b""))}
        large = (
            {"lfs": {"oid": entry["sha256"], "size": size, "pointerSize": 134}} if "sha256" in entry else {}
        )
        return told | large

    def info(self, repo: str, revision: str | None = None) -> None:
        if found := self._found(repo, revision or "main"):
            files = [{"rfilename": path} for path in sorted(found[1]["files"])]
            told = {"id": repo, "modelId": repo, "sha": found[1]["oid"], "private": found[0].private}
            self.answer(200, {**told, "siblings": files, "tags": [], "downloads": 0})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._found(repo, revision)) is None:
            return
        entry = found[1]["files"].get(path)
        headers = {"X-Repo-Commit": found[1]["oid"]}
        if entry is None:
            return self.answer(
                404, {"error": "Entry not found"}, {**headers, "X-Error-Code": "EntryNotFound"}
            )
        data = self.hub.bytes_of(entry)
        etag = entry.get("sha256") or _git_hash(data)
        self.answer(200, data, {**headers, "ETag": f'"{etag}"', "X-Linked-Size": str(len(data))})


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


REPO, REVISION = r"([\w.-]+/[\w.-]+)", r"([^?]+)"
ROUTES = (
    (r"GET /api/whoami-v2", "whoami"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"GET /api/models/{REPO}/refs", "refs"),
    (rf"POST /api/models/{REPO}/branch/{REVISION}", "branch"),
    (rf"POST /api/models/{REPO}/preupload/{REVISION}", "preupload"),
    (rf"POST /api/models/{REPO}/commit/{REVISION}", "commit"),
    (rf"GET /api/models/{REPO}/tree/([^/?]+)", "tree"),
    (rf"GET /api/models/{REPO}/revision/{REVISION}", "info"),
    (rf"GET /api/models/{REPO}", "info"),
    (rf"POST /{REPO}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put"),
    (r"POST /lfs-verify", "verify"),
    (rf"(?:GET|HEAD) /{REPO}/resolve/([^/]+)/(.+)", "resolve"),
)
