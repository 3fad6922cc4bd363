"""Machines in files: measured here (machine.json), described by a user, or shipped.

A machine is described by a TOML file (`--machine`), by `machine.json` in deskside's cache folder,
which holds what was measured here, or assumed from what the system tells. The keys are the same:

    name = "…"
    [cpu]                         # every key may be left out: then this machine's, or assumed
    cores = 16
    memory = "768GB"              # GB = 1e9 bytes, GiB = 2^30
    bandwidth_gb = 614.4          # GB/s of reads
    sustained = 0.85              # share of it that long reads reach
    compute_gmac = 8600           # 8-bit multiply-adds, G/s
    float_gmac = 1200             # float32 multiply-adds, G/s
    barrier_us = 1.0              # that all threads wait for each other
    sources = {bandwidth = "12 x DDR5-6400"}    # where a figure is from; "measured …" or anything
    [[gpu]]
    name = "cuda0"
    memory = "96GB"
    bandwidth_gb = 1792
    transfer_gb = 55              # from the host's memory
    handshake_us = 4              # to hand over to or from another device
    …
    [efficiency.experts]          # of the CPU by sort of step, see plan_speed
    bytes = 0.85
    macs = 0.38
    [[published]]                 # what others measured there
    preset = "qwen3.5-397b-a17b"
    engine = "…"
    decode = 22.5                 # tokens per second
    source = "…"
"""

from __future__ import annotations

import json
import os
import tomllib
from collections.abc import Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any

from deskside.errors import DesksideError
from deskside.files import write_whole
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
    """Where measurements of this machine are kept."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "deskside" / "machine.json"


def this_machine(threads: int, path: Path | None = None) -> Machine:
    """This machine as measured (`machine_file`), with what was not measured assumed.

    Measurements taken with another CPU are not used; GPUs that were not measured are those that
    the driver tells of. DesksideError for a damaged file.
    """
    path = path or machine_file()
    values: dict[str, Any] = {}
    if path.exists():
        values = _read(path)
        if values.get("name") != cpu_name():
            values = {}
    cpu = {**values.get("cpu", {}), "memory": str(available_memory())}
    if cpu.get("cores") not in (None, threads):
        cpu = {"memory": cpu["memory"]}  # rates of other threads
    if not values.get("gpu"):
        values["gpu"] = [
            {"name": f"cuda{i}", "memory": str(free)} for i, free in enumerate(nvidia_gpus())
        ]
    return parse_machine({"name": cpu_name(), **values, "cpu": {"cores": threads, **cpu}}, path)


def store(machine: Machine, path: Path | None = None) -> Path:
    """Write a machine's measured figures for the plans to come; the file that was written."""
    path = path or machine_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(to_dict(machine, measured_only=True), indent=1))
    return path


# --- description files ------------------------------------------------------------------------

_KEYS = {"name", "cpu", "gpu", "efficiency", "efficiency_source", "published"}
# key of a file: field, factor to SI, and the least value that makes sense
_RATES = {
    "bandwidth_gb": ("bandwidth", 1e9),
    "compute_gmac": ("compute", 1e9),
    "float_gmac": ("float_compute", 1e9),
    "transfer_gb": ("transfer", 1e9),
    "handshake_us": ("handshake", 1e-6),
    "barrier_us": ("handshake", 1e-6),
}
_OTHER = {"name", "cores", "memory", "sustained", "margin", "sources"}


def load_machine(name: str) -> Machine:
    """A machine from a TOML or JSON file, or one of those that come with deskside by its name."""
    path = Path(name)
    if not path.exists():
        shipped = {p.stem: p for p in _shipped()}
        if name not in shipped:
            raise DesksideError(
                f"--machine {name}: no such file, and none that comes with deskside "
                f"({', '.join(sorted(shipped))})"
            )
        path = shipped[name]
    return parse_machine(_read(path), path)


def _shipped() -> list[Path]:
    folder = Path(str(resources.files("deskside") / "data" / "machines"))
    return sorted(folder.glob("*.toml"))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except OSError as error:
        raise DesksideError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise DesksideError(f"{path}: no valid {path.suffix[1:] or 'JSON'}: {error}") from None
    if not isinstance(values, dict):
        raise DesksideError(f"{path}: expected keys and values at the top")
    return values


def parse_machine(values: Mapping[str, Any], path: Path) -> Machine:
    """A machine from its description; DesksideError names file and key of what is wrong."""
    unknown = sorted(values.keys() - _KEYS)
    if unknown:
        raise DesksideError(
            f"{path}: unknown key {unknown[0]}; there is {', '.join(sorted(_KEYS))}"
        )
    cpu = _table(values, "cpu", path)
    cores = cpu.get("cores", 1)
    if type(cores) is not int or not 1 <= cores <= 4096:
        raise DesksideError(f"{path}: cpu.cores is {cores!r}; expected a number of cores")
    devices = [_device(cpu, assumed_cpu(cores, available_memory()), path, "cpu")]
    gpus = values.get("gpu", [])
    if not isinstance(gpus, list) or not all(isinstance(g, dict) for g in gpus):
        raise DesksideError(f"{path}: gpu must be [[gpu]] tables")
    for i, gpu in enumerate(gpus):
        name = canonical(str(gpu.get("name", f"cuda{i}")))
        if GPU_NAME.fullmatch(name) is None or name in {d.name for d in devices}:
            raise DesksideError(f"{path}: gpu name {name} is not cudaN or emuN, or appears twice")
        if "memory" not in gpu:
            raise DesksideError(f"{path}: {name}.memory is missing")
        devices.append(_device(gpu, assumed_gpu(name, 0), path, name))
    efficiency = {
        sort: Efficiency(
            _number(_table(table, sort, path), "bytes", path),
            _number(_table(table, sort, path), "macs", path),
        )
        for table in (_table(values, "efficiency", path),)
        for sort in table
    }
    return Machine(
        str(values.get("name", path.stem)),
        cores,
        tuple(devices),
        efficiency,
        str(values.get("efficiency_source", path.name)) if efficiency else "",
        tuple(_published(entry, path) for entry in values.get("published", ())),
    )


def _published(entry: Any, path: Path) -> Published:
    try:
        return Published(
            str(entry["preset"]), str(entry["engine"]), float(entry["decode"]), str(entry["source"])
        )
    except (TypeError, KeyError, ValueError) as error:
        raise DesksideError(
            f"{path}: [[published]] needs preset, engine, decode and source: {error}"
        ) from None


def _table(values: Mapping[str, Any], key: str, path: Path) -> Mapping[str, Any]:
    table = values.get(key, {})
    if not isinstance(table, dict):
        raise DesksideError(f"{path}: {key} must be a table")
    return table


def _number(values: Mapping[str, Any], key: str, path: Path, max_value: float = 1e9) -> float:
    value = values.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= max_value:
        raise DesksideError(f"{path}: {key} is {value!r}; expected a number above 0")
    return float(value)


def _device(values: Mapping[str, Any], base: Device, path: Path, name: str) -> Device:
    unknown = sorted(values.keys() - _RATES.keys() - _OTHER)
    if unknown:
        raise DesksideError(f"{path}: unknown key {name}.{unknown[0]}")
    sources = _table(values, "sources", path)
    changes: dict[str, Any] = {}
    for key, (attribute, factor) in _RATES.items():
        if key in values:
            source = str(sources.get(attribute, path.name))
            changes[attribute] = Figure(_number(values, key, path) * factor, source)
    for key in ("memory", "margin"):
        if key in values:
            changes[key] = parse_size(str(values[key]), f"{path}: {name}.{key}")
    if "sustained" in values:
        changes["sustained"] = _number(values, "sustained", path, max_value=1)
    return replace(base, **changes)


def to_dict(machine: Machine, *, measured_only: bool = False) -> dict[str, Any]:
    """What `parse_machine` reads. measured_only: rates that were assumed are left out."""

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
        "efficiency": {
            sort: {"bytes": e.bytes, "macs": e.macs} for sort, e in machine.efficiency.items()
        },
        "efficiency_source": machine.efficiency_source,
        "published": [vars(p) for p in machine.published],
    }
