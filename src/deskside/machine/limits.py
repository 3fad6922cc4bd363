"""Measures what limits this machine's CPU: bandwidth, arithmetic, barriers.

Bandwidth is measured by threads, pages and NUMA node. `as_measured` puts the planner's figures into
a machine's description. The float32 limit is not one of them: the planner's shares of float
arithmetic are relative to an assumed rate.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from deskside import _native
from deskside.machine import pages, rates
from deskside.machine.devices import MEASURED, Device, Figure, Machine
from deskside.machine.system import available_memory
from deskside.progress import Progress, silent

# Pages to read memory in, in the order of the table, with their titles.
KINDS = {"off": "4 KiB", "auto": "transparent", "2MiB": "2 MiB", "1GiB": "1 GiB"}
TAKEN = "auto"  # pages of the weights by default
ENOUGH = 0.97  # of the best bandwidth: more threads are not worth it
BARRIER_SECONDS = 0.2
BUSY = 0.1  # cores that other programs keep busy: more spoils a measurement
NODE_PASSES = 2
SPARE = 256 << 20  # bytes that stay free on a node


@dataclass(frozen=True)
class CpuLimits:
    """Rates per second; times in seconds.

    bandwidth  bytes, by pages (KINDS), then by number of threads
    skipped    pages that were not measured, and why
    nodes      (node of the threads, node of the memory) -> bytes; empty with one node
    n_threads  for compute, float_compute (multiply-adds, 8-bit and float32) and barrier
    isa        instruction set of the multiply-adds
    nbytes     bytes read
    huge_share share of the transparent huge pages asked for that the kernel gave; None: unknown
    other_cpu  cores that other programs kept busy meanwhile; None: unknown
    """

    n_threads: int
    bandwidth: Mapping[str, Mapping[int, float]]
    compute: float
    float_compute: float
    barrier: float
    isa: str
    nbytes: int
    skipped: Mapping[str, str] = field(default_factory=dict)
    nodes: Mapping[tuple[int, int], float] = field(default_factory=dict)
    huge_share: float | None = None
    other_cpu: float | None = None

    @property
    def disturbed(self) -> bool:
        """Whether other programs spoiled the figures."""
        return self.other_cpu is not None and self.other_cpu > BUSY

    @property
    def best(self) -> float:
        """The highest bandwidth of all."""
        return max(rate for rates in self.bandwidth.values() for rate in rates.values())

    @property
    def taken(self) -> float:
        """The planner's bandwidth: of all threads, in pages as for weights."""
        return self.bandwidth[TAKEN][self.n_threads]

    def fewest_threads(self) -> int:
        """The fewest threads that reach 97 % of the best bandwidth of such pages."""
        rates = self.bandwidth[TAKEN]
        return min(n for n, rate in rates.items() if rate >= ENOUGH * max(rates.values()))


def thread_counts(n_threads: int) -> list[int]:
    """1, 2, 4, ... and all."""
    return sorted({n_threads, *(1 << i for i in range(n_threads.bit_length()))})


def measure_cpu(
    n_threads: int, *, quick: bool = False, nbytes: int = 0, progress: Progress = silent
) -> CpuLimits:
    """Measure with at most `n_threads`. quick: one and all threads, transparent pages only.

    nbytes: how much to read; 0 for more than the caches hold. DesksideError or MemoryError if there
    is not enough memory.
    """
    nbytes = nbytes or rates.bandwidth_bytes(available_memory())
    counts = sorted({1, n_threads}) if quick else thread_counts(n_threads)
    kinds = [TAKEN] if quick else list(KINDS)
    nodes = [] if quick else pages.nodes()
    total = len(kinds) * (1 + len(counts)) + 3 + (len(nodes) ** 2 if len(nodes) > 1 else 0)
    done = 0

    def step(label: str) -> None:
        nonlocal done
        progress(label, done, total)
        done += 1

    bandwidth: dict[str, dict[int, float]] = {}
    skipped: dict[str, str] = {}
    huge_share = None
    for kind in kinds:
        step(f"memory in {KINDS[kind]} pages")
        size, why = _readable(kind, nbytes)
        if not why:
            huge = pages.transparent_bytes()
            try:
                reader = rates.reader(n_threads, kind, size)
            except MemoryError:
                if kind == TAKEN:
                    raise
                why = "refused by the system"
        if why:
            skipped[kind] = why
            done += len(counts)
            continue
        if kind == TAKEN and huge is not None:
            huge_share = min(1.0, ((pages.transparent_bytes() or 0) - huge) / size)
        bandwidth[kind] = {}
        for n in counts:
            step(f"read bandwidth, {KINDS[kind]} pages, {n} thread{'s' if n > 1 else ''}")
            bandwidth[kind][n] = reader.read(n, rates.PASSES)
        del reader  # before memory for the next kind is allocated
    between = _between_nodes(nodes, nbytes, step) if len(nodes) > 1 else {}
    step("8-bit arithmetic")
    compute = rates.compute(n_threads)
    step("float32 arithmetic")
    floats = rates.compute(n_threads, floats=True)
    step("barriers")
    barrier = _native.barrier_seconds(n_threads, BARRIER_SECONDS)
    progress("done", total, total)
    return CpuLimits(
        n_threads=n_threads,
        bandwidth=bandwidth,
        compute=compute,
        float_compute=floats,
        barrier=barrier,
        isa=_native.choose(),
        nbytes=nbytes,
        skipped=skipped,
        nodes=between,
        huge_share=huge_share,
    )


def _readable(kind: str, nbytes: int) -> tuple[int, str]:
    """Bytes to read in pages of that kind, and the reason if they cannot be measured."""
    if kind not in pages.RESERVED:
        return nbytes, ""
    pool = pages.reserved(kind)
    if pool is None:
        return 0, "none on this system"
    size = min(nbytes, pool.free * pool.size)
    # fewer bytes would come from the caches
    min_bytes = min(nbytes, max(1 << 27, 2 * rates.last_level_cache()))
    if size < min_bytes:
        few = f"{pool.free} free, {-(-min_bytes // pool.size)} are needed"
        return 0, few if pool.total else "none are reserved"
    return size, ""


def _between_nodes(
    nodes: Sequence[pages.Node], nbytes: int, step: Callable[[str], None]
) -> dict[tuple[int, int], float]:
    """Bandwidth of each node's threads on each node's memory, with one thread per usable CPU of the
    node. Pairs without threads or with too little memory are left out."""
    usable = os.sched_getaffinity(0)
    nbytes = max(min(nbytes, 1 << 27), nbytes // len(nodes))  # a node has its share of the caches
    found: dict[tuple[int, int], float] = {}
    cpus = {node.number: [c for c in node.cpus if c in usable] for node in nodes}
    for memory in nodes:
        own = cpus[memory.number] or sorted(usable)
        reader = None
        if memory.free > nbytes + SPARE:
            reader = rates.reader(len(own), TAKEN, nbytes, memory.number, own)
        for node in nodes:
            step(f"read bandwidth, node {node.number} on node {memory.number}'s memory")
            threads = cpus[node.number]
            if reader is not None and not reader.nodes_error and threads:
                rate = reader.read(len(threads), NODE_PASSES, threads)
                found[node.number, memory.number] = rate
        del reader
    return found


def as_measured(base: Machine, limits: CpuLimits, gpus: Sequence[Device] = ()) -> Machine:
    """`base` with the measured figures. Its other figures stay.

    gpus: measured ones, which replace those of the same name.
    """
    when = f"{MEASURED} {datetime.date.today()}, {limits.n_threads} threads"
    if limits.n_threads == 1:
        when = when.removesuffix("s")
    if limits.disturbed:
        when += f" while other programs kept {limits.other_cpu:.1f} cores busy"
    read = f"{when}, {limits.nbytes / 1e9:.1f} GB in transparent huge pages"
    cpu = replace(
        base.cpu,
        bandwidth=Figure(limits.taken, read),
        compute=Figure(limits.compute, f"{when}, {limits.isa}"),
        handshake=Figure(limits.barrier, when),
        sustained=1.0,
    )
    new = {d.name for d in gpus}
    kept = [d for d in base.gpus if d.name not in new]
    devices = (cpu, *sorted([*gpus, *kept], key=lambda d: (len(d.name), d.name)))
    return replace(base, cores=limits.n_threads, devices=devices)
