"""Files that are written whole or not at all, and what their bytes hash to."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
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


class Target:
    """Where an output goes: the plain file at `path`, or what it links to; a pipe or a character
    device such as /dev/null is written to as it is. DesksideError for anything else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            mode = os.stat(path).st_mode
            link = os.path.realpath(path)
        except FileNotFoundError:
            mode, link = stat.S_IFREG, os.path.realpath(path)
        except OSError as error:
            raise self.failure(error) from None
        self.is_plain = stat.S_ISREG(mode)
        self.file = Path(link) if self.is_plain else path
        if not (self.is_plain or stat.S_ISFIFO(mode) or stat.S_ISCHR(mode)):
            kind = "a folder" if stat.S_ISDIR(mode) else "no plain file"
            raise DesksideError(f"{path}: is {kind}; name a file to write")

    @property
    def temporary(self) -> Path:
        """The name beside the file under which this process writes it."""
        return self.file.with_name(f".{self.file.name}.{os.getpid()}.part")

    def need_room(self, nbytes: int, advice: str = "") -> None:
        """DesksideError where the disk has less than that free. advice: how to need less."""
        if not self.is_plain:
            return
        try:
            free = shutil.disk_usage(self.file.parent).free  # a folder that is missing fails here
        except OSError as error:
            raise self.failure(error) from None
        if nbytes > free:
            raise DesksideError(
                f"{self.path}: needs {size_text(nbytes)}, the disk has {size_text(free)} free"
                f"{advice and '; '}{advice}"
            )

    def failure(self, error: OSError) -> DesksideError:
        return DesksideError(f"{self.path}: cannot be written: {error.strerror}")


def disk_free(folder: Path) -> int:
    """Free bytes on the disk of `folder`, which need not exist."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def size_text(nbytes: int) -> str:
    return f"{nbytes / 1e9:.1f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


class WholeFile:
    """A binary file that grows under a temporary name until `keep` puts it in place.

    Only plain files are replaced: a link's target, not the link. A pipe or a character device gets
    the bytes as they come. DesksideError, which names `path`, where it cannot be written. Whoever
    opens one must call `discard` in the end, kept or not.
    """

    def __init__(self, path: Path) -> None:
        self.target = Target(path)
        self._file: BinaryIO | None = None
        self._written = 0

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def open(self) -> None:
        path = self.target.temporary if self.target.is_plain else self.target.path
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise self.target.failure(error) from None

    def write(self, data: Any) -> None:
        """Append what has a buffer of bytes."""
        assert self._file is not None
        try:
            self._file.write(data)
        except OSError as error:
            raise self.target.failure(error) from None
        self._written += memoryview(data).nbytes

    def tell(self) -> int:
        """Bytes written so far."""
        return self._written

    def keep(self) -> None:
        """Close the file and give it its name."""
        assert self._file is not None
        try:
            self._file.close()
            if self.target.is_plain:
                os.replace(self.target.temporary, self.target.file)
        except OSError as error:
            raise self.target.failure(error) from None

    def discard(self) -> None:
        """Close and remove the temporary; once it was kept there is none left to remove."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None
        if self.target.is_plain:
            self.target.temporary.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write one text file with `write_all`, and a line end behind it."""
    write_all({path: text + "\n"})


def write_all(texts: Mapping[Path, str]) -> None:
    """Write text files as UTF-8, all or none of them; safe on the disk when this returns.

    Each replaces an older plain file at once; a pipe or a character device gets the text. Unpaired
    surrogates become "?". OSError where one cannot be written.
    """
    targets = {path: Target(path) for path in texts}
    plain = [target for target in targets.values() if target.is_plain]
    try:
        for target in plain:
            with target.temporary.open("w", encoding="utf-8", errors="replace") as file:
                file.write(texts[target.path])
                file.flush()
                os.fsync(file.fileno())
        for path in (path for path, target in targets.items() if not target.is_plain):
            path.write_text(texts[path], encoding="utf-8", errors="replace")
        for target in plain:
            target.temporary.replace(target.file)
    finally:  # after Ctrl-C, too
        for target in plain:
            target.temporary.unlink(missing_ok=True)


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
