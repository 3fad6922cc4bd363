"""Files that are written whole or not at all, and what their bytes hash to."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

from deskside.errors import DesksideError
from deskside.progress import Progress

CHUNK = 16 << 20


class WholeFile:
    """A binary file that grows under a temporary name until `keep` puts it in place.

    DesksideError, which names `path`, where it cannot be written. Whoever opens one must call
    `discard` in the end, kept or not.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
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
    """A text file, replaced at once or not at all; safe on the disk when this returns. OSError
    where it cannot be written."""
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:  # Ctrl-C, too
        partial.unlink(missing_ok=True)
        raise


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
