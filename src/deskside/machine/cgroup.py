"""Limits of the control groups that this process is in: its own and all above it, v1 and v2.

`/proc/self/cgroup` names the groups (man 7 cgroups): `0::/a/b` in the one tree of v2, and
`4:cpu,cpuacct:/a/b` in a tree of v1. A container may see only its own group, as the root of the
mounted tree; then the path leads nowhere and the root alone has limits.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from deskside.machine.told import contents

ROOT = Path("/sys/fs/cgroup")
SELF = Path("/proc/self/cgroup")


def cpu_quota() -> float | None:
    """CPUs that all groups let this process use; None without a limit."""
    quotas = []
    for group, v2 in _groups("cpu"):
        if v2:  # "QUOTA PERIOD" in microseconds, or "max PERIOD"
            quota, _, period = _text(group / "cpu.max").partition(" ")
        else:  # -1 is no limit
            quota, period = (_text(group / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(int(quota) / int(period))
    return min(quotas, default=None)


def free_memory() -> int | None:
    """Bytes that all groups still let this process allocate; None without a limit.

    What the kernel can drop counts as free: the page cache, but not shared memory (tmpfs), which it
    can only swap.
    """
    free = []
    for group, v2 in _groups("memory"):
        limits = ("memory.max", "memory.high") if v2 else ("memory.limit_in_bytes",)
        used = _text(group / ("memory.current" if v2 else "memory.usage_in_bytes"))
        told = [text for name in limits if (text := _text(group / name)).isdigit()]
        limit = min(map(int, told), default=None)
        if limit is not None and used.isdigit():
            free.append(max(0, limit - int(used) + _cache(group / "memory.stat", v2)))
    return min(free, default=None)


def _cache(stat: Path, v2: bool) -> int:
    """Bytes of a group and those below it that the kernel can drop."""
    pairs = (line.split() for line in _text(stat).splitlines())
    known = {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}
    if v2:
        return max(0, known.get("file", 0) - known.get("shmem", 0))
    return max(0, known.get("total_cache", 0) - known.get("total_shmem", 0))


def _groups(controller: str) -> Iterator[tuple[Path, bool]]:
    """Folders of the own group and all above it that control this, and whether they are v2's."""
    for line in _text(SELF).splitlines() or ["0::/"]:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        v2 = not controllers
        if not v2 and controller not in controllers.split(","):
            continue
        tree = ROOT if v2 else ROOT / controller
        own = tree / path.strip("/")
        yield from ((group, v2) for group in (own, *own.parents) if group.is_relative_to(tree))


def _text(path: Path) -> str:
    return contents(path) or ""
