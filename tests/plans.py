"""Tapes of presets, machines and options to plan with."""

from __future__ import annotations

from functools import cache

from deskside.convert.synth import outline
from deskside.lowering.memory import Memory
from deskside.machine.devices import Device, Figure, Machine
from deskside.models import build_tape
from deskside.plan import Options
from deskside.tape import Tape

MiB = 1 << 20


@cache
def tape_of(preset: str, layers: int | None = None) -> Tape:
    return build_tape(outline(preset, layers=layers).gguf())


@cache
def memory_of(preset: str, layers: int | None = None) -> Memory:
    return Memory(tape_of(preset, layers), threads=2, ubatch=64)


def machine(cpu: float, *gpus: float, margin: int = 0) -> Machine:
    """Memories in MiB. GPUs hand over in no time, so that even a tiny layer is worth it."""

    def device(name: str, memory: float, scale: float) -> Device:
        def figure(rate: float) -> Figure:
            return Figure(rate, "test")

        return Device(
            name,
            int(memory * MiB),
            bandwidth=figure(scale * 30e9),
            compute=figure(scale * 400e9),
            float_compute=figure(scale * 60e9),
            handshake=figure(1e-9),
            transfer=figure(1e12),
            margin=margin,
        )

    devices = [device("cpu", cpu, 1)]
    devices += [device(f"cuda{i}", m, 10) for i, m in enumerate(gpus)]
    return Machine("test", 2, tuple(devices))


def options(ctx: int = 512, **more: object) -> Options:
    return Options(ctx=ctx, ubatch=64, threads=2, **more)  # type: ignore[arg-type]
