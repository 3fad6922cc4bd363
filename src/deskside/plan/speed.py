"""Predicts the speed of a placement from its ops' bytes and multiply-adds and the devices' rates.

A step on the CPU takes, for each sort of step:

    t = bytes / (bandwidth * sustained * e_bytes) + macs / (arithmetic * e_macs)

Both shares e are measured (`calibrate`). The terms add because prefetching hides only part of
either. 8-bit products count against `compute`; float ones (router, attention, delta rule, row-wise
ops) against `float_compute`. A GPU takes the larger of both terms, at its assumed sustained rates.

Every step of tasks on the CPU adds a barrier. Every change of device adds a hand-over and the
transfer of activations. Shared and routed experts on two devices overlap.

The roofline takes the larger of bytes and products at full rates, and sums over atoms. It has no
barriers, hand-overs or row-wise ops.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside.gguf.quants import QuantType
from deskside.machine.devices import CPU, Device, Efficiency, Machine, Published, PublishedRun
from deskside.plan.units import EXPERTS, SHARED, Atom, Grouping
from deskside.tape.cost import BatchShape, work

# docs/LOG.md and the records of docs/benchmarks: two cores of a Xeon with AVX-512 VNNI.
EFFICIENCY: dict[str, Efficiency] = {
    "dense": Efficiency(0.95, 0.48),
    "experts": Efficiency(0.85, 0.38),
    "head": Efficiency(0.95, 0.48),
    "router": Efficiency(0.90, 0.40),
    "attention": Efficiency(1.0, 0.85),
    "delta": Efficiency(1.0, 0.67),
    "rows": Efficiency(1.0, 0.017),
}
EFFICIENCY_SOURCE = "assumed: as measured on docs/LOG.md's Xeon"
FULL = Efficiency(1.0, 1.0)
FLOAT_SORTS = frozenset({"router", "attention", "delta", "rows"})
TASKS_STEPS = 6  # steps of tasks in a layer, each with a barrier (docs/ARCHITECTURE.md)
SHORT_PROMPT, LONG_PROMPT = 512, 16384
DEPTHS = (0, 1024, 4096, 16384, 65536)

Floats = NDArray[np.float64]
BySort = dict[str, tuple[float, float]]  # sort -> bytes, multiply-adds


@dataclass(frozen=True)
class Rate:
    """Predicted tokens per second: of decode after `depth` tokens, or of a prompt's prefill.

    prompt       tokens of the prompt; 0 for decode
    n_seq        sequences; the tokens of all count
    rate         predicted; roofline: the bound
    limit        the resource that takes most of the time; limit_share: its share, 0 to 1
    seconds      of one token, by resource
    """

    prompt: int
    depth: int
    n_seq: int
    rate: float
    roofline: float
    limit: str
    limit_share: float
    seconds: Mapping[str, float]

    @property
    def share(self) -> float:
        """Share of the roofline, 0 to 1."""
        return self.rate / self.roofline


def device_seconds(
    sorts: BySort, device: Device, efficiency: Mapping[str, Efficiency]
) -> tuple[float, float]:
    """Seconds of reading and of arithmetic. Their sum is the time; a GPU's smaller one is 0.

    sorts: bytes and multiply-adds, by sort. efficiency: of the CPU, by sort.
    """
    reading = arithmetic = 0.0
    for sort, (nbytes, macs) in sorts.items():
        e = efficiency[sort] if device.is_cpu else FULL
        reading += nbytes / (device.bandwidth.value * device.sustained * e.bytes)
        if sort == "rows" and not device.is_cpu:
            continue  # a GPU fuses them into its kernels
        rate = device.float_compute if sort in FLOAT_SORTS else device.compute
        arithmetic += macs / (rate.value * e.macs)
    if device.is_cpu:
        return reading, arithmetic
    return (reading, 0.0) if reading > arithmetic else (0.0, arithmetic)


class SpeedModel:
    """Predicts seconds of steps on a machine, for many placements at once."""

    def __init__(
        self, cut: Grouping, machine: Machine, k_type: QuantType, v_type: QuantType
    ) -> None:
        self.cut = cut
        self.machine = machine
        self.k_type, self.v_type = k_type, v_type
        self.n_embd = next(op.outputs[0].width for op in cut.tape.ops if op.kind == "embed")
        self.efficiency = {**EFFICIENCY, **machine.efficiency}
        self._pairs = _overlapping(cut.atoms)
        self._works: dict[BatchShape, list[BySort]] = {}  # a plan asks for each shape many times
        self._tables: dict[BatchShape, Floats] = {}  # seconds (atoms, devices)

    def works(self, shape: BatchShape) -> list[BySort]:
        """Bytes and multiply-adds of every atom, by sort."""
        if shape not in self._works:
            self._works[shape] = [self._work(atom, shape) for atom in self.cut.atoms]
        return self._works[shape]

    def seconds(self, shape: BatchShape, places: NDArray[np.intp]) -> Floats:
        """Seconds of one step: (placements,). places: (placements, atoms), indices of devices."""
        devices = self.machine.devices
        if shape not in self._tables:
            self._tables[shape] = np.array(
                [[self._seconds(w, d) for d in devices] for w in self.works(shape)]
            )
        table = self._tables[shape]
        chosen = table[np.arange(len(table)), places]
        total = chosen.sum(axis=1)
        hop = np.array([[self._hop(a, b, shape.tokens) for b in devices] for a in devices])
        total += hop[places[:, :-1], places[:, 1:]].sum(axis=1)
        for experts, shared in self._pairs:
            together = np.minimum(chosen[:, experts].sum(axis=1), chosen[:, shared].sum(axis=1))
            total -= np.where(places[:, experts[0]] != places[:, shared[0]], together, 0.0)
        on_cpu = (places == 0).any(axis=1)
        found: Floats = total + on_cpu * self._barriers(places)
        return found

    def rate(self, shape: BatchShape, place: NDArray[np.intp], prompt: int = 0) -> Rate:
        """Predicted speed of one placement. place: (atoms,), indices of devices.

        prompt: 0 for decode; else the tokens of a prompt, computed in pieces of `shape.n`. The
        depths of the pieces and the size of the last then follow from `prompt`.
        """
        steps = [(1.0, shape)] if not prompt else list(_pieces(prompt, shape.n, shape.n_seq))
        tokens = prompt * shape.n_seq if prompt else shape.tokens
        total = roof = 0.0
        parts: dict[str, float] = {}
        for count, piece in steps:
            total += count * float(self.seconds(piece, place[None])[0])
            roof += count * self._roofline(piece, place)
            for name, t in self._parts(piece, place).items():
                parts[name] = parts.get(name, 0.0) + count * t
        limit = max(parts, key=lambda name: parts[name])
        share = parts[limit] / sum(parts.values())
        seconds = {name: t / tokens for name, t in sorted(parts.items(), key=lambda p: -p[1])}
        return Rate(
            prompt,
            int(shape.depth),
            shape.n_seq,
            tokens / total,
            tokens / roof,
            limit,
            share,
            seconds,
        )

    def gain(self, unit: int, shape: BatchShape, device: Device) -> float:
        """Seconds that a unit saves on a device, compared with the CPU."""
        works = (self._work(a, shape) for a in self.cut.atoms if a.unit == unit and a.pin is None)
        cpu = self.machine.cpu
        return sum(self._seconds(w, cpu) - self._seconds(w, device) for w in works)

    def _barriers(self, places: NDArray[np.intp]) -> Floats:
        atoms = [a.layer for a in self.cut.atoms]
        last = self.cut.n_layers
        share = np.array([1.0 / atoms.count(layer) if 0 <= layer < last else 0 for layer in atoms])
        each = TASKS_STEPS * self.machine.cpu.handshake.value
        found: Floats = each * ((places == 0) * share).sum(axis=1)
        return found

    def _hop(self, a: Device, b: Device, tokens: int) -> float:
        """Seconds to move activations between devices, through the host's memory."""
        if a is b:
            return 0.0
        nbytes = 4.0 * tokens * self.n_embd
        over = sum(nbytes / d.transfer.value for d in (a, b) if not d.is_cpu)
        return max(d.handshake.value for d in (a, b) if not d.is_cpu) + over

    def _parts(self, shape: BatchShape, place: NDArray[np.intp]) -> dict[str, float]:
        """Seconds of a step by resource. Overlap is not subtracted."""
        devices = self.machine.devices
        parts: dict[str, float] = {}
        for sorts, d in zip(self.works(shape), place, strict=True):
            reading, arithmetic = device_seconds(sorts, devices[d], self.efficiency)
            for what, t in (("memory bandwidth", reading), ("arithmetic", arithmetic)):
                name = f"{devices[d].name} {what}"
                parts[name] = parts.get(name, 0.0) + t
        hops = sum(
            self._hop(devices[a], devices[b], shape.tokens) for a, b in itertools.pairwise(place)
        )
        parts["hand-overs"] = float(hops)
        parts["cpu barriers"] = float(self._barriers(place[None])[0])
        return {name: t for name, t in parts.items() if t > 0}

    def _roofline(self, shape: BatchShape, place: NDArray[np.intp]) -> float:
        devices = self.machine.devices
        times = []
        for sorts, d in zip(self.works(shape), place, strict=True):
            device, nbytes, integer, floating = devices[d], 0.0, 0.0, 0.0
            for sort, (b, macs) in sorts.items():
                nbytes += b
                if sort in FLOAT_SORTS:
                    floating += macs * (sort != "rows")
                else:
                    integer += macs
            times.append(
                max(
                    nbytes / device.bandwidth.value,
                    integer / device.compute.value,
                    floating / device.float_compute.value,
                )
            )
        total = float(sum(times))
        for experts, shared in self._pairs:
            if place[experts[0]] != place[shared[0]]:
                total -= min(sum(times[i] for i in group) for group in (experts, shared))
        return total

    def _work(self, atom: Atom, shape: BatchShape) -> BySort:
        found: BySort = {}
        for op in atom.ops:
            one = work(op, self.cut.tape.states, shape, self.k_type, self.v_type)
            nbytes, macs = found.get(one.sort, (0.0, 0.0))
            found[one.sort] = (nbytes + one.nbytes, macs + one.macs)
        return found

    def _seconds(self, sorts: BySort, device: Device) -> float:
        return sum(device_seconds(sorts, device, self.efficiency))


def _overlapping(atoms: Sequence[Atom]) -> list[tuple[list[int], list[int]]]:
    """For each layer, the atoms of its routed experts and of its shared expert."""
    layers: dict[int, tuple[list[int], list[int]]] = {}
    for i, atom in enumerate(atoms):
        if atom.role in (EXPERTS, SHARED):
            layers.setdefault(atom.layer, ([], []))[atom.role == SHARED].append(i)
    return [pair for pair in layers.values() if pair[0] and pair[1]]


def _pieces(prompt: int, ubatch: int, n_seq: int) -> list[tuple[float, BatchShape]]:
    """Steps of a prompt and how often each runs: whole pieces at their mean depth, and the rest."""
    whole, rest = divmod(prompt, ubatch)
    pieces = []
    if whole:
        pieces.append((float(whole), BatchShape(ubatch, (whole - 1) * ubatch / 2, n_seq)))
    if rest:
        pieces.append((1.0, BatchShape(rest, whole * ubatch, n_seq)))
    return pieces


def predict(
    model: SpeedModel, place: NDArray[np.intp], ctx: int, ubatch: int, n_seq: int
) -> list[Rate]:
    """Rates of prompts, of decode at several depths, and of `n_seq` sequences together.

    place: (atoms,), indices of devices. ctx, ubatch: tokens.
    """
    rates = []
    prompts = sorted({min(SHORT_PROMPT, ctx), min(LONG_PROMPT, ctx)})
    for prompt in prompts:
        rates.append(model.rate(BatchShape(min(ubatch, prompt), 0), place, prompt))
    for depth in (*(d for d in DEPTHS if d < ctx - 1), ctx - 1):
        rates.append(model.rate(BatchShape(1, depth), place))
    if n_seq > 1:
        rates.append(model.rate(BatchShape(1, min(4096, ctx - 1), n_seq), place))
    return rates


@dataclass(frozen=True)
class Replayed:
    """A run that others published, and what is computed for it. decode: at its mean depth."""

    run: PublishedRun
    prefill: Rate
    decode: Rate

    @property
    def total(self) -> float:
        """Seconds of prompt and answer, whose first token comes with the prompt."""
        return self.run.prompt / self.prefill.rate + (self.run.generated - 1) / self.decode.rate


def replays(
    model: SpeedModel,
    place: NDArray[np.intp],
    published: Sequence[Published],
    ctx: int,
    ubatch: int,
) -> Iterator[Replayed]:
    """The published runs that a context of `ctx` tokens holds."""
    for run in dict.fromkeys(run for p in published for run in p.runs):
        if run.prompt + run.generated <= ctx:
            depth = run.prompt + (run.generated - 1) // 2
            prefill = model.rate(BatchShape(min(ubatch, run.prompt), 0), place, run.prompt)
            yield Replayed(run, prefill, model.rate(BatchShape(1, depth), place))


def sources(machine: Machine, used: Sequence[str]) -> list[str]:
    """One line for each figure that the prediction uses, assumed or measured."""
    lines = []
    for device in machine.devices:
        if device.name not in used:
            continue
        for name, figure in device.figures().items():
            lines.append(
                f"{device.name} {name.replace('_', ' ')} {_show(name, figure.value)}: "
                f"{figure.source}"
            )
    if CPU in used:
        assumed = [sort for sort in EFFICIENCY if sort not in machine.efficiency]
        for sorts, source in (
            (list(machine.efficiency), machine.efficiency_source),
            (assumed, EFFICIENCY_SOURCE),
        ):
            if sorts:
                lines.append(f"cpu efficiency of {', '.join(sorts)}: {source}")
    return lines


def _show(name: str, value: float) -> str:
    if name == "handshake":
        return f"{1e6 * value:.3g} us"
    unit = "GB/s" if name in ("bandwidth", "transfer") else "G products/s"
    return f"{value / 1e9:,.4g} {unit}"
