"""The test environment: what ran, on what. Whatever a record does not tell is "unknown"."""

from __future__ import annotations

import shlex
from collections.abc import Callable

from deskside.bench.record import Record, Target
from deskside.bench.report.tables import Table
from deskside.machine.devices import show_size
from deskside.machine.environment import Gpu, Modules
from deskside.machine.watch import Host

UNKNOWN = "unknown"


def table(record: Record) -> Table:
    m = record.machine
    facts = {
        "CPU": f"{m.cpu}, {m.cores} usable cores" if m.cpu else "",
        "instruction sets": " ".join(m.flags),
        "memory": show_size(m.memory) if m.memory else "",
        "memory modules": _modules(m.modules),
        "GPU": _gpus(m.gpus, lambda gpu: gpu.name + _size(gpu)),
        "GPU driver": _gpus(m.gpus, lambda gpu: gpu.driver or UNKNOWN),
        "distribution": m.distribution or "",
        "kernel": m.kernel,
        "frequency governor": m.governor or "",
        "container": m.container or "",
        "runtime": _runtime(record, m),
    }
    for side, target in record.targets.items():
        place = f", {side}" if len(record.targets) > 1 else ""
        facts |= {f"{name}{place}": text for name, text in _target(target).items()}
    facts |= {
        "command line": shlex.join(record.command),
        "measured": record.created,
        "seed": str(record.seed),
    }
    rows = [[name, text or UNKNOWN] for name, text in facts.items()]
    return Table("Test environment", ["", ""], rows, text=2)


def _modules(found: Modules | None) -> str:
    if found is None:
        return ""
    speed = f"{found.speed:,} MT/s" if found.speed else "speed unknown"
    channels = f"{found.channels} channels" if found.channels else "channels unknown"
    kind = found.type or "type unknown"
    return f"{found.count}, {show_size(found.nbytes)} together, {kind}, {speed}, {channels}"


def _gpus(found: list[Gpu] | None, text: Callable[[Gpu], str]) -> str:
    if found is None:
        return ""
    return ", ".join(map(text, found)) or "none"


def _size(gpu: Gpu) -> str:
    return f", {show_size(gpu.memory)}" if gpu.memory else ""


def _runtime(record: Record, m: Host) -> str:
    return ", ".join(
        (
            f"deskside {record.deskside or UNKNOWN}",
            f"commit {record.commit or UNKNOWN}",
            f"compiler {record.compiler or UNKNOWN}",
            f"Python {m.python or UNKNOWN}",
        )
    )


def _target(t: Target) -> dict[str, str]:
    types = ", ".join(f"{name} {show_size(size)}" for name, size in t.types.items())
    return {
        "engine": t.engine,
        "quant types": types,
        "context": f"{t.n_ctx:,} tokens" if t.n_ctx is not None else "",
    }
