"""Models of a Hugging Face hub: which files of a repo are meant, their download, the cache.

The cache is the hub client's: blobs/ETAG, snapshots/COMMIT/NAME as links to them, refs/main. So
what other programs fetched is found here, and they find what this one fetches.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import httpx2
from filelock import Timeout
from huggingface_hub import HfApi, constants, scan_cache_dir
from huggingface_hub.errors import CacheNotFound, HfHubHTTPError, HFValidationError
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import WeakFileLock, validate_repo_id

from deskside.convert.hub_choice import choose, quant_of, shard_count, shards
from deskside.convert.hub_http import (
    AGAIN,
    HubFile,
    Report,
    Say,
    download,
    exempt_loopback,
    failure,
    ignore,
    pull_header,
)
from deskside.errors import DesksideError
from deskside.files import disk_free, size_text
from deskside.gguf import GGUF
from deskside.progress import Progress, silent

TIMEOUT = 20.0  # seconds for the list of a repo's files
_SPEC = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)(?::(?P<quant>[\w.-]+))?", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_FOLDER = "models--"


def _size(path: Path) -> int:
    """Of a plain file or what a link leads to; -1 if there is none."""
    try:
        return path.stat().st_size if path.is_file() else -1
    except OSError:
        return -1


@dataclass(frozen=True)
class HubModel:
    """One model of a repo: all its shards, in order.

    folder: the repo's in the cache. offline: found there, without asking the hub.
    """

    files: tuple[HubFile, ...]
    folder: Path
    offline: bool = False

    @property
    def path(self) -> Path:
        """Where its first shard lies, or will."""
        return self._path(self.files[0])

    @property
    def missing(self) -> list[HubFile]:
        """What has to be downloaded."""
        return [f for f in self.files if f.size not in (_size(self._path(f)), _size(self._blob(f)))]

    def _path(self, file: HubFile) -> Path:
        return self.folder / "snapshots" / file.commit / file.name

    def _blob(self, file: HubFile) -> Path:
        return self.folder / "blobs" / file.etag

    def __str__(self) -> str:
        shards = f" in {len(self.files)} shards" if len(self.files) > 1 else ""
        return f"{self.files[0]}, {size_text(sum(f.size for f in self.files))}{shards}"

    def fetch(self, say: Say = ignore, progress: Progress = silent) -> Path:
        """Download what is missing; returns `path`.

        What an interrupted call leaves the next one goes on with. DesksideError, before a download
        that the disk has no room for, too.
        """
        if self.offline:
            return self.path
        try:
            self._download({f.etag: f for f in self.missing}, say, progress)
            for file in self.files:
                if _size(self._path(file)) != file.size:
                    _link(self._blob(file), self._path(file))
            _write_ref(self.folder, self.files[0].commit)
        except OSError as error:
            name = error.filename or self.folder
            raise DesksideError(f"{name}: cannot be written: {error.strerror}") from None
        return self.path

    def _download(self, files: Mapping[str, HubFile], say: Say, progress: Progress) -> None:
        """Into the blobs. files: by etag, for two shards may be the same bytes."""
        if not files:
            return
        total = sum(file.size for file in files.values())
        here = sum(max(0, _size(self._partial(etag))) for etag in files)
        say(
            f"fetching {self}: {size_text(total - here)} to go, into {self.folder}; Ctrl-C stops, "
            "the same command goes on"
        )
        _need_room(total - here, self.folder)
        done = 0

        def report(nbytes: int) -> None:
            now = done + nbytes
            progress(f"fetching, {size_text(now)} of {size_text(total)}", now, total)

        for file in files.values():
            self._download_one(file, say, report)
            done += file.size

    def _partial(self, etag: str) -> Path:
        return self.folder / "blobs" / f"{etag}.incomplete"

    def _download_one(self, file: HubFile, say: Say, report: Report) -> None:
        """While the hub client of any process leaves that file alone."""
        blob = self._blob(file)
        lock = self.folder.parent / ".locks" / self.folder.name / f"{file.etag}.lock"
        for needed in (blob, lock):
            needed.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            try:
                stack.enter_context(WeakFileLock(lock, timeout=0.5))
            except Timeout:
                say(f"{file}: another process fetches it; waiting")
                stack.enter_context(WeakFileLock(lock))
            if _size(blob) != file.size:
                download(file, blob, self._partial(file.etag), say, report)

    def header(self, say: Say = ignore) -> GGUF:
        """Keys and tensors without the tensors' data: from the cache, or from the first bytes of
        each shard on the hub. Nothing of it is kept on the disk."""
        if not self.missing:
            self.fetch()
            return GGUF.open(self.path, complete=False)
        with tempfile.TemporaryDirectory(prefix="deskside-") as folder:
            paths = [Path(folder) / PurePosixPath(file.name).name for file in self.files]
            try:
                for file, path in zip(self.files, paths, strict=True):
                    pull_header(file, path, say)
                model = GGUF.open(paths[0], complete=False)
            except DesksideError as error:
                named = str(error).replace(f"{folder}{os.sep}", f"{self.files[0].repo}/")
                raise DesksideError(named) from None
        model.path = self.path
        return model


def find(spec: str, file: str | None = None, say: Say = ignore) -> HubModel:
    """The model that USER/REPO[:QUANT] names on the hub, or in the cache where that is offline.

    file: its name in the repo, instead of QUANT. DesksideError lists what there is if none or
    several are meant.
    """
    repo, quant = _parse(spec)
    endpoint, cache = constants.ENDPOINT, Path(constants.HF_HUB_CACHE)
    folder = cache / repo_folder_name(repo_id=repo, repo_type="model")
    if constants.is_offline_mode():
        return _find_cached(repo, quant, file, folder, "HF_HUB_OFFLINE is set", say)
    exempt_loopback(endpoint)
    try:
        info = HfApi(endpoint=endpoint).model_info(repo, files_metadata=True, timeout=TIMEOUT)
        files = _listed(info, endpoint, repo)
    except (httpx2.RequestError, HfHubHTTPError) as error:
        told = failure(error, repo, repo, endpoint)
        if isinstance(error, HfHubHTTPError) and error.response.status_code not in AGAIN:
            raise told from None
        if not folder.is_dir():
            raise told from None
        say(f"{told}; looking in the cache")
        return _find_cached(repo, quant, file, folder, str(told), say)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise failure(ValueError(str(error)), repo, repo, endpoint) from None
    return HubModel(choose(files, repo, quant, file, say), folder)


def _parse(spec: str) -> tuple[str, str | None]:
    parts = _SPEC.fullmatch(spec)
    try:
        if parts is not None:
            validate_repo_id(parts["repo"])
            return parts["repo"], parts["quant"]
    except HFValidationError:
        pass
    raise DesksideError(f"-hf {spec}: expected USER/REPO[:QUANT]")


def _listed(info: Any, endpoint: str, repo: str) -> list[HubFile]:
    """A repo's GGUF files. ValueError for what no hub says."""
    if not _COMMIT.fullmatch(info.sha or ""):
        raise ValueError(info.sha)
    found = []
    for entry in info.siblings or ():
        name = PurePosixPath(entry.rfilename)
        if name.suffix != ".gguf" or name.is_absolute() or ".." in name.parts:
            continue
        size, etag = (
            (entry.lfs.size, entry.lfs.sha256) if entry.lfs else (entry.size, entry.blob_id)
        )
        if type(size) is not int or size < 0 or not _ETAG.fullmatch(etag or ""):
            raise ValueError(entry.rfilename)
        found.append(HubFile(endpoint, repo, info.sha, str(name), size, etag))
    return found


def _find_cached(
    repo: str, quant: str | None, file: str | None, folder: Path, why: str, say: Say
) -> HubModel:
    """In the commit that was fetched last, else in an older one."""
    refused: DesksideError | None = None
    for snapshot in _snapshots(folder):
        files = [
            HubFile("", repo, snapshot.name, str(path.relative_to(snapshot)), _size(path), "")
            for path in snapshot.rglob("*.gguf")
            if _size(path) >= 0
        ]
        try:
            where = f"{repo} in the cache"
            return HubModel(choose(files, where, quant, file, say), folder, offline=True)
        except DesksideError as error:
            refused = refused or error
    if refused is not None:
        raise DesksideError(f"{refused}; {why}")
    raise DesksideError(f"{repo}: is not in the cache {folder.parent}; {why}")


def _snapshots(folder: Path) -> list[Path]:
    """What refs/main names first, then the others from new to old."""
    try:
        main = (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        main = ""
    found = [p for p in (folder / "snapshots").glob("*") if p.is_dir()]
    return sorted(found, key=lambda p: (p.name != main, -p.stat().st_mtime, p.name))


def _need_room(nbytes: int, folder: Path) -> None:
    free = disk_free(folder)
    if nbytes > free:
        raise DesksideError(
            f"{folder.parent}: the download takes {size_text(nbytes)}, the disk has "
            f"{size_text(free)} free; HF_HUB_CACHE names another folder"
        )


def _link(blob: Path, path: Path) -> None:
    """A link at `path`; where the file system has none, the file itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    link = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        os.symlink(os.path.relpath(blob, path.parent), link)
    except OSError:
        os.replace(blob, path)
    else:
        os.replace(link, path)


def _write_ref(folder: Path, commit: str) -> None:
    path = folder / "refs" / "main"
    if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != commit:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".main.{os.getpid()}")
        partial.write_text(commit, encoding="utf-8")
        os.replace(partial, path)


@dataclass(frozen=True)
class CachedModel:
    """A model in the cache. shards: (here, of how many). path: the first one's that is here."""

    repo: str
    name: str
    quant: str
    nbytes: int
    shards: tuple[int, int]
    path: Path


def cached() -> tuple[list[CachedModel], dict[str, int]]:
    """The GGUF models in the hub's cache; bytes of unfinished downloads by repo."""
    try:
        scan = scan_cache_dir(constants.HF_HUB_CACHE)
    except CacheNotFound:
        return [], {}
    except ValueError:
        raise DesksideError(f"{constants.HF_HUB_CACHE}: is no folder; see HF_HUB_CACHE") from None
    found: dict[tuple[Path, ...], CachedModel] = {}  # by blobs: commits share them
    for repo in scan.repos:
        if repo.repo_type != "model":
            continue
        for revision in sorted(repo.revisions, key=lambda r: (-r.last_modified, r.commit_hash)):
            files = {
                str(f.file_path.relative_to(revision.snapshot_path)): f for f in revision.files
            }
            for names in shards(name for name in files if name.endswith(".gguf")):
                own = [files[name] for name in names]
                model = CachedModel(
                    repo.repo_id,
                    names[0],
                    quant_of(names[0]),
                    sum(f.size_on_disk for f in own),
                    (len(own), shard_count(names[0])),
                    own[0].file_path,
                )
                found.setdefault(tuple(f.blob_path for f in own), model)
    unfinished: dict[str, int] = {}
    for part in scan.incomplete_files:
        folder = part.file_path.parent.parent.name
        if folder.startswith(_FOLDER):
            name = folder.removeprefix(_FOLDER).replace("--", "/")
            unfinished[name] = unfinished.get(name, 0) + part.size_on_disk
    return sorted(found.values(), key=lambda m: (m.repo, m.name)), unfinished
