"""SHA-256 of model files, remembered: 200 GB are not read again for every record."""

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
    """Where hashes are remembered, under the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "deskside" / "hashes.json"


def hashed(paths: Sequence[Path], sha: bool = True, progress: Progress = silent) -> list[ModelFile]:
    """The files with their sizes and, with `sha`, their SHA-256.

    A file of the same path, size and time of change as one that was hashed before is not read.
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
    """What is remembered; nothing where the file is not there or not as it was written."""
    try:
        return msgspec.json.decode(cache_file().read_bytes(), type=dict[str, str])
    except (OSError, ValueError):
        return {}


def _write(known: dict[str, str]) -> None:
    """Remember; a cache that cannot be written is no failure of what was asked."""
    path = cache_file()
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1))
