"""Machines in files: measured here, described by a user, or shipped with deskside.

A TOML file (`--machine`) describes a machine. `machine.json` in deskside's cache folder holds what
was measured here. The rest is assumed from what the system reports. The keys are the same:

    name = "…"
    [cpu]                         # every key is optional: else this machine's, or assumed
    cores = 16
    memory = "768GB"              # GB = 1e9 bytes, GiB = 2^30
    bandwidth_gb = 614.4          # GB/s of reads
    sustained = 0.85              # share of it that long reads reach
    compute_gmac = 8600           # 8-bit multiply-adds, G/s
    float_gmac = 1200             # float32 multiply-adds, G/s
    barrier_us = 1.0              # until all threads have met
    sources = {bandwidth = "12 x DDR5-6400"}    # where it is from: "measured …" or any text
    [[gpu]]
    name = "cuda0"
    memory = "96GB"
    bandwidth_gb = 1792
    transfer_gb = 55              # from the host's memory
    handshake_us = 4              # a hand-over to or from another device
    …
    [efficiency.experts]          # of the CPU by sort of step, see plan/speed.py
    bytes = 0.85
    macs = 0.38
    [[published]]                 # what others measured there
    preset = "qwen3.5-397b-a17b"
    engine = "…"
    decode = 22.5                 # tokens per second
    source = "…"
    [[published.runs]]            # optional: single inferences
    prompt = 4699
    generated = 13
    prefill = 314.22              # tokens per second
    decode = 21.95
    total = 15.5                  # seconds

What was published of a machine that comes with deskside is in the gallery (gallery.py).
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta, Struct, structs, to_builtins

from deskside import schema
from deskside.errors import DesksideError
from deskside.files import write_whole
from deskside.machine import gallery
from deskside.machine.devices import (
    GPU_NAME,
    Device,
    Efficiency,
    Figure,
    Machine,
    Published,
    assumed_cpu,
    assumed_gpu,
    canonical,
    parse_size,
)
from deskside.machine.system import available_memory, cpu_name, nvidia_gpus


def machine_file() -> Path:
    """The file with the measurements of this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "deskside" / "machine.json"


def this_machine(threads: int, path: Path | None = None) -> Machine:
    """This machine as measured (`machine_file`). What was not measured is assumed.

    Measurements of another CPU are not used. Without measured GPUs, those that the
    driver reports. DesksideError for a damaged file.
    """
    path = path or machine_file()
    found = _read(path) if path.exists() else _Description()
    if found.name != cpu_name():
        found = _Description(name=cpu_name())
    cpu = found.cpu if found.cpu.cores in (None, threads) else _Device()  # rates of other threads
    cpu = structs.replace(cpu, cores=threads, memory=available_memory())
    gpu = found.gpu or tuple(
        _Device(name=f"cuda{i}", memory=free) for i, free in enumerate(nvidia_gpus())
    )
    return _machine(structs.replace(found, cpu=cpu, gpu=gpu), path)


def store(machine: Machine, path: Path | None = None) -> Path:
    """Write a machine's measured figures, for later plans. Returns the file."""
    path = path or machine_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(to_dict(machine, measured_only=True), indent=1))
    return path


# --- description files ------------------------------------------------------------------------

# key of a file: field, and factor to SI
_RATES = {
    "bandwidth_gb": ("bandwidth", 1e9),
    "compute_gmac": ("compute", 1e9),
    "float_gmac": ("float_compute", 1e9),
    "transfer_gb": ("transfer", 1e9),
    "handshake_us": ("handshake", 1e-6),
    "barrier_us": ("handshake", 1e-6),
}
Rate = Annotated[float, Meta(gt=0, le=1e9, description="a number above 0")]
Size = str | int | float  # "96GiB", or bytes


class _Device(Struct, frozen=True, forbid_unknown_fields=True):
    """A [cpu] or [[gpu]] of a file. None: as assumed."""

    name: str | None = None
    cores: Annotated[int, Meta(ge=1, le=4096)] | None = None
    memory: Size | None = None
    margin: Size | None = None
    sustained: Annotated[float, Meta(gt=0, le=1)] | None = None
    bandwidth_gb: Rate | None = None
    compute_gmac: Rate | None = None
    float_gmac: Rate | None = None
    transfer_gb: Rate | None = None
    handshake_us: Rate | None = None
    barrier_us: Rate | None = None
    sources: dict[str, str] = {}


class _Description(Struct, frozen=True, forbid_unknown_fields=True):
    """A file."""

    name: str | None = None
    cpu: _Device = _Device()
    gpu: tuple[_Device, ...] = ()
    efficiency: dict[str, Efficiency] = {}
    efficiency_source: str | None = None
    published: tuple[Published, ...] = ()


def load_machine(name: str) -> Machine:
    """A machine from a TOML or JSON file, or a shipped one by its name."""
    path = Path(name)
    if not path.exists():
        shipped = {p.stem: p for p in _shipped()}
        if name not in shipped:
            raise DesksideError(
                f"--machine {name}: no such file, and none that comes with deskside "
                f"({', '.join(sorted(shipped))})"
            )
        machine = _machine(_read(shipped[name]), shipped[name])
        return replace(machine, published=(*machine.published, *gallery.published(name)))
    return _machine(_read(path), path)


def _shipped() -> list[Path]:
    folder = Path(str(resources.files("deskside") / "data" / "machines"))
    return sorted(folder.glob("*.toml"))


def _read(path: Path) -> _Description:
    return schema.build(schema.parse(path), _Description, str(path))


def _machine(found: _Description, path: Path) -> Machine:
    """DesksideError names the file and the field that is wrong."""
    cores = found.cpu.cores or 1
    devices = [_device(found.cpu, assumed_cpu(cores, available_memory()), path)]
    for i, gpu in enumerate(found.gpu):
        name = canonical(gpu.name or f"cuda{i}")
        if GPU_NAME.fullmatch(name) is None or name in {d.name for d in devices}:
            raise DesksideError(f"{path}: gpu name {name} is not cudaN or emuN, or appears twice")
        if gpu.memory is None:
            raise DesksideError(f"{path}: {name}.memory is missing")
        devices.append(_device(gpu, assumed_gpu(name, 0), path))
    source = found.efficiency_source or path.name
    return Machine(
        found.name or path.stem,
        cores,
        tuple(devices),
        found.efficiency,
        source if found.efficiency else "",
        found.published,
    )


def _device(found: _Device, base: Device, path: Path) -> Device:
    changes: dict[str, Any] = {}
    for key, (attribute, factor) in _RATES.items():
        if (value := getattr(found, key)) is not None:
            source = found.sources.get(attribute, path.name)
            changes[attribute] = Figure(value * factor, source)
    for key in ("memory", "margin"):
        if (size := getattr(found, key)) is not None:
            changes[key] = parse_size(str(size), f"{path}: {base.name}.{key}")
    if found.sustained is not None:
        changes["sustained"] = found.sustained
    return replace(base, **changes)


def to_dict(machine: Machine, *, measured_only: bool = False) -> dict[str, Any]:
    """What `load_machine` reads. measured_only: rates that were assumed are left out."""

    def device(d: Device) -> dict[str, Any]:
        entry: dict[str, Any] = {"name": d.name, "memory": str(d.memory)}
        entry |= {"sustained": d.sustained, "margin": str(max(d.margin, 1))}
        figures = d.figures()
        for key, (attribute, factor) in _RATES.items():
            wanted = attribute in figures and (key == "barrier_us") <= d.is_cpu
            if key == "handshake_us" and d.is_cpu:
                wanted = False
            if wanted and (figures[attribute].measured or not measured_only):
                entry[key] = figures[attribute].value / factor
                entry.setdefault("sources", {})[attribute] = figures[attribute].source
        return entry

    return {
        "name": machine.name,
        "cpu": {"cores": machine.cores, **device(machine.cpu)},
        "gpu": [device(d) for d in machine.gpus],
        "efficiency": to_builtins(machine.efficiency),
        "efficiency_source": machine.efficiency_source,
        "published": to_builtins(machine.published),
    }
