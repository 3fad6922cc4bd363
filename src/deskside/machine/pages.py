"""How memory is allocated: page sizes, NUMA nodes, and what the kernel offers.

Linux reports it under /sys and /proc. On other systems there are no nodes and no reserved pages.
"""

from __future__ import annotations

import ctypes
import errno
import os
import resource
from dataclasses import dataclass
from pathlib import Path

from deskside.errors import DesksideError
from deskside.machine.told import lines

# auto: transparent huge pages. off: 4 KiB. The others are reserved pages.
HUGE_PAGES = ("auto", "off", "2MiB", "1GiB")
RESERVED = {"2MiB": 2 << 20, "1GiB": 1 << 30}
NUMA = ("none", "interleave")

_MCL_CURRENT, _MCL_ONFAULT = 1, 4  # of mlockall, on Linux
SYS, PROC = Path("/sys"), Path("/proc")


@dataclass(frozen=True)
class Reserved:
    """Huge pages of one size, in bytes, that an administrator reserved. folder: theirs in /sys."""

    size: int
    total: int
    free: int
    folder: Path


@dataclass(frozen=True)
class Node:
    """A NUMA node whose memory this process may use. It may have no CPUs."""

    number: int
    cpus: tuple[int, ...]
    free: int


def reserved(name: str) -> Reserved | None:
    """The reserved "2MiB" or "1GiB" pages. None if the kernel has no pages of that size."""
    size = RESERVED[name]
    folder = SYS / f"kernel/mm/hugepages/hugepages-{size >> 10}kB"
    counts = [lines(folder / f"{which}_hugepages") for which in ("nr", "free", "resv")]
    if not all(count and count[0].strip().isdigit() for count in counts):
        return None
    total, free, promised = (int(count[0]) for count in counts)
    return Reserved(size, total, max(0, free - promised), folder)


def need_reserved(name: str, nbytes: int) -> None:
    """DesksideError, with what to do, if `nbytes` do not fit the free pages of that size."""
    pool = reserved(name)
    if pool is None:
        raise DesksideError(f"--huge-pages {name}: this system has no pages of that size")
    needed = max(1, -(-nbytes // pool.size))
    if needed > pool.free:
        enough = pool.total - pool.free + needed
        boot = f", or boot with hugepagesz=1G hugepages={enough}" if name == "1GiB" else ""
        raise DesksideError(
            f"--huge-pages {name}: pages needed: {needed:,}, free: {pool.free:,}; as root: "
            f"echo {enough} > {pool.folder / 'nr_hugepages'}{boot}"
        )


def check_options(huge_pages: str, numa: str) -> None:
    """DesksideError for values that are not in HUGE_PAGES and NUMA."""
    if huge_pages not in HUGE_PAGES:
        raise DesksideError(f"--huge-pages {huge_pages}: choose one of {', '.join(HUGE_PAGES)}")
    if numa not in NUMA:
        raise DesksideError(f"--numa {numa}: choose one of {', '.join(NUMA)}")


def nodes() -> list[Node]:
    """NUMA nodes whose memory this process may use, by number. Empty if unknown."""
    folder = SYS / "devices/system/node"
    allowed = None
    for line in lines(PROC / "self/status"):
        if line.startswith("Mems_allowed_list:"):
            allowed = _numbers(line.split(":", 1)[1])
    found = []
    for number in _numbers("".join(lines(folder / "has_memory")[:1])):
        if allowed is not None and number not in allowed:
            continue
        free = 0
        for line in lines(folder / f"node{number}/meminfo"):
            if "MemFree:" in line:
                free = int(line.split()[-2]) * 1024
        cpus = _numbers("".join(lines(folder / f"node{number}/cpulist")[:1]))
        found.append(Node(number, tuple(cpus), free))
    return found


def spread(numa: str) -> tuple[list[int], str]:
    """Nodes to spread memory over (none: leave it to the kernel). The note says why it differs from
    what `numa` asks for, if it does."""
    if numa == "none":
        return [], ""
    numbers = [node.number for node in nodes()]
    if not numbers:
        return [], "--numa interleave: this system tells of no NUMA nodes; memory is taken as usual"
    if len(numbers) == 1:
        return [], "--numa interleave: there is one NUMA node; memory is taken as usual"
    return numbers, ""


def not_spread(error: int) -> str:
    """The note for an arena's `nodes_error`."""
    why = {
        errno.ENOSYS: "this kernel has no NUMA",
        errno.EPERM: "this container forbids mbind (it needs CAP_SYS_NICE)",
    }.get(error, f"mbind failed ({errno.errorcode.get(error, error)})")
    return f"--numa interleave: {why}; memory is taken as usual"


def transparent() -> str:
    """Which memory gets transparent huge pages: always, madvise or never; "" if unknown."""
    text = " ".join(lines(SYS / "kernel/mm/transparent_hugepage/enabled"))
    chosen = text.partition("[")[2].partition("]")[0]
    return chosen if chosen in ("always", "madvise", "never") else ""


def transparent_bytes() -> int | None:
    """Bytes of this process in transparent huge pages; None if unknown."""
    for line in lines(PROC / "self/smaps_rollup"):
        if line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return None


def numa_balancing() -> bool | None:
    """Whether the kernel moves pages between nodes by itself; None if unknown."""
    text = lines(PROC / "sys/kernel/numa_balancing")
    return text[0].strip() != "0" if text else None


def memlock_limit() -> int | None:
    """Bytes that this process may lock in memory; None for no limit."""
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    return None if soft == resource.RLIM_INFINITY else soft


def need_lockable(nbytes: int) -> None:
    """DesksideError if this process may not lock so many bytes (root may lock any)."""
    limit = memlock_limit()
    if limit is not None and nbytes > limit and os.geteuid() != 0:
        raise DesksideError(
            f"--mlock: {nbytes:,} bytes are to be locked, this process may lock {limit:,}; raise "
            "that with ulimit -l unlimited (systemd: LimitMEMLOCK=infinity), or leave it out"
        )


def lock() -> None:
    """Lock this process's memory against swapping, and later the pages that it has mapped but not
    yet touched. DesksideError if the system refuses."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mlockall(_MCL_CURRENT | _MCL_ONFAULT):
        why = os.strerror(ctypes.get_errno())
        raise DesksideError(f"--mlock: the system refuses: {why}; see ulimit -l, or leave it out")


def _numbers(text: str) -> list[int]:
    """The numbers of a list as the kernel writes it: 0-3,8."""
    found: list[int] = []
    for part in text.strip().split(","):
        first, _, last = part.strip().partition("-")
        if first.isdigit():
            found += range(int(first), int(last if last.isdigit() else first) + 1)
    return found
