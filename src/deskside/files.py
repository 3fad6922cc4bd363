"""Files that are written whole or not at all, and what their bytes hash to."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.progress import Progress

CHUNK = 16 << 20


def read_at(fd: int, offset: int, to: NDArray[np.uint8]) -> None:
    """Fill `to` (contiguous) with a file's bytes from `offset` on; OSError where it ends before."""
    done = 0
    while done < len(to):
        got = os.preadv(fd, [to[done:].data], offset + done)
        if got == 0:
            raise OSError("ends early: it was cut off after it was opened")
        done += got


class WholeFile:
    """A binary file that grows under a temporary name until `keep` puts it in place.

    DesksideError, which names `path`, where it cannot be written. Whoever opens one must call
    `discard` in the end, kept or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = temporary(path)
        self._file: BinaryIO | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self) -> None:
        try:
            self._file = self._temporary.open("wb")
        except OSError as error:
            raise self.failure(error) from None

    def write(self, data: Any) -> None:
        """Append what has a buffer of bytes."""
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise self.failure(error) from None

    def tell(self) -> int:
        """Bytes written so far."""
        assert self._file is not None
        return self._file.tell()

    def keep(self) -> None:
        """Close the file and give it its name."""
        assert self._file is not None
        try:
            self._file.close()
            os.replace(self._temporary, self.path)
        except OSError as error:
            raise self.failure(error) from None

    def discard(self) -> None:
        """Close and remove the temporary; once it was kept there is none left to remove."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        self._temporary.unlink(missing_ok=True)

    def failure(self, error: OSError) -> DesksideError:
        return DesksideError(f"{self.path}: cannot be written: {error.strerror}")


def write_whole(path: Path, text: str) -> None:
    """Write one text file with `write_all`, and a line end behind it."""
    write_all({path: text + "\n"})


def write_all(texts: Mapping[Path, str]) -> None:
    """Write text files as UTF-8, all or none of them; safe on the disk when this returns.

    Each replaces an older file at once. Unpaired surrogates become "?". OSError where one cannot
    be written.
    """
    partial = {path: temporary(path) for path in texts}
    try:
        for path, text in texts.items():
            with partial[path].open("w", encoding="utf-8", errors="replace") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
        for path in texts:
            partial[path].replace(path)
    finally:  # after Ctrl-C, too
        for left in partial.values():
            left.unlink(missing_ok=True)


def temporary(path: Path) -> Path:
    """The name beside `path` under which this process writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def sha256(
    paths: Sequence[Path], label: str, progress: Progress, done: int = 0, total: int | None = None
) -> str:
    """Hash of the bytes of all files, one after another. done, total: bytes, where these files are
    part of more work."""
    if total is None:
        total = sum(path.stat().st_size for path in paths)
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while data := file.read(CHUNK):
                digest.update(data)
                done += len(data)
                progress(label, done, total)
    return digest.hexdigest()
