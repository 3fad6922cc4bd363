"""SHA-256 of model files. A cache avoids reading 200 GB again for every record."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec

from deskside.bench.record import ModelFile
from deskside.files import sha256, write_whole
from deskside.progress import Progress, silent


def cache_file() -> Path:
    """The file that caches hashes, in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "deskside" / "hashes.json"


def hashed(paths: Sequence[Path], sha: bool = True, progress: Progress = silent) -> list[ModelFile]:
    """The sizes in bytes of files, and with `sha` their SHA-256.

    A file is not read again if its path, size and modification time are cached.
    """
    known = _read() if sha else {}
    sizes = [path.stat().st_size for path in paths]
    keys = [_key(path) for path in paths]
    done, new = 0, False
    for path, size, key in zip(paths, sizes, keys, strict=True):
        if sha and key not in known:
            known[key] = sha256([path], f"hashing {path.name}", progress, done, sum(sizes))
            new = True
        done += size
    if new:
        _write(known)
    return [
        ModelFile(path.name, size, known.get(key))
        for path, size, key in zip(paths, sizes, keys, strict=True)
    ]


def _key(path: Path) -> str:
    stat = path.stat()
    return f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"


def _read() -> dict[str, str]:
    """The cached hashes; empty if the cache is missing or damaged."""
    try:
        return msgspec.json.decode(cache_file().read_bytes(), type=dict[str, str])
    except (OSError, ValueError):
        return {}


def _write(known: dict[str, str]) -> None:
    """Write the cache. Ignores a cache that cannot be written."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1))
