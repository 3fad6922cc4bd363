"""What this machine has: CPU and memory. psutil reports memory, Linux flags and limits."""

from __future__ import annotations

import os
import platform
from pathlib import Path

import psutil

from deskside.machine import cgroup
from deskside.machine.told import lines, said

# Flags that our kernels can use, as Linux spells them.
FLAGS = ("sse4_2", "avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni")

CPUS = Path("/sys/devices/system/cpu")


def usable_cores() -> int:
    """Logical CPUs that this process may use: its affinity, within its control groups' quota."""
    cores = len(os.sched_getaffinity(0))
    quota = cgroup.cpu_quota()
    return cores if quota is None else min(cores, max(1, int(quota)))


def cpu_name() -> str:
    for line in lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def cpu_flags() -> frozenset[str]:
    """Instruction-set flags as the kernel names them; empty if unknown."""
    for line in lines("/proc/cpuinfo"):
        if line.startswith("flags"):
            return frozenset(line.split(":", 1)[1].split())
    return frozenset()


def total_memory() -> int:
    """Bytes of system memory."""
    return int(psutil.virtual_memory().total)


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the limits of its control groups. The
    page cache counts as free."""
    free = int(psutil.virtual_memory().available)
    allowed = cgroup.free_memory()
    return free if allowed is None else min(free, allowed)


def nvidia_gpus() -> list[int]:
    """Free bytes of every GPU, in the order of NVIDIA's driver; none where CUDA_VISIBLE_DEVICES is
    set and empty."""
    if os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return []
    told = said("nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits")
    sizes = [line.strip() for line in (told or "").splitlines()]
    return [int(size) << 20 for size in sizes if size.isdigit() and int(size) > 0]
