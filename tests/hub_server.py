"""A Hugging Face Hub on the loopback: as much of its HTTP interface as the real client uses to read and to publish.

It keeps what it gets, in memory, and can be told to fail: `hub.fail("POST", "/commit/", 500)` answers the next such
request with a status, "cut" closes the connection without an answer, "hold" keeps it waiting until the server ends.
`hub.seen` lists every request.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "loopbacktokenforwriting"
LFS_FROM = 100_000  # bytes from which a file is large; the real Hub also goes by its name and content


@dataclass
class Repo:
    """Files by commit, and the names that point at commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)  # refs/heads/main, refs/tags/v1, refs/pr/1
    lock: threading.Lock = field(default_factory=threading.Lock)

    def commit(self, files: dict[str, bytes], ref: str) -> str:
        """Put a new commit with these files under `ref`."""
        listing = [[path, hashlib.sha256(data).hexdigest()] for path, data in sorted(files.items())]
        oid = hashlib.sha1(json.dumps([len(self.commits), listing]).encode()).hexdigest()
        self.commits[oid] = files
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> str | None:
        """The commit that a branch, a tag, a pull request or a hash names."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        known = [self.refs[name] for name in names if name in self.refs]
        return known[0] if known else revision if revision in self.commits else None

    @property
    def main(self) -> dict[str, bytes]:
        """The files of main."""
        return self.commits[self.refs["refs/heads/main"]]


class Hub:
    """The state of the server, and the server itself: `with Hub() as hub: hub.url`."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, bytes] = {}  # LFS objects by SHA-256
        self.seen: list[tuple[str, str, str | None]] = []  # method, path, Authorization
        self.failures: list[tuple[str, str, int | str]] = []
        self.held = threading.Event()  # set when a request is kept waiting
        self.identities: dict[str, str] = {}  # the identity token of a CI job -> the repository it may write to
        self.ignored: set[str] = set()  # what a .gitignore in the repository matches
        self.before_commit: Any = None  # called with the repository before it takes a commit

    def add(self, name: str, files: dict[str, bytes], *, private: bool = False, gated: bool = False) -> Repo:
        """A repository with these files on main."""
        self.repos[name] = Repo(private, gated)
        self.repos[name].commit(files, "refs/heads/main")
        return self.repos[name]

    def fail(self, method: str, path: str, how: int | str, times: int = 1) -> None:
        """Let the next `times` requests whose path has `path` in it fail with a status, be "cut" or put on "hold"."""
        self.failures += [(method, path, how)] * times

    def paths(self, method: str) -> list[str]:
        """The paths of all requests by one method, in order."""
        return [path for seen, path, _ in self.seen if seen == method]

    def __enter__(self) -> Hub:
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.ended = threading.Event()
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


class _Answer(Exception):
    """Ends a request: a status, a JSON document or bytes, headers."""

    def __init__(self, status: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


def _error(status: int, code: str, message: str) -> _Answer:
    return _Answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self._serve()

    def do_HEAD(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.hub.seen.append((self.command, url.path, self.headers.get("Authorization")))
        self.data = self._read_body()
        failure = next((f for f in self.hub.failures if f[0] == self.command and f[1] in url.path), None)
        try:
            if failure is not None:
                self.hub.failures.remove(failure)
                if failure[2] == "hold":
                    self.hub.held.set()
                    self.hub.ended.wait(60)
                if failure[2] in ("cut", "hold"):
                    self.close_connection = True
                    self.connection.close()
                    return
                raise _Answer(int(failure[2]), {"error": f"told to fail\n::error::{self.headers.get('Authorization')}"})
            self._route(url.path)
            raise _Answer(404, {"error": f"the test server has no {self.command} {url.path}"})
        except _Answer as answer:
            self._send(answer)

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":  # what streams a file sends no length
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return data
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, answer: _Answer) -> None:
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            self.send_header(name, value.replace("\n", " "))
        if "Content-Length" not in answer.headers:
            self.send_header("Content-Length", str(len(answer.body)))
        self.send_header("X-Request-Id", "loopback")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.body)

    # --- routes --------------------------------------------------------------------------------

    def _route(self, path: str) -> None:
        body = self.data
        if self.command == "PUT" and (match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path)):  # signed: no token comes
            if hashlib.sha256(body).hexdigest() != match[1]:
                raise _Answer(400, {"error": "the content has another SHA-256"})
            self.hub.large[match[1]] = body
            raise _Answer(200, {})
        if path == "/api/repos/create":
            self._create(json.loads(body))
        if path == "/oauth/token":
            wanted = json.loads(body)
            if self.hub.identities.get(wanted["subject_token"]) != wanted["resource"]:
                raise _Answer(400, {"error": "invalid_grant", "error_description": "no trusted publisher matches"})
            raise _Answer(200, {"access_token": TOKEN, "token_type": "bearer", "expires_in": 3600})
        if path == "/api/validate-yaml":
            self._need_token()
            raise _Answer(200, {"errors": [], "warnings": []})
        if match := re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            self._batch(match[1], json.loads(body))
        if match := re.fullmatch(r"/(.+?)/resolve/([^/]+)/(.+)", path):
            self._resolve(match[1], unquote(match[2]), unquote(match[3]))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+))?)?", path):
            verb, revision = match[2] or "revision", unquote(match[3] or "main")
            handler = getattr(self, f"_on_{verb.replace('-', '_')}", None)
            if handler is not None:
                handler(match[1], revision)

    def _need_token(self) -> None:
        given = self.headers.get("Authorization")
        if given is None:
            raise _error(401, "", "Invalid username or password.")
        if given != f"Bearer {TOKEN}":
            raise _error(401, "", "Invalid credentials in Authorization header")

    def _repo(self, name: str, *, write: bool = False) -> Repo:
        repo = self.hub.repos.get(name)
        given = self.headers.get("Authorization")
        if write or given is not None:
            self._need_token()
        if repo is None or (repo.private and given is None):  # the real one does not tell the two apart either
            raise _error(404 if given else 401, "RepoNotFound", "Repository not found")
        return repo

    def _commit_of(self, repo: Repo, revision: str) -> str:
        oid = repo.find(revision)
        if oid is None:
            raise _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid

    def _create(self, wanted: dict[str, Any]) -> None:
        self._need_token()
        name = f"{wanted['organization']}/{wanted['name']}"
        if name in self.hub.repos:
            raise _Answer(409, {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"})
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}, private=private)
        raise _Answer(200, {"url": f"{self.hub.url}/{name}", "id": name})

    def _on_revision(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        oid = self._commit_of(repo, revision)
        siblings = [{"rfilename": path, "size": len(data)} for path, data in sorted(repo.commits[oid].items())]
        raise _Answer(200, {"id": name, "sha": oid, "siblings": siblings, "private": repo.private, "gated": repo.gated})

    def _entry(self, path: str, data: bytes) -> dict[str, object]:
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(data), "oid": blob}
        if len(data) >= LFS_FROM:
            entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        return entry

    def _on_tree(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit_of(repo, revision)]
        raise _Answer(200, [self._entry(path, data) for path, data in sorted(files.items())])

    def _on_paths_info(self, name: str, revision: str) -> None:
        repo = self._repo(name)
        files = repo.commits[self._commit_of(repo, revision)]
        wanted = parse_qs(self.data.decode())["paths"]
        raise _Answer(200, [self._entry(path, files[path]) for path in wanted if path in files])

    def _on_refs(self, name: str, revision: str) -> None:
        refs = self._repo(name).refs.items()
        listed: dict[str, list[dict[str, str]]] = {"branches": [], "tags": [], "converts": []}
        for kind, key in (("refs/heads/", "branches"), ("refs/tags/", "tags")):
            listed[key] = [
                {"name": ref.removeprefix(kind), "ref": ref, "targetCommit": oid}
                for ref, oid in refs
                if ref.startswith(kind)
            ]
        raise _Answer(200, listed)

    def _on_preupload(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        self._commit_of(repo, revision)
        files = json.loads(self.data)["files"]
        modes = [
            {
                "path": f["path"],
                "uploadMode": "lfs" if f["size"] >= LFS_FROM else "regular",
                "shouldIgnore": f["path"] in self.hub.ignored,
            }
            for f in files
        ]
        raise _Answer(200, {"files": modes})

    def _batch(self, name: str, wanted: dict[str, Any]) -> None:
        self._repo(name, write=True)
        objects: list[dict[str, Any]] = []
        for item in wanted["objects"]:
            entry = dict(item)
            if item["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{item['oid']}?signature=secret"}}
            objects.append(entry)
        raise _Answer(200, {"transfer": "basic", "objects": objects})

    def _on_commit(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        if self.hub.before_commit is not None:
            self.hub.before_commit(repo)
        lines = [json.loads(line) for line in self.data.splitlines()]
        header = lines[0]["value"]
        with repo.lock:
            head = self._commit_of(repo, revision)
            if header.get("parentCommit", head) != head:
                raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            files = dict(repo.commits[head])
            for line in lines[1:]:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    if value["oid"] not in self.hub.large:
                        raise _Answer(400, {"error": f"LFS object {value['oid']} was not uploaded"})
                    files[value["path"]] = self.hub.large[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            number = 1 + sum(ref.startswith("refs/pr/") for ref in repo.refs)
            is_pr = "create_pr" in self.query
            oid = repo.commit(files, f"refs/pr/{number}" if is_pr else f"refs/heads/{revision}")
        answer = {"commitUrl": f"{self.hub.url}/{name}/commit/{oid}", "commitOid": oid, "success": True}
        if is_pr:
            answer["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        raise _Answer(200, answer)

    def _on_tag(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        ref = f"refs/tags/{json.loads(self.data)['tag']}"
        if ref in repo.refs:
            raise _Answer(409, {"error": "Tag already exists"})
        repo.refs[ref] = self._commit_of(repo, revision)
        raise _Answer(200, {})

    def _on_branch(self, name: str, revision: str) -> None:
        repo = self._repo(name, write=True)
        start = json.loads(self.data).get("startingPoint", "main")
        repo.refs[f"refs/heads/{revision}"] = self._commit_of(repo, start)
        raise _Answer(200, {})

    def _resolve(self, name: str, revision: str, path: str) -> None:
        repo = self._repo(name)
        oid = self._commit_of(repo, revision)
        if repo.gated:
            raise _error(403, "GatedRepo", f"Access to model {name} is restricted")
        data = repo.commits[oid].get(path)
        if data is None:
            raise _error(404, "EntryNotFound", "Entry not found")
        entry = self._entry(path, data)
        headers = {"X-Repo-Commit": oid, "ETag": f'"{entry["oid"]}"', "Accept-Ranges": "bytes"}
        if "lfs" in entry:
            headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        status, total = 200, len(data)
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end = int(match[1]), min(int(match[2] or total), total - 1)
            if start >= total:
                raise _Answer(416, {"error": "out of range"}, {"Content-Range": f"bytes */{total}"})
            status, data = 206, data[start : end + 1]
            headers["Content-Range"] = f"bytes {start}-{end}/{total}"
        headers["Content-Length"] = str(len(data))
        raise _Answer(status, data, headers)
