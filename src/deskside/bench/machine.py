"""What the machine allows, and what else it did during a run. Linux tells; elsewhere less is known.

`bandwidth` and `compute` are the limits that a `Ceiling` is made of; `Watch` samples a `Load`.
"""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from deskside import _native
from deskside.bench.record import Load, Machine
from deskside.system import (
    FLAGS,
    available_memory,
    cpu_flags,
    cpu_name,
    total_memory,
    usable_cores,
)

# Activations, logits, states and code of one engine, beside weights and cache.
WORK_BYTES = 500_000_000

CPUS = Path("/sys/devices/system/cpu")
PASSES = 3  # over the memory that is read; the fastest counts
# Seconds between two samples: each takes the interpreter from a decoding thread for a moment.
INTERVAL = 1.0
# /proc/stat counts steps of 10 ms; over less than this a share of a core would be noise.
SHORTEST = 0.25


def last_level_cache() -> int:
    """Bytes of the largest caches of all cores together; 0 where Linux does not tell."""
    found: dict[int, dict[str, int]] = {}  # level -> cores that share a cache -> its bytes
    for folder in CPUS.glob("cpu[0-9]*/cache/index*"):
        level, size, shared = (_text(folder / n) for n in ("level", "size", "shared_cpu_list"))
        if level and level.isdigit() and size and size.rstrip("KMG").isdigit():
            unit = {"K": 10, "M": 20, "G": 30}.get(size[-1], 0)
            found.setdefault(int(level), {})[shared or ""] = int(size.rstrip("KMG")) << unit
    return sum(found[max(found)].values()) if found else 0


def bandwidth_bytes(available: int) -> int:
    """How much to read to measure memory: beyond three times the last cache, if it fits."""
    return max(1 << 27, min(max(1 << 30, 3 * last_level_cache()), available // 4))


def reader(
    threads: int,
    pages: str = "auto",
    nbytes: int = 0,
    node: int | None = None,
    cpus: Sequence[int] = (),
) -> _native.Reader:
    """Memory to measure read bandwidth with, filled by `threads` (on `cpus`, if given).

    pages: as `--huge-pages`; nbytes: 0 for `bandwidth_bytes`; node: the only NUMA node to take it
    from. MemoryError where there are too few pages of that sort.
    """
    nbytes = nbytes or bandwidth_bytes(available_memory())
    nodes = [] if node is None else [node]
    return _native.Reader(nbytes, threads, pages, nodes, list(cpus))


def bandwidth(threads: int) -> float:
    """Bytes per second that `threads` read from memory now, in pages as weights have them."""
    return float(reader(threads).read(threads, PASSES))


def compute(threads: int, isa: str = "", floats: bool = False) -> float:
    """int8 or float32 multiply-adds per second of `threads`, with the fastest instruction set or
    `isa`."""
    return float(_native.compute_limit(threads, isa, floats=floats))


def rss(pid: int) -> dict[str, int]:
    """Bytes that a process holds: anonymous, and mapped from files."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        for key, name in (("RssAnon:", "anonymous"), ("RssFile:", "file")):
            if line.startswith(key):
                found[name] = int(line.split()[1]) * 1024
    return found


def describe() -> Machine:
    """The machine that this process runs on."""
    flags = cpu_flags()
    return Machine(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory=total_memory(),
        kernel=platform.platform(),
        governor=_text(CPUS / "cpu0/cpufreq/scaling_governor"),
        python=platform.python_version(),
        flags=[f for f in FLAGS if f in flags],
    )


def busy_seconds() -> float | None:
    """CPU time that all processes have used since the start, and that a hypervisor withheld."""
    line = (_text(Path("/proc/stat")) or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, line[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def megahertz() -> list[float]:
    """Clock of each core that this process may use, now; empty where it is not told."""
    usable = os.sched_getaffinity(0)
    # The kernel's own figure per core first: /proc/cpuinfo asks all cores of the machine.
    scaled = [_text(CPUS / f"cpu{i}/cpufreq/scaling_cur_freq") for i in usable]
    found = [int(khz) / 1000 for khz in scaled if khz and khz.isdigit()]
    if found:
        return found
    return [mhz for core, mhz in _cpuinfo() if core in usable]


def _cpuinfo() -> Iterator[tuple[int, float]]:
    core = -1
    for line in (_text(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "processor":
            core = int(value)
        elif key.strip() == "cpu MHz":
            yield core, float(value)


def throttle_events() -> int | None:
    """Times that any core was slowed for its heat since the start; None where not counted."""
    counts = [_text(p) for p in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    known = [int(c) for c in counts if c and c.isdigit()]
    return sum(known) if known else None


class Watch:
    """Samples the machine while a block runs; `load` is right after the block.

    own: whether what is measured is this process, so that the rest of the CPU time is others'. An
    endpoint's own cannot be told from others' and `other_cpu` stays None. local: whether it runs on
    this machine at all; nothing is sampled of another one.
    """

    def __init__(self, *, own: bool, local: bool = True) -> None:
        self.load = Load()
        self._own, self._local = own, local
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_stopped, daemon=True)
        self._mhz: list[float] = []
        self._free: list[int] = []

    def __enter__(self) -> Self:
        if self._local:
            self._throttled = throttle_events()
            self._busy, self._used = busy_seconds(), time.process_time()
            self._began = time.perf_counter()
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._local:
            return
        elapsed = time.perf_counter() - self._began
        busy, used = busy_seconds(), time.process_time()
        self._stop.set()
        self._thread.join()
        load = self.load
        if self._own and busy is not None and self._busy is not None and elapsed >= SHORTEST:
            others = (busy - self._busy) - (used - self._used)
            load.other_cpu = max(0.0, others / elapsed)
        with contextlib.suppress(OSError):
            load.load_average = os.getloadavg()[0]
        if self._mhz:
            load.mhz_min = min(self._mhz)
            load.mhz_mean = sum(self._mhz) / len(self._mhz)
        throttled = throttle_events()
        if throttled is not None and self._throttled is not None:
            load.throttled = throttled - self._throttled
        load.available_memory = min(self._free, default=None)

    def _sample_until_stopped(self) -> None:
        while True:
            self._mhz += megahertz()
            self._free.append(available_memory())
            if self._stop.wait(INTERVAL):
                return


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
