"""Devices that hold tensors: memory, rates, and the source of each figure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deskside.errors import DesksideError
from deskside.machine.system import cpu_flags
from deskside.schema import Positive

CPU = "cpu"
MEASURED = "measured"
MiB, GiB = 1 << 20, 1 << 30
# CPU: Python, tokenizer and templates. GPU: a CUDA context and what torch keeps.
CPU_MARGIN, GPU_MARGIN = 256 * MiB, GiB
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_UNITS |= {"kib": 1 << 10, "mib": MiB, "gib": GiB, "tib": 1 << 40}
GPU_NAME = re.compile(r"(cuda|emu)\d+")


@dataclass(frozen=True)
class Figure:
    """A rate or a time, and its source. That begins with "measured" if it was measured."""

    value: float
    source: str

    @property
    def measured(self) -> bool:
        return self.source.startswith(MEASURED)


@dataclass(frozen=True)
class Device:
    """Memory in bytes; rates per second.

    bandwidth      of its memory, bytes
    transfer       from the host's memory, bytes
    compute, float_compute   8-bit and float32 multiply-adds
    handshake      seconds to hand over to another device; on the CPU, of a barrier
    sustained      share of the bandwidth that long reads reach
    margin         bytes of `memory` that a plan leaves free
    """

    name: str
    memory: int
    bandwidth: Figure
    compute: Figure
    float_compute: Figure
    handshake: Figure
    transfer: Figure
    sustained: float = 1.0
    margin: int = 0

    @property
    def is_cpu(self) -> bool:
        return self.name == CPU

    def figures(self) -> dict[str, Figure]:
        names = ("bandwidth", "compute", "float_compute", "handshake")
        own = names if self.is_cpu else (*names, "transfer")
        return {name: getattr(self, name) for name in own}


@dataclass(frozen=True)
class PublishedRun:
    """One inference that others measured: tokens, tokens per second, seconds."""

    prompt: int
    generated: int
    prefill: Positive
    decode: Positive
    total: Positive


@dataclass(frozen=True)
class Published:
    """Speed that others measured on a machine. decode: tokens per second, a mean over runs.

    experts: types of routed experts that it holds for; () for any.
    """

    preset: str
    engine: str
    decode: Positive
    source: str
    experts: tuple[str, ...] = ()
    runs: tuple[PublishedRun, ...] = ()


@dataclass(frozen=True)
class Efficiency:
    """Shares of sustained bandwidth and arithmetic that one sort of step reaches."""

    bytes: Positive
    macs: Positive


@dataclass(frozen=True)
class Machine:
    """devices: the CPU first. efficiency: of the CPU's steps, by sort, if measured."""

    name: str
    cores: int
    devices: tuple[Device, ...]
    efficiency: Mapping[str, Efficiency] = field(default_factory=dict)
    efficiency_source: str = ""
    published: tuple[Published, ...] = ()

    @property
    def cpu(self) -> Device:
        return self.devices[0]

    @property
    def gpus(self) -> tuple[Device, ...]:
        return self.devices[1:]

    def device(self, name: str) -> Device:
        return next(d for d in self.devices if d.name == name)


def parse_size(text: str, what: str) -> int:
    """Bytes of "96GiB", "24GB", "512MiB" or a plain number."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip().lower())
    if found is None or found[2] not in _UNITS:
        raise DesksideError(f"{what} {text!r} is no size; write it as 96GiB or 96GB")
    size = float(found[1]) * _UNITS[found[2]]
    if not 1 <= size < 2**60:
        raise DesksideError(f"{what} {text!r}: expected more than 0 and less than an exabyte")
    return int(size)


def canonical(name: str) -> str:
    """Our name of a device. Also takes llama.cpp's: CUDA0, CPU, CUDA_Host (system memory)."""
    low = name.lower()
    return CPU if low in ("cpu", "cuda_host", "cpu_mapped") else low


def show_size(n: float) -> str:
    """Bytes as text: GB = 1e9."""
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.2f} {unit}"
    return f"{n:.0f} B"


# Per core of the 2-core Xeon of docs/LOG.md: read bandwidth, 8-bit and float32 multiply-adds.
_LOG = "assumed: as a core of docs/LOG.md's Xeon"
_CORE_BANDWIDTH = 16.8e9
_CORE_COMPUTE = {"avx512_vnni": 473e9, "avx2": 87e9, "": 43e9}
_CORE_FLOAT = {"avx512_vnni": 75e9, "avx2": 60e9, "": 20e9}


def assumed_cpu(cores: int, memory: int) -> Device:
    """A CPU with this machine's instruction set, and cores as fast as docs/LOG.md's."""
    flags = cpu_flags()
    isa = next(name for name in _CORE_COMPUTE if not name or name in flags)
    return Device(
        CPU,
        memory,
        Figure(cores * _CORE_BANDWIDTH, _LOG),
        Figure(cores * _CORE_COMPUTE[isa], _LOG),
        Figure(cores * _CORE_FLOAT[isa], _LOG),
        Figure(2e-6, "assumed"),
        Figure(0.0, "unused"),
        margin=CPU_MARGIN,
    )


def assumed_gpu(name: str, memory: int) -> Device:
    """A GPU with the rates of an RTX PRO 6000 on PCIe 5 x16, also for an emulated device."""
    source = "assumed: RTX PRO 6000 (docs/MODEL.md)"
    if name.startswith("emu"):
        source = "assumed: as if it were an RTX PRO 6000 (docs/MODEL.md)"
    return Device(
        name,
        memory,
        Figure(1792e9, source),
        Figure(100e12, "assumed: 200 TFLOPS in effect"),
        Figure(30e12, "assumed: half of 120 TFLOPS float32"),
        Figure(4e-6, "assumed: 2 to 5 us"),
        Figure(55e9, "assumed: PCIe 5 x16"),
        sustained=0.85,
        margin=0 if name.startswith("emu") else GPU_MARGIN,
    )


def choose_devices(machine: Machine, asked: Sequence[str], margin: int | None) -> Machine:
    """The machine with the devices of `--device`: NAME or NAME:SIZE each, "none" for the CPU alone.

    Without any, all devices of the machine. DesksideError for a device that the machine does not
    have, unless its size is given.
    """
    if not asked:
        gpus = list(machine.gpus)
    else:
        gpus = []
        for entry in asked:
            name, colon, size = entry.partition(":")
            name = canonical(name.strip())
            if name in (CPU, "none") and not colon:
                continue
            if GPU_NAME.fullmatch(name) is None:
                raise DesksideError(f"--device {entry}: expected cudaN, emuN or none, with :SIZE")
            if any(d.name == name for d in gpus):
                raise DesksideError(f"--device names {name} twice")
            known = next((d for d in machine.gpus if d.name == name), None)
            if known is None and not colon:
                raise DesksideError(
                    f"--device {name}: this machine's description has no such device; say how much "
                    f"memory it has, as {name}:96GiB"
                )
            device = known or assumed_gpu(name, 0)
            memory = parse_size(size, f"--device {name}") if colon else device.memory
            gpus.append(replace(device, memory=memory))
    devices = (machine.cpu, *gpus)
    if margin is not None:
        devices = tuple(replace(d, margin=margin) for d in devices)
    for d in devices:
        if d.margin >= d.memory:
            raise DesksideError(
                f"{d.name} has {show_size(d.memory)}, of which {show_size(d.margin)} are to stay "
                "free: nothing is left; see --margin"
            )
    return replace(machine, devices=devices)
