"""`deskside doctor`: what this machine has, and the memory and arithmetic that limit its speed."""

from __future__ import annotations

import os

from rich.console import Console
from rich.table import Table

from deskside import _native
from deskside.cli_flags import Threads
from deskside.config import EngineConfig
from deskside.system import (
    FLAGS,
    available_memory,
    cpu_flags,
    cpu_name,
    total_memory,
    usable_cores,
)

# Beyond any last-level cache of a workstation, so that memory is measured.
BANDWIDTH_BYTES = 1 << 30
PASSES = 5


def doctor(threads: Threads = 0) -> None:
    """Show what this machine has and how fast it reads memory: the ceiling of decode speed."""
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in facts(EngineConfig(threads=threads).n_threads):
        table.add_row(name, value)
    Console(highlight=False).print(table)


def facts(n_threads: int) -> list[tuple[str, str]]:
    """Rows of the report; measures bandwidth for a second or two."""
    flags = cpu_flags()
    sets = _native.instruction_sets()
    compiled = ", ".join(name if ok else f"{name} (not on this CPU)" for name, ok in sets)
    rows = [
        ("CPU", cpu_name()),
        ("cores", f"{usable_cores()} usable of {os.cpu_count()}"),
        ("CPU flags", " ".join(f for f in FLAGS if f in flags) or "unknown"),
        ("kernels compiled", compiled),
        ("kernels chosen", _native.choose()),
        ("memory", f"{available_memory() / 1e9:.1f} GB free of {total_memory() / 1e9:.1f} GB"),
    ]
    size = min(BANDWIDTH_BYTES, available_memory() // 4)
    for n in sorted({1, n_threads}):
        rate = _native.read_bandwidth(n, size, PASSES)
        rows.append((f"read bandwidth, {_count(n)}", f"{rate / 1e9:.1f} GB/s"))
    rows.append(("decode ceiling", f"{rate / 1e9:.1f} tok/s for each GB that a token reads"))
    products = _native.compute_limit(n_threads)
    limit = f"{products / 1e9:.0f} G 8-bit products/s ({_native.choose()})"
    rows.append((f"prefill ceiling, {_count(n_threads)}", limit))
    return rows


def _count(n: int) -> str:
    return "1 thread" if n == 1 else f"{n} threads"
