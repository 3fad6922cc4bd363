"""Memory needed, the speed of copying a file, and the machine and commit of a record."""

from __future__ import annotations

import mmap
import os
import subprocess
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from deskside.machine import watch

CHUNK = 16 << 20
# Activations, logits and states of one engine: 0.2 to 0.4 GB with a vocabulary of 248,320.
WORK_BYTES = 400_000_000
# Bytes to leave free for the system and for measuring bandwidth.
RESERVE = 2_000_000_000


def memory_needed(file_bytes: int, copies: Iterable[float]) -> int:
    """Bytes for engines that are loaded at once: shared pages of the file, and their copies."""
    each = [round(file_bytes * c) + WORK_BYTES for c in copies]
    return file_bytes + sum(each)


def loading(file_bytes: int, copies: Sequence[float], available: int) -> str | None:
    """Whether "all" engines stay loaded or "one" at a time; None if a single one does not fit.

    An engine that copies the file needs its pages only while it loads, so one engine fits where
    one copy does.
    """
    room = available - RESERVE
    if memory_needed(file_bytes, copies) <= room:
        return "all"
    return "one" if file_bytes + WORK_BYTES <= room else None


def cpu_seconds(pid: int) -> float:
    """CPU time that a process has used, in steps of 10 ms (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Copier:
    """Reads a file into new memory, as an engine that keeps a copy does. For a worker process."""

    def __init__(self, paths: Sequence[str], limit: int) -> None:
        """limit: most bytes to copy."""
        self.pieces: list[tuple[str, int, int, int]] = []  # file, offset, bytes, place in the copy
        at = 0
        for path in paths:
            for offset in range(0, os.path.getsize(path), CHUNK):
                size = min(CHUNK, os.path.getsize(path) - offset, limit - at)
                if size > 0:
                    self.pieces.append((path, offset, size, at))
                    at += size
        self.nbytes = at

    def copied(self) -> int:
        """Bytes that a copy holds."""
        return self.nbytes

    def seconds(self, threads: int) -> float:
        """Seconds for one copy by `threads`."""
        with mmap.mmap(-1, max(1, self.nbytes)) as memory:
            memory.madvise(mmap.MADV_HUGEPAGE)
            start = time.perf_counter()
            with memoryview(memory) as target:
                workers = [
                    threading.Thread(target=self._copy, args=(target, i, threads))
                    for i in range(threads)
                ]
                for worker in workers:
                    worker.start()
                for worker in workers:
                    worker.join()
            return time.perf_counter() - start

    def _copy(self, target: memoryview, part: int, parts: int) -> None:
        """Copy this thread's contiguous range of pieces."""
        first, last = (len(self.pieces) * i // parts for i in (part, part + 1))
        files: dict[str, int] = {}
        for path, offset, size, at in self.pieces[first:last]:
            if path not in files:
                files[path] = os.open(path, os.O_RDONLY)
            with target[at : at + size] as view:
                done = 0
                while done < size:
                    done += os.preadv(files[path], [view[done:]], offset + done)
        for handle in files.values():
            os.close(handle)


def describe() -> dict[str, Any]:
    """The machine and the commit, for the record."""
    return {
        **msgspec.to_builtins(watch.describe()),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
    }


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments],
            capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()
