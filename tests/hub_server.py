"""A Hugging Face hub on loopback: the endpoints that a download needs, well-behaved or not."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CDN = "/cdn/"


@dataclass
class Repo:
    """files: what is listed. small: kept in git itself, as files below 10 MB may be.
    sent: other bytes than listed, by name. gated: files need the hub's `granted` token, with
    another account's it is 403. private: nobody sees it without a token."""

    files: dict[str, bytes]
    commit: str = COMMIT
    small: set[str] = field(default_factory=set)
    sent: dict[str, bytes] = field(default_factory=dict)
    gated: bool = False
    private: bool = False


@dataclass(frozen=True)
class Request:
    path: str
    range: str | None
    token: str | None


class Hub(ThreadingHTTPServer):
    """Files come from another host name than lists, as from a CDN.

    cuts: bytes after which each coming answer of a file breaks off. statuses: of coming requests
    for a file. list_status: of every request for a list. info: what the list of files is instead.
    skip: bytes that every range starts too late. pause: set when half of a file was sent; the rest
    never comes.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.token = "hf_right"
        self.granted = "hf_granted"
        self.requests: list[Request] = []
        self.cuts: list[int] = []
        self.statuses: list[int] = []
        self.list_status: int | None = None
        self.info: bytes | None = None
        self.ranges = True
        self.chunked = False
        self.skip = 0
        self.pause: threading.Event | None = None

    def handle_error(self, *_: Any) -> None:
        """Clients may go away."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self, what: str = CDN) -> list[Request]:
        """Requests for files, or of another kind."""
        return [r for r in self.requests if r.path.startswith(what)]


def etag(repo: Repo, name: str) -> str:
    data = repo.files[name]
    if name in repo.small:
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        self.server.requests.append(Request(path, self.headers.get("Range"), token))
        if path.startswith(CDN):
            repo, _, name = path.removeprefix(CDN).partition("//")
            self.file(self.server.repos[repo], name)
        elif path.startswith("/api/models/"):
            self.list(path.removeprefix("/api/models/"), token)
        else:
            repo, _, rest = path[1:].partition("/resolve/")
            self.resolve(repo, rest.partition("/")[2], token)

    def may(self, name: str, token: str | None, file: bool) -> bool:
        """Whether the repo is shown; else the hub's answer has been sent."""
        repo = self.server.repos.get(name)
        known = token in (self.server.token, self.server.granted)
        if token is not None and not known:
            message = "Invalid credentials in Authorization header"
            self.reply(401, X_Error_Message=message)
        elif repo is None or (repo.private and not known):
            # so that nobody learns which private repos there are
            self.reply(404 if known else 401, X_Error_Code="RepoNotFound")
        elif repo.gated and file and token != self.server.granted:
            status = 403 if known else 401
            self.reply(status, X_Error_Code="GatedRepo", X_Error_Message="Access is restricted.")
        else:
            return True
        return False

    def list(self, name: str, token: str | None) -> None:
        if self.server.list_status is not None:
            self.reply(self.server.list_status, X_Error_Message="maintenance")
        elif self.server.info is not None:
            self.reply(200, self.server.info)
        elif self.may(name, token, file=False):
            repo = self.server.repos[name]
            files = [self.entry(repo, file) for file in repo.files]
            body = {"id": name, "sha": repo.commit, "siblings": files, "tags": ["gguf"]}
            self.reply(200, json.dumps(body).encode(), Content_Type="application/json")

    def entry(self, repo: Repo, name: str) -> dict[str, Any]:
        entry: dict[str, Any] = {"rfilename": name, "size": len(repo.files[name])}
        if name in repo.small:
            return {**entry, "blobId": etag(repo, name)}
        lfs = {"sha256": etag(repo, name), "size": entry["size"], "pointerSize": 135}
        return {**entry, "blobId": "f" * 40, "lfs": lfs}

    def resolve(self, repo_name: str, name: str, token: str | None) -> None:
        if not self.may(repo_name, token, file=True):
            return
        repo = self.server.repos[repo_name]
        if name not in repo.files:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=repo.commit)
            return
        port = self.server.server_address[1]
        self.reply(
            302,
            Location=f"http://localhost:{port}{CDN}{repo_name}//{name}",
            X_Repo_Commit=repo.commit,
            X_Linked_Size=str(len(repo.files[name])),
            X_Linked_ETag=f'"{etag(repo, name)}"',
        )

    def file(self, repo: Repo, name: str) -> None:
        if self.server.statuses:
            self.reply(self.server.statuses.pop(0))
            return
        data = repo.sent.get(name, repo.files[name])
        asked = self.headers.get("Range") if self.server.ranges else None
        start, end = 0, len(data)
        if asked is not None:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            start, end = int(first) + self.server.skip, min(len(data), int(last) + 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", f'"{etag(repo, name)}"')
        if self.server.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        else:
            self.send_header("Content-Length", str(end - start))
        self.end_headers()
        body = data[start:end]
        if self.server.pause is not None:
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.server.pause.set()
            self.rfile.read(1)  # until the client goes away
            return
        cut = self.server.cuts.pop(0) if self.server.cuts else None
        if cut is not None and cut < len(body):
            self.wfile.write(body[:cut])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        elif self.server.chunked:
            self.wfile.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body))
        else:
            self.wfile.write(body)


@contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
