"""What this machine is, and what else it did during a run. Full on Linux, less elsewhere."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import psutil
from msgspec import Struct

from deskside.machine import environment
from deskside.machine.environment import Gpu, Modules
from deskside.machine.system import (
    CPUS,
    FLAGS,
    available_memory,
    cpu_flags,
    cpu_name,
    total_memory,
    usable_cores,
)
from deskside.machine.told import contents

# Activations, logits, states and code of one engine, without weights and cache.
WORK_BYTES = 500_000_000

# Seconds between two samples. Each one stops a decoding thread's interpreter for a moment.
INTERVAL = 1.0
# /proc/stat counts steps of 10 ms; over less than this a share of a core would be noise.
SHORTEST = 0.25


class Load(Struct, forbid_unknown_fields=True):
    """What else the machine did during a run (Linux; None elsewhere)."""

    other_cpu: float | None = None  # cores kept busy by other processes, mean
    load_average: float | None = None  # of one minute, at the end
    mhz_min: float | None = None  # of the usable cores, sampled during the run
    mhz_mean: float | None = None
    throttled: int | None = None  # thermal throttle events of all cores
    available_memory: int | None = None  # least free bytes seen


class Host(Struct, forbid_unknown_fields=True):
    """The machine that a record is of. None: not told by the system, or not asked for yet when the
    record was made."""

    cpu: str = ""
    cores: int = 0
    memory: int = 0
    kernel: str = ""
    governor: str | None = None
    python: str = ""
    flags: list[str] = []
    gpus: list[Gpu] | None = None
    modules: Modules | None = None
    distribution: str | None = None
    container: str | None = None


def rss(pid: int) -> dict[str, int]:
    """Bytes that a process holds: anonymous, and mapped from files."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        for key, name in (("RssAnon:", "anonymous"), ("RssFile:", "file")):
            if line.startswith(key):
                found[name] = int(line.split()[1]) * 1024
    return found


def describe() -> Host:
    """The machine that this process runs on."""
    flags = cpu_flags()
    return Host(
        cpu=cpu_name(),
        cores=usable_cores(),
        memory=total_memory(),
        kernel=platform.platform(),
        governor=contents(CPUS / "cpu0/cpufreq/scaling_governor"),
        python=platform.python_version(),
        flags=[f for f in FLAGS if f in flags],
        gpus=environment.gpus(),
        modules=environment.modules(),
        distribution=environment.distribution(),
        container=environment.container(),
    )


def busy_seconds() -> float:
    """CPU time of all processes since the start, and time that a hypervisor withheld."""
    times = psutil.cpu_times()
    kinds = ("user", "nice", "system", "irq", "softirq", "steal")  # guests' time is in user
    return float(sum(getattr(times, kind, 0.0) for kind in kinds))


def megahertz() -> list[float]:
    """Current clock of each core that this process may use; empty if unknown."""
    usable = os.sched_getaffinity(0)
    # The kernel's own figure per core first: /proc/cpuinfo asks all cores of the machine.
    scaled = [contents(CPUS / f"cpu{i}/cpufreq/scaling_cur_freq") for i in usable]
    found = [int(khz) / 1000 for khz in scaled if khz and khz.isdigit()]
    if found:
        return found
    return [mhz for core, mhz in _cpuinfo() if core in usable]


def _cpuinfo() -> Iterator[tuple[int, float]]:
    core = -1
    for line in (contents(Path("/proc/cpuinfo")) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "processor":
            core = int(value)
        elif key.strip() == "cpu MHz":
            yield core, float(value)


def throttle_events() -> int | None:
    """Thermal throttle events of all cores since the start; None if not counted."""
    counts = [contents(p) for p in CPUS.glob("cpu[0-9]*/thermal_throttle/core_throttle_count")]
    known = [int(c) for c in counts if c and c.isdigit()]
    return sum(known) if known else None


class Watch:
    """Samples the machine while a block runs. `load` has the result after the block.

    own: whether this process is what is measured; then all other CPU time is that of others. For an
    endpoint the two cannot be told apart, and `other_cpu` stays None. local: whether it runs on
    this machine; nothing is sampled for another machine.
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
        if self._own and elapsed >= SHORTEST:
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
