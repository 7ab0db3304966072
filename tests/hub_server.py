"""A small Hub: the HTTP API that pushes and downloads of models use, in one process, in memory.

    with HubServer() as hub:
        ...  # HF_ENDPOINT=hub.endpoint HF_HUB_DISABLE_XET=1, token hub.token

Written from what the client sends and expects; no code of the Hub or its client is in it. Files of
at least `lfs_from` bytes go through the LFS batch API and its basic transfer. A commit is applied
whole or not at all. `hub.fault(...)` makes a coming request fail.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "PlantedSecret" * 2


@dataclass
class Fault:
    """What happens to the next `times` requests whose "METHOD PATH" matches.

    `status` answers (with `headers`); `cut` reads that many bytes of the body and closes; `hold`
    waits until `HubServer.released` is set, and then does what was asked.
    """

    match: str
    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    message: str = "made to fail"
    cut: int | None = None
    hold: bool = False
    late: bool = False  # do what was asked, and cut the connection instead of the answer


@dataclass
class Repo:
    """Branches with their commits: (oid, path -> sha256 of the content)."""

    private: bool
    branches: dict[str, list[tuple[str, dict[str, str]]]]
    messages: list[str] = field(default_factory=list)

    def at(self, revision: str) -> tuple[str, dict[str, str]] | None:
        """A commit by branch or oid."""
        if revision in self.branches:
            return self.branches[revision][-1]
        known = [entry for commits in self.branches.values() for entry in commits]
        return next((entry for entry in known if entry[0] == revision), None)


def git_hash(content: bytes) -> str:
    """How git names a blob."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """The server and everything it holds."""

    def __init__(self, *, token: str = TOKEN, namespaces: tuple[str, ...] = ("org",)) -> None:
        self.token, self.namespaces = token, namespaces
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[str] = []
        self.lfs_from = 4096
        self.lock = threading.RLock()
        self.released = threading.Event()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._server.server_close()

    def environment(self) -> dict[str, str]:
        """What a client's environment needs."""
        return {"HF_ENDPOINT": self.endpoint, "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}

    def fault(self, match: str, *, times: int = 1, **what: Any) -> None:
        """Make requests fail; `match` is a regular expression over "METHOD PATH"."""
        self.faults.append(Fault(match, times, **what))

    def take_fault(self, request: str) -> Fault | None:
        """The fault that a request meets, if any."""
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.match, request):
                    fault.times -= 1
                    return fault
        return None

    def files(self, repo: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository shows."""
        found = self.repos[repo].at(revision)
        assert found is not None
        return {path: self.blobs[sha] for path, sha in found[1].items()}

    def wait_for(self, match: str, *, count: int = 1, timeout_s: float = 120) -> None:
        """Wait until so many such requests have come."""
        deadline = time.monotonic() + timeout_s
        while sum(bool(re.search(match, request)) for request in list(self.requests)) < count:
            assert time.monotonic() < deadline, f"no request {match}"
            time.sleep(0.02)

    def num_commits(self, repo: str, revision: str = "main") -> int:
        """Commits after the first, empty one."""
        return len(self.repos[repo].branches[revision]) - 1

    def store(self, content: bytes) -> str:
        """Keep a blob."""
        sha = hashlib.sha256(content).hexdigest()
        self.blobs[sha] = content
        return sha


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        with self.hub.lock:
            self.hub.requests.append(request)
        fault = self.hub.take_fault(request)
        if fault and not fault.late and self._fail(fault):
            return
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if len(self.body) < length:
            self.close_connection = True  # the client went away in the middle
            return
        self.late = bool(fault and fault.late)
        for method, pattern, action in ROUTES:
            found = re.fullmatch(pattern, path)
            if method == self.command and found:
                with self.hub.lock:
                    action(self, *found.groups())
                return
        self._answer(404, {"error": f"no route {request}"})

    do_GET = do_HEAD = do_POST = do_PUT = _serve

    def _fail(self, fault: Fault) -> bool:
        if fault.hold:
            self.hub.released.wait()
            return False
        if fault.cut is not None:
            self.rfile.read(min(fault.cut, int(self.headers.get("Content-Length") or 0)))
            self._close()
            return True
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self._answer(fault.status, {"error": fault.message}, **fault.headers)
        return True

    def _close(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _answer(self, status: int, content: Any, **headers: str) -> None:
        if getattr(self, "late", False):
            self._close()
            return
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        fields = {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
        for name, value in fields.items():
            self.send_header(name.replace("_", "-"), value)
        with contextlib.suppress(OSError):  # the client may have been killed
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _may_write(self, repo: str) -> bool:
        if not self._known():
            self._answer(401, {"error": "Invalid credentials in Authorization header"})
        elif repo.split("/")[0] not in self.hub.namespaces:
            self._answer(403, {"error": f"no right to write to {repo.split('/')[0]}"})
        else:
            return True
        return False

    def _found(self, repo: str, revision: str) -> tuple[str, dict[str, str]] | None:
        kept = self.hub.repos.get(repo)
        if kept is None or (kept.private and not self._known()):
            self._answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
            return None
        commit = kept.at(revision)
        if commit is None:
            self._answer(404, {"error": "Invalid rev"}, X_Error_Code="RevisionNotFound")
        return commit

    def whoami(self) -> None:
        if self._known():
            orgs = [{"name": name} for name in self.hub.namespaces[1:]]
            self._answer(200, {"name": self.hub.namespaces[0], "type": "user", "orgs": orgs})
        else:
            self._answer(401, {"error": "Invalid user token."})

    def create(self) -> None:
        wanted = json.loads(self.body)
        repo = f"{wanted.get('organization') or self.hub.namespaces[0]}/{wanted['name']}"
        if not self._may_write(repo):
            return
        url = f"{self.hub.endpoint}/{repo}"
        if repo in self.hub.repos:
            self._answer(409, {"error": "You already created this model repo", "url": url})
            return
        first = {".gitattributes": self.hub.store(b"*.safetensors filter=lfs\n")}
        start = [(hashlib.sha1(repo.encode()).hexdigest(), first)]
        self.hub.repos[repo] = Repo(wanted.get("visibility") == "private", {"main": start})
        self._answer(200, {"url": url, "name": repo})

    def branch(self, repo: str, name: str) -> None:
        if not self._may_write(repo) or self._found(repo, "main") is None:
            return
        branches = self.hub.repos[repo].branches
        if name in branches:
            self._answer(409, {"error": "Reference already exists"})
            return
        branches[name] = [branches["main"][-1]]
        self._answer(200, {})

    def validate(self) -> None:
        content = json.loads(self.body)["content"]
        good = content.startswith("---\n") and "\n---\n" in content
        wrong = [{"message": "no metadata"}]
        self._answer(200 if good else 400, {"errors": [] if good else wrong, "warnings": []})

    def info(self, repo: str, revision: str | None = None) -> None:
        found = self._found(repo, revision or "main")
        if found:
            siblings = [{"rfilename": path} for path in found[1]]
            private = self.hub.repos[repo].private
            answer = {"_id": repo, "id": repo, "sha": found[0], "private": private, "tags": []}
            self._answer(200, {**answer, "siblings": siblings, "downloads": 0, "likes": 0})

    def tree(self, repo: str, revision: str, below: str | None = None) -> None:
        found = self._found(repo, revision)
        if not found:
            return
        entries = []
        for path, sha in sorted(found[1].items()):
            if below and not path.startswith(f"{below.strip('/')}/"):
                continue
            content = self.hub.blobs[sha]
            entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
            if len(content) >= self.hub.lfs_from:
                entry["lfs"] = {"oid": sha, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self._answer(200, entries)

    def preupload(self, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        found = self._found(repo, revision)
        if not found:
            return
        modes = []
        for file in json.loads(self.body)["files"]:
            large = file["size"] >= self.hub.lfs_from
            mode = {"path": file["path"], "uploadMode": "lfs" if large else "regular"}
            sha = found[1].get(file["path"])
            oid = sha and (sha if large else git_hash(self.hub.blobs[sha]))
            modes.append({**mode, "shouldIgnore": False, "oid": oid})
        self._answer(200, {"files": modes})

    def lfs_batch(self, repo: str) -> None:
        if not self._may_write(repo):
            return
        objects = []
        for entry in json.loads(self.body)["objects"]:
            known = entry["oid"] in self.hub.blobs
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{entry['oid']}"}}
            objects.append(entry if known else {**entry, "actions": upload})
        self._answer(200, {"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != oid:
            self._answer(422, {"error": "content differs from its oid"})
            return
        self.hub.store(self.body)
        self._answer(200, b"")

    def commit(self, repo: str, revision: str) -> None:
        if not self._may_write(repo):
            return
        found = self._found(repo, revision)
        if not found:
            return
        files = dict(found[1])
        lines = [json.loads(line) for line in self.body.splitlines()]
        for line in lines[1:]:
            value = line["value"]
            path = value["path"]
            if line["key"] == "file":
                files[path] = self.hub.store(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.blobs:
                    self._answer(400, {"error": f"{path}: object was not uploaded"})
                    return
                files[path] = value["oid"]
            elif line["key"] == "deletedFile" and files.pop(path, None) is None:
                self._answer(400, {"error": f"{path} does not exist"})
                return
        kept = self.hub.repos[repo]
        count = sum(len(commits) for commits in kept.branches.values())
        oid = hashlib.sha1(f"{repo} {revision} {count} {sorted(files)}".encode()).hexdigest()
        kept.branches[revision].append((oid, files))
        kept.messages.append(lines[0]["value"]["summary"])
        url = f"{self.hub.endpoint}/{repo}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    def resolve(self, repo: str, revision: str, path: str) -> None:
        found = self._found(repo, revision)
        if not found:
            return
        if path not in found[1]:
            self._answer(404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound")
            return
        content = self.hub.blobs[found[1][path]]
        headers = {"ETag": f'"{found[1][path]}"', "X-Repo-Commit": found[0]}
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part:
            start, end = int(part[1]), min(int(part[2] or len(content) - 1), len(content) - 1)
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
            content = content[start : end + 1]
        self._answer(206 if part else 200, content, **headers)


NAME = r"([^/]+/[^/]+)"
ROUTES: list[tuple[str, str, Any]] = [
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate),
    ("POST", rf"/api/models/{NAME}/branch/(.+)", _Handler.branch),
    ("POST", rf"/api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", rf"/api/models/{NAME}/commit/(.+)", _Handler.commit),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", r"/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("GET", rf"/api/models/{NAME}/tree/([^/]+)(/.*)?", _Handler.tree),
    ("GET", rf"/api/models/{NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/api/models/{NAME}", _Handler.info),
    ("GET", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", rf"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
]
