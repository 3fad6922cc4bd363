"""`deskside doctor`: measures this machine, stores the result for `deskside plan`, gives advice."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from rich.table import Table
from typer import Option

from deskside import _native
from deskside.cli.flags import Threads
from deskside.console import note, printable, progress_bar, wide
from deskside.engine.config import EngineConfig
from deskside.errors import DesksideError
from deskside.machine import pages
from deskside.machine.descriptions import store, this_machine
from deskside.machine.devices import Machine, assumed_cpu
from deskside.machine.limits import KINDS, TAKEN, CpuLimits, as_measured, measure_cpu
from deskside.machine.system import (
    FLAGS,
    available_memory,
    cpu_flags,
    cpu_name,
    total_memory,
    usable_cores,
)
from deskside.machine.watch import Watch
from deskside.progress import Progress

if TYPE_CHECKING:
    from deskside.machine.torch_limits import DeviceLimits

# Without one of these, torch finds no GPU. Then torch is not imported, which would take seconds.
DRIVERS = ("/dev/nvidiactl", "/dev/dxg", "/dev/kfd")
WORTH = 1.03  # least speed-up for which to recommend other pages
FEW = 0.9  # least share of memory in huge pages that needs no advice


def doctor(
    threads: Threads = 0,
    quick: Annotated[
        bool,
        Option("--quick", help="measure only 1 and all threads, and only transparent huge pages"),
    ] = False,
    no_store: Annotated[
        bool, Option("--no-store", help="do not store the figures for `deskside plan`")
    ] = False,
    json_: Annotated[bool, Option("--json", help="print the figures as JSON")] = False,
) -> None:
    """Show what this machine has, measure its limits, and store them for `deskside plan`."""
    n_threads = EngineConfig(threads=threads).n_threads
    if threads > n_threads:
        note(f"-t {threads} is more than the usable cores; measuring with {n_threads}")
    main(n_threads, quick=quick, keep=not no_store, as_json=json_)


def main(n_threads: int, *, quick: bool, keep: bool, as_json: bool) -> None:
    """Run `deskside doctor` with at most `n_threads`. keep: store the result for the planner."""
    with progress_bar() as progress, Watch(own=True) as watch:
        try:
            limits = measure_cpu(n_threads, quick=quick, progress=progress)
        except MemoryError:
            raise DesksideError("too little free memory to measure: close other programs") from None
        gpus, why = _measure_gpus(progress)
    limits = replace(limits, other_cpu=watch.load.other_cpu)
    hints = advice(limits)
    if as_json:
        values = to_dict(limits, gpus, hints)
        values["stored"] = _store(limits, gpus) if keep else None
        print(json.dumps(values, indent=1))
        return
    out = wide()
    _show(out, limits, gpus, why, hints)
    if keep:
        out.print(f"\nkept for `deskside plan` in {_store(limits, gpus)}", markup=False)


def _measure_gpus(progress: Progress) -> tuple[list[DeviceLimits], str]:
    """Measure all GPUs that torch finds. Returns them, and why there are none."""
    if not any(Path(driver).exists() for driver in DRIVERS):
        return [], "this system has no driver for one"
    try:
        from deskside.machine import torch_limits
    except ImportError:
        return [], "torch is not installed (pip install 'deskside[gpu]')"
    found = []
    devices = torch_limits.cuda_devices()
    for i, (name, device) in enumerate(devices):
        progress(f"{name}: memory and transfers", i, len(devices))
        try:
            found.append(torch_limits.measure_device(name, device))
        except RuntimeError as error:
            note(f"{name} was not measured: {str(error).splitlines()[0]}")
    return found, "" if found else "torch sees none"


def _store(limits: CpuLimits, gpus: Sequence[DeviceLimits]) -> str:
    """Store the figures beside those of other tools. Returns the path of the file."""
    try:
        base = this_machine(limits.n_threads)
    except DesksideError as error:
        note(f"{error}; a new one is written")
        assumed = assumed_cpu(limits.n_threads, available_memory())
        base = Machine(cpu_name(), limits.n_threads, (assumed,))
    devices = []
    if gpus:
        from deskside.machine.torch_limits import as_device

        devices = [as_device(gpu) for gpu in gpus]
    return str(store(as_measured(base, limits, devices)))


# --- advice -------------------------------------------------------------------------------------


def advice(limits: CpuLimits) -> list[str]:
    """Sentences that say what would make models faster on this machine."""
    found = [_threads(limits)]
    if limits.disturbed:
        found = [
            f"other programs kept {limits.other_cpu:.1f} cores busy meanwhile: the figures are "
            "too low; measure again when the machine is quiet"
        ]
    return [*found, *_pages(limits), *_nodes(), _memlock()]


def _threads(limits: CpuLimits) -> str:
    rates = limits.bandwidth[TAKEN]
    fewest, max_threads = limits.fewest_threads(), max(rates)
    best = f"{max(rates.values()) / 1e9:.1f} GB/s"
    if fewest == max_threads:
        return f"-t {max_threads} (the default): fewer threads read less than 97 % of {best}"
    return (
        f"-t {fewest}: the fewest threads that read 97 % of the best, {best}; prefill is bound by "
        f"arithmetic and may still gain from all {max_threads}"
    )


def _pages(limits: CpuLimits) -> list[str]:
    found = []
    state, taken = pages.transparent(), limits.taken
    if state == "never":
        found.append(
            "transparent huge pages are off; as root: "
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        )
    elif state:
        small = limits.bandwidth.get("off", {}).get(limits.n_threads)
        gain = f"; {_percent(taken / small - 1)} faster than 4 KiB pages" if small else ""
        found.append(f"transparent huge pages are on ({state}){gain}")
    if state not in ("", "never") and limits.huge_share is not None and limits.huge_share < FEW:
        found.append(
            f"only {_percent(limits.huge_share)} of the memory came in huge pages: it is "
            "fragmented; as root: echo 1 > /proc/sys/vm/compact_memory"
        )
    for kind in pages.RESERVED:
        rate = limits.bandwidth.get(kind, {}).get(limits.n_threads)
        pool = pages.reserved(kind)
        if rate is not None and rate > WORTH * taken:
            found.append(f"--huge-pages {kind}: {_percent(rate / taken - 1)} faster reads")
        elif kind in limits.skipped and pool is not None:
            enough = pool.total - pool.free + -(-limits.nbytes // pool.size)
            found.append(
                f"to have {kind} pages measured, as root: "
                f"echo {enough} > {pool.folder / 'nr_hugepages'}, and 0 to give them back"
            )
    return found


def _nodes() -> list[str]:
    several = len(pages.nodes()) > 1
    if not several:
        return []
    found = ["several NUMA nodes: compare `deskside bench` with --numa interleave and without"]
    if pages.numa_balancing():
        found.append(
            "NUMA balancing is on and unmaps pages to see who reads them; as root: "
            "echo 0 > /proc/sys/kernel/numa_balancing"
        )
    return found


def _memlock() -> str:
    limit = pages.memlock_limit()
    if limit is None:
        return "locked memory: no limit"
    return (
        f"locked memory: at most {limit / 1e6:,.1f} MB (ulimit -l); without --mlock, a machine "
        "with swap may evict a model"
    )


# --- tables -------------------------------------------------------------------------------------


def facts() -> list[tuple[str, str]]:
    """Names and values of what this machine has. Measures nothing."""
    flags = cpu_flags()
    sets = _native.instruction_sets()
    compiled = ", ".join(name if ok else f"{name} (not on this CPU)" for name, ok in sets)
    numa = pages.nodes()
    balancing = {None: "", True: ", balancing on", False: ", balancing off"}[pages.numa_balancing()]
    return [
        ("CPU", cpu_name()),
        ("cores", f"{usable_cores()} usable of {os.cpu_count()}"),
        ("CPU flags", " ".join(f for f in FLAGS if f in flags) or "unknown"),
        ("kernels compiled", compiled),
        ("kernels chosen", _native.choose()),
        ("memory", f"{available_memory() / 1e9:.1f} GB free of {total_memory() / 1e9:.1f} GB"),
        ("NUMA nodes", f"{len(numa)}{balancing}" if numa else "not told"),
        ("huge pages", ", ".join(_huge_pages())),
    ]


def _huge_pages() -> list[str]:
    found = [f"transparent: {pages.transparent() or 'not told'}"]
    for kind in pages.RESERVED:
        pool = pages.reserved(kind)
        if pool is not None:
            found.append(f"{kind}: {pool.free} free of {pool.total} reserved")
    return found


def _show(
    out: Console,
    limits: CpuLimits,
    gpus: Sequence[DeviceLimits],
    no_gpu: str,
    hints: Sequence[str],
) -> None:
    _rows(out, facts())
    out.print()
    out.print("read bandwidth in GB/s and share of the best; `deskside plan` takes the one with *")
    out.print(_bandwidth_table(limits))
    for kind, why in limits.skipped.items():
        out.print(f"  {KINDS[kind]} pages: {why}", style="dim", markup=False)
    if limits.nodes:
        out.print("GB/s of a node's threads (rows) on a node's memory (columns)")
        out.print(_node_table(limits))
    elif len(pages.nodes()) == 1:
        out.print("  NUMA: one node, all memory is equally near", style="dim")
    out.print()
    _rows(out, _limit_rows(limits))
    for gpu in gpus:
        out.print()
        _rows(out, _gpu_rows(gpu))
    if not gpus:
        out.print(f"  GPUs: none measured; {no_gpu}", style="dim", markup=False)
    out.print("\nrecommended")
    for hint in hints:
        out.print(f"- {hint}", markup=False, soft_wrap=True)


def _rows(out: Console, rows: Sequence[tuple[str, str]]) -> None:
    table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    for name, value in rows:
        table.add_row(name, printable(value))
    out.print(table)


def _bandwidth_table(limits: CpuLimits) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("threads", justify="right")
    for kind in limits.bandwidth:
        table.add_column(f"{KINDS[kind]} pages", justify="right")
    for n in limits.bandwidth[TAKEN]:
        cells = []
        for kind, rates in limits.bandwidth.items():
            star = "*" if (kind, n) == (TAKEN, limits.n_threads) else " "
            cells.append(f"{rates[n] / 1e9:.1f} {_percent(rates[n] / limits.best):>5}{star}")
        table.add_row(str(n), *cells)
    return table


def _node_table(limits: CpuLimits) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("node", justify="right")
    columns = sorted({memory for _, memory in limits.nodes})
    for memory in columns:
        table.add_column(str(memory), justify="right")
    for node in sorted({node for node, _ in limits.nodes}):
        rates = (limits.nodes.get((node, memory)) for memory in columns)
        table.add_row(str(node), *(f"{rate / 1e9:.1f}" if rate else "-" for rate in rates))
    return table


def _limit_rows(limits: CpuLimits) -> list[tuple[str, str]]:
    count = "1 thread" if limits.n_threads == 1 else f"{limits.n_threads} threads"
    how = f"{limits.isa}, {count}"
    return [
        ("decode ceiling", f"{limits.taken / 1e9:.1f} tok/s for each GB that a token reads"),
        ("prefill ceiling", f"{limits.compute / 1e9:,.0f} G 8-bit products/s ({how})"),
        ("float32", f"{limits.float_compute / 1e9:,.0f} G products/s ({how})"),
        ("barrier", f"{1e6 * limits.barrier:.2f} us ({count})"),
    ]


def _gpu_rows(gpu: DeviceLimits) -> list[tuple[str, str]]:
    return [
        (gpu.name, f"{gpu.title}, {gpu.memory / 1e9:.1f} GB"),
        ("memory", f"{gpu.bandwidth / 1e9:,.0f} GB/s"),
        (
            "from the host",
            f"{gpu.pinned / 1e9:.1f} GB/s pinned, {gpu.pageable / 1e9:.1f} GB/s pageable",
        ),
        ("to the host", f"{gpu.back / 1e9:.1f} GB/s"),
        ("hand-over", f"{1e6 * gpu.hand_over:.1f} us"),
    ]


def to_dict(
    limits: CpuLimits, gpus: Sequence[DeviceLimits], hints: Sequence[str]
) -> dict[str, Any]:
    """The figures for --json, in seconds, bytes and multiply-adds per second."""
    return {
        "version": 1,
        "machine": dict(facts()),
        "threads": limits.n_threads,
        "bandwidth": {
            kind: {str(n): rate for n, rate in rates.items()}
            for kind, rates in limits.bandwidth.items()
        },
        "not_measured": dict(limits.skipped),
        "bytes_read": limits.nbytes,
        "in_huge_pages": limits.huge_share,
        "other_cpu": limits.other_cpu,
        "nodes": [
            {"threads": node, "memory": memory, "bandwidth": rate}
            for (node, memory), rate in limits.nodes.items()
        ],
        "isa": limits.isa,
        "compute": limits.compute,
        "float_compute": limits.float_compute,
        "barrier": limits.barrier,
        "planner": {"bandwidth": limits.taken, "threads": limits.n_threads},
        "fewest_threads": limits.fewest_threads(),
        "gpus": [asdict(gpu) for gpu in gpus],
        "recommended": list(hints),
    }


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"
