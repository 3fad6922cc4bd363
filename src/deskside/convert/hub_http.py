"""Files of the hub over HTTP, by ranges: downloads that go on where they stopped, headers alone.

Ours where the hub's client has no equal: it drops a broken download, compares no checksum and gives
up at 50 GB without Xet. What a hub is asked and what its errors mean is the client's.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import httpx2
from huggingface_hub import constants, get_session
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

from deskside.errors import DesksideError
from deskside.gguf.header import Header, Truncated
from deskside.machine.loopback import is_loopback

PIECE = 16 << 30  # bytes of one request; a CDN answers with no more than 50 GB
CHUNK = 1 << 20
TRIES = 5  # in a row that bring no byte
PAUSE = 1.0  # seconds before the second of them; then twice as long each time
LONGEST_PAUSE = 60.0
FIRST, MOST = 1 << 20, 256 << 20  # bytes of a header that are read at first and at most
# What may be better a moment later, beside a broken connection.
AGAIN = {408, 429, 500, 502, 503, 504}
_LOOPBACK = ("localhost", "127.0.0.1", "::1")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

Say = Callable[[str], None]
Report = Callable[[int], None]


def ignore(line: str) -> None:
    """Says nothing."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repo at a commit. etag: SHA-256 of a large file, git's SHA-1 of a small one."""

    endpoint: str
    repo: str
    commit: str
    name: str
    size: int
    etag: str

    @property
    def url(self) -> str:
        return f"{self.endpoint}/{self.repo}/resolve/{self.commit}/{quote(self.name)}"

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"

    def digest(self) -> Any:
        """The hash whose hexadecimal digits the etag is, before the first byte."""
        if len(self.etag) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.size)


class _Interrupted(Exception):
    """A request may succeed if it is made again. wait: seconds that the hub asks for."""

    def __init__(self, reason: str, wait: float = 0.0) -> None:
        super().__init__(reason)
        self.wait = wait


def headers() -> dict[str, str]:
    """Of every request; with HF_TOKEN, or the token of `hf auth login`."""
    return build_hf_headers(library_name="deskside")


def exempt_loopback(endpoint: str) -> None:
    """Have a hub on this machine asked directly, whatever proxies the environment names."""
    host = urlsplit(endpoint).hostname or ""
    if is_loopback(host):
        before = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        hosts = dict.fromkeys((*before.split(","), host, *_LOOPBACK))
        os.environ["no_proxy"] = ",".join(filter(None, hosts))


def failure(error: Exception, what: str, repo: str, endpoint: str) -> DesksideError:
    """What a failed request for `what` means, and what to do about it."""
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    if isinstance(error, GatedRepoError) or status == 403:
        return DesksideError(
            f"{what}: gated: accept the terms on {endpoint}/{repo}, "
            "then set HF_TOKEN to a token of that account"
        )
    if isinstance(error, RepositoryNotFoundError):
        return DesksideError(
            f"{what}: {endpoint} has no such repo, or it is private: check the name; "
            "a private one needs HF_TOKEN"
        )
    if status == 401:
        return DesksideError(f"{what}: {endpoint} refuses the token: check HF_TOKEN")
    if isinstance(error, RemoteEntryNotFoundError) or status == 404:
        return DesksideError(f"{what}: {endpoint} has no such file")
    if isinstance(error, HfHubHTTPError):
        said = " ".join((error.server_message or "").split())[:200]
        return DesksideError(f"{what}: {endpoint} answered {status}{said and ': '}{said}")
    if isinstance(error, ValueError):
        return DesksideError(f"{what}: {endpoint} does not answer as a hub: check HF_ENDPOINT")
    return DesksideError(f"{what}: {endpoint} cannot be reached: {error or type(error).__name__}")


class Partial:
    """The first bytes of a file, on the disk under `path`, and their digest where it is wanted.

    What lies there is gone on with. report: gets the bytes that are there, as they are read and
    written. DesksideError, which names `path`, where it cannot be written.
    """

    def __init__(
        self, path: Path, digest: Callable[[], Any] | None = None, report: Report = lambda n: None
    ) -> None:
        self.path = path
        self._new = digest or _NoDigest
        self._report = report
        self._file = self._try(path.open, "a+b")
        self.restart(keep=True)

    def restart(self, keep: bool = False) -> None:
        """From the first byte; with `keep`, from what is there."""
        self._digest, self.size = self._new(), 0
        self._file.seek(0)
        if not keep:
            self._try(self._file.truncate)
        while data := self._file.read(CHUNK):
            self._count(data)

    def write(self, data: bytes) -> None:
        self._try(self._file.write, data)
        self._count(data)

    def _count(self, data: bytes) -> None:
        self._digest.update(data)
        self.size += len(data)
        self._report(self.size)

    def hexdigest(self) -> str:
        return str(self._digest.hexdigest())

    def flush(self) -> None:
        """Everything is on the disk when this returns."""
        self._try(self._file.flush)
        self._try(os.fsync, self._file.fileno())

    def close(self) -> None:
        self._try(self._file.close)

    def _try(self, call: Callable[..., Any], *given: Any) -> Any:
        try:
            return call(*given)
        except OSError as error:
            raise DesksideError(f"{self.path}: cannot be written: {error.strerror}") from None


class _NoDigest:
    def update(self, data: bytes) -> None: ...

    def hexdigest(self) -> str:
        return ""


def pull(file: HubFile, into: Partial, end: int, say: Say) -> None:
    """Fetch until `into` holds `end` bytes or a few more, after broken connections too.

    DesksideError where the hub refuses, sends another file, or brings no byte in TRIES tries.
    """
    failed, best = 0, into.size
    while into.size < end:
        stop = min(end, into.size + PIECE)
        reason, wait = "the answer ended too soon", 0.0
        try:
            _receive(file, into, stop)
        except _Interrupted as error:
            reason, wait = str(error), error.wait
        if into.size >= stop:
            continue
        if into.size > best:
            best, failed = into.size, 0
        failed += 1
        if failed == TRIES:
            raise DesksideError(
                f"{file}: {file.endpoint}: {reason}; gave up at byte {into.size} after {TRIES} "
                "tries; the same command goes on from there"
            )
        say(f"{file}: {reason}, at byte {into.size}; trying again")
        time.sleep(min(LONGEST_PAUSE, max(wait, PAUSE * 2 ** (failed - 1))))


def _receive(file: HubFile, into: Partial, stop: int) -> None:
    """One request for the bytes from `into.size` to `stop`."""
    wanted = {
        **headers(),
        "Range": f"bytes={into.size}-{stop - 1}",
        "Accept-Encoding": "identity",
    }
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    try:
        with get_session().stream("GET", file.url, headers=wanted, timeout=timeout) as response:
            if response.status_code in AGAIN:
                asked = response.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else 0.0
                raise _Interrupted(f"status {response.status_code}", wait)
            hf_raise_for_status(response)
            if not _goes_on(file, response, into.size):
                into.restart()
            for data in response.iter_bytes(CHUNK):
                if into.size + len(data) > file.size:
                    raise DesksideError(
                        f"{file}: {file.endpoint} sends more than its {file.size} bytes"
                    )
                into.write(data)
                if into.size >= stop:
                    return
    except HfHubHTTPError as error:
        raise failure(error, str(file), file.repo, file.endpoint) from None
    except httpx2.RequestError as error:
        raise _Interrupted(str(error) or type(error).__name__) from None


def _goes_on(file: HubFile, response: httpx2.Response, at: int) -> bool:
    """Whether an answer's bytes are those from `at` on; else they are the file from its start.

    DesksideError for other bytes, and for a file of another size than was listed.
    """
    size = response.headers.get("Content-Length", str(file.size))
    if response.status_code == 206:
        found = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if found is None or int(found[1]) != at:
            raise DesksideError(f"{file}: {file.endpoint} sends other bytes than it is asked for")
        size = found[3]
    if size != str(file.size):
        raise DesksideError(
            f"{file}: {file.endpoint} lists {file.size} bytes, but sends a file of {size}"
        )
    return response.status_code == 206


def download(file: HubFile, blob: Path, partly: Path, say: Say, report: Report) -> None:
    """Fetch a file to `blob`, going on with what an earlier try left at `partly`.

    `blob` gets only what has the size and the checksum that the hub lists; the rest is removed.
    report: gets the bytes that are there.
    """
    partial = Partial(partly, file.digest, report)
    try:
        if partial.size > file.size:
            partial.restart()
        pull(file, partial, file.size, say)
        if partial.hexdigest() != file.etag:
            partial.path.unlink()
            raise DesksideError(
                f"{file}: its checksum is {partial.hexdigest()}, the hub lists {file.etag}: "
                "damaged on the way; it was removed, fetch it again"
            )
        partial.flush()
        os.replace(partial.path, blob)
    finally:
        partial.close()


def pull_header(file: HubFile, path: Path, say: Say) -> None:
    """Fetch as much of a GGUF file to `path` as its header takes. DesksideError for a bad header,
    and for one whose tensors reach beyond the file's end."""
    partial, wanted = Partial(path), FIRST
    try:
        while True:
            pull(file, partial, min(wanted, file.size), say)
            partial.flush()
            try:
                header = Header.read(path, complete=False)
            except Truncated:
                if partial.size == file.size or wanted >= MOST:
                    raise
                wanted *= 4
                continue
            end = max((t.offset + t.nbytes for t in header.tensors), default=0)
            if end > file.size:
                raise DesksideError(
                    f"{path}: its tensors end at byte {end}, but the hub lists {file.size} bytes"
                )
            return
    finally:
        partial.close()
