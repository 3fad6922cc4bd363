"""Rates of this computer's memory and arithmetic, measured now."""

from __future__ import annotations

from collections.abc import Sequence

from deskside import _native
from deskside.machine.system import CPUS, available_memory
from deskside.machine.told import contents

PASSES = 3  # over the memory that is read; the fastest counts


def last_level_cache() -> int:
    """Bytes of the last-level caches of all cores together; 0 if unknown."""
    found: dict[int, dict[str, int]] = {}  # level -> cores that share a cache -> its bytes
    for folder in CPUS.glob("cpu[0-9]*/cache/index*"):
        level, size, shared = (contents(folder / n) for n in ("level", "size", "shared_cpu_list"))
        if level and level.isdigit() and size and size.rstrip("KMG").isdigit():
            unit = {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
            found.setdefault(int(level), {})[shared or ""] = int(size.rstrip("KMG")) << unit
    return sum(found[max(found)].values()) if found else 0


def bandwidth_bytes(available: int) -> int:
    """Bytes to read to measure memory: more than three times the last cache, if that fits."""
    return max(1 << 27, min(max(1 << 30, 3 * last_level_cache()), available // 4))


def reader(
    threads: int,
    pages: str = "auto",
    nbytes: int = 0,
    node: int | None = None,
    cpus: Sequence[int] = (),
) -> _native.Reader:
    """Memory to measure read bandwidth with, filled by `threads` (on `cpus`, if given).

    pages: as `--huge-pages`. nbytes: 0 for `bandwidth_bytes`. node: the only NUMA node to use.
    MemoryError if there are too few such pages.
    """
    nbytes = nbytes or bandwidth_bytes(available_memory())
    nodes = [] if node is None else [node]
    return _native.Reader(nbytes, threads, pages, nodes, list(cpus))


def bandwidth(threads: int) -> float:
    """Bytes per second that `threads` read from memory now, in pages as for weights."""
    return float(reader(threads).read(threads, PASSES))


def compute(threads: int, isa: str = "", floats: bool = False) -> float:
    """int8 or float32 multiply-adds per second of `threads`, with the fastest instruction set or
    `isa`."""
    return float(_native.compute_limit(threads, isa, floats=floats))
