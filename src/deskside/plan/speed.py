"""Predicted speed of a placement, from bytes and multiply-adds of its ops and the devices' rates.

A step of the CPU takes, per sort of step, what it reads and what it multiplies, one after another:

    t = bytes / (bandwidth * sustained * e_bytes) + macs / (arithmetic * e_macs)

Both shares e are measured (`calibrate`); the sum and not the larger of the two, for prefetching
hides only part of either. 8-bit products go by `compute`, float ones (router, attention, delta
rule, row-wise ops) by `float_compute`. A GPU takes the larger of the two, at its assumed
sustained rates. On top come a barrier for every step of tasks on the CPU and a hand-over, with the
activations, for every change of device. Shared and routed experts overlap where they are on two
devices.

The roofline is the same sum over atoms of the larger of bytes and products at full rates, without
barriers, hand-overs and row-wise ops.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside.gguf.quants import QuantType
from deskside.lowering.steps import FLOAT_TYPES
from deskside.machine.devices import CPU, Device, Efficiency, Machine
from deskside.plan.units import EXPERTS, SHARED, Atom, Cut
from deskside.tape import Op
from deskside.tape.cache import cache_bytes
from deskside.tape.cost import Experts

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
TASKS_STEPS = 6  # of a layer, and as many barriers (docs/ARCHITECTURE.md)
SHORT_PROMPT, LONG_PROMPT = 512, 16384
DEPTHS = (0, 1024, 4096, 16384, 65536)

Floats = NDArray[np.float64]
Work = dict[str, tuple[float, float]]  # sort -> bytes, multiply-adds


@dataclass(frozen=True)
class Step:
    """`n` tokens for each of `n_seq` sequences behind `depth` cached ones, logits of each last."""

    n: int
    depth: float
    n_seq: int = 1

    @property
    def tokens(self) -> int:
        return self.n * self.n_seq


@dataclass(frozen=True)
class Rate:
    """Tokens per second of decode behind `depth` tokens, or of a prompt of `prompt`.

    n_seq: sequences together, whose tokens are all counted. limit: the resource that takes most of
    the time, and its share. seconds: by resource, of one token.
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
        """Of the roofline."""
        return self.rate / self.roofline


class SpeedModel:
    """Seconds of steps on a machine, for whole families of placements at once."""

    def __init__(self, cut: Cut, machine: Machine, k_type: QuantType, v_type: QuantType) -> None:
        self.cut = cut
        self.machine = machine
        self.k_type, self.v_type = k_type, v_type
        self.n_embd = next(op.outputs[0].width for op in cut.tape.ops if op.kind == "embed")
        self.efficiency = {**EFFICIENCY, **machine.efficiency}
        self._pairs = _overlapping(cut.atoms)

    def works(self, step: Step) -> list[Work]:
        """Of every atom."""
        return [self._work(atom, step) for atom in self.cut.atoms]

    def seconds(self, step: Step, places: NDArray[np.intp]) -> Floats:
        """Of one step by placement. places: (placements, atoms), numbers of devices."""
        devices = self.machine.devices
        works = self.works(step)
        table = np.array([[self._atom_seconds(w, d)[0] for d in devices] for w in works])
        chosen = table[np.arange(len(works)), places]
        total = chosen.sum(axis=1)
        hop = np.array([[self._hop(a, b, step.tokens) for b in devices] for a in devices])
        total += hop[places[:, :-1], places[:, 1:]].sum(axis=1)
        for experts, shared in self._pairs:
            together = np.minimum(chosen[:, experts].sum(axis=1), chosen[:, shared].sum(axis=1))
            total -= np.where(places[:, experts[0]] != places[:, shared[0]], together, 0.0)
        on_cpu = (places == 0).any(axis=1)
        found: Floats = total + on_cpu * self._barriers(places)
        return found

    def rate(self, step: Step, place: NDArray[np.intp], prompt: int = 0) -> Rate:
        """Predicted speed of one placement. prompt: 0 for decode, else the tokens of a prompt that
        is computed in pieces of `step.n` (its depth and last piece are seen to here)."""
        steps = [(1.0, step)] if not prompt else list(_pieces(prompt, step.n, step.n_seq))
        tokens = prompt * step.n_seq if prompt else step.tokens
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
            int(step.depth),
            step.n_seq,
            tokens / total,
            tokens / roof,
            limit,
            share,
            seconds,
        )

    def gain(self, unit: int, step: Step, device: Device) -> float:
        """Seconds that a unit saves on a device against the CPU."""
        works = (self._work(a, step) for a in self.cut.atoms if a.unit == unit and a.pin is None)
        cpu = self.machine.cpu
        return sum(self._atom_seconds(w, cpu)[0] - self._atom_seconds(w, device)[0] for w in works)

    def _barriers(self, places: NDArray[np.intp]) -> Floats:
        atoms = [a.layer for a in self.cut.atoms]
        last = self.cut.n_layers
        share = np.array([1.0 / atoms.count(layer) if 0 <= layer < last else 0 for layer in atoms])
        each = TASKS_STEPS * self.machine.cpu.handshake.value
        found: Floats = each * ((places == 0) * share).sum(axis=1)
        return found

    def _hop(self, a: Device, b: Device, tokens: int) -> float:
        """Activations from a device to another: through the host's memory."""
        if a is b:
            return 0.0
        nbytes = 4.0 * tokens * self.n_embd
        over = sum(nbytes / d.transfer.value for d in (a, b) if not d.is_cpu)
        return max(d.handshake.value for d in (a, b) if not d.is_cpu) + over

    def _atom_seconds(self, work: Work, device: Device) -> tuple[float, float, float]:
        """Seconds, of which reading and of which arithmetic."""
        reading = arithmetic = 0.0
        for sort, (nbytes, macs) in work.items():
            e = self.efficiency[sort] if device.is_cpu else FULL
            reading += nbytes / (device.bandwidth.value * device.sustained * e.bytes)
            if sort == "rows" and not device.is_cpu:
                continue  # fused into its kernels
            rate = device.float_compute if sort in FLOAT_SORTS else device.compute
            arithmetic += macs / (rate.value * e.macs)
        if device.is_cpu:
            return reading + arithmetic, reading, arithmetic
        return (reading, reading, 0.0) if reading > arithmetic else (arithmetic, 0.0, arithmetic)

    def _parts(self, step: Step, place: NDArray[np.intp]) -> dict[str, float]:
        """Seconds of a step by resource, overlap not taken off."""
        devices = self.machine.devices
        parts: dict[str, float] = {}
        for work, d in zip(self.works(step), place, strict=True):
            _, reading, arithmetic = self._atom_seconds(work, devices[d])
            for what, t in (("memory bandwidth", reading), ("arithmetic", arithmetic)):
                name = f"{devices[d].name} {what}"
                parts[name] = parts.get(name, 0.0) + t
        hops = sum(
            self._hop(devices[a], devices[b], step.tokens) for a, b in itertools.pairwise(place)
        )
        parts["hand-overs"] = float(hops)
        parts["cpu barriers"] = float(self._barriers(place[None])[0])
        return {name: t for name, t in parts.items() if t > 0}

    def _roofline(self, step: Step, place: NDArray[np.intp]) -> float:
        devices = self.machine.devices
        times = []
        for work, d in zip(self.works(step), place, strict=True):
            device, nbytes, integer, floating = devices[d], 0.0, 0.0, 0.0
            for sort, (b, macs) in work.items():
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

    def _work(self, atom: Atom, step: Step) -> Work:
        """Bytes as `cost.Work` counts them, and the multiply-adds that it leaves out as well."""
        found: dict[str, list[float]] = {}
        for op in atom.ops:
            for sort, nbytes, macs in self._op_work(op, step):
                entry = found.setdefault(sort, [0.0, 0.0])
                entry[0] += nbytes
                entry[1] += macs
        return {sort: (nbytes, macs) for sort, (nbytes, macs) in found.items()}

    def _op_work(self, op: Op, step: Step) -> list[tuple[str, float, float]]:
        rows = step.n_seq if op.outputs[0].per_output else step.tokens
        nbytes = float(sum(w.nbytes for w in op.weights))
        if op.kind == "embed":
            return [("rows", rows * op.weights[0].row_bytes, rows * op.outputs[0].width)]
        if op.kind == "experts":
            used, total = op.inputs[1].width, op.weights[0].shape[2]
            macs = float(rows * used * sum(w.row_len * w.shape[1] for w in op.weights))
            return [("experts", Experts(int(nbytes), used, total).read(rows), macs)]
        if op.kind == "linear":
            w = op.weights[0]
            sort = "head" if op.inputs[0].per_output else "dense"
            sort = "router" if w.type.name in FLOAT_TYPES else sort
            return [(sort, nbytes, rows * w.row_len * w.n_rows)]
        if op.state is None:
            return [("rows", nbytes, rows * sum(v.width for v in op.outputs))]
        state = self.cut.tape.states[op.state]
        # a token sees those before it and itself
        seen = step.depth + (step.n + 1) / 2 - 1
        kv, recurrent = cache_bytes([state], 1, self.k_type, self.v_type)
        if op.kind == "attention":
            macs = rows * seen * 2 * op.outputs[0].width
            # keys and values are read once for all tokens of a sequence
            read = step.n_seq * kv * (step.depth + step.n - 1)
            return [("attention", read, macs)]
        # three products a state element (FACTS 1.4); a convolution has its taps
        per_output = 3 * op.attrs["head_dim"] if op.kind == "gated_delta" else op.attrs["kernel"]
        macs = float(rows * op.outputs[0].width * per_output)
        return [("delta", nbytes + step.n_seq * 2 * recurrent, macs)]


def _overlapping(atoms: Sequence[Atom]) -> list[tuple[list[int], list[int]]]:
    """Per layer the atoms of its routed and of its shared experts."""
    layers: dict[int, tuple[list[int], list[int]]] = {}
    for i, atom in enumerate(atoms):
        if atom.role in (EXPERTS, SHARED):
            layers.setdefault(atom.layer, ([], []))[atom.role == SHARED].append(i)
    return [pair for pair in layers.values() if pair[0] and pair[1]]


def _pieces(prompt: int, ubatch: int, n_seq: int) -> list[tuple[float, Step]]:
    """How often which step: whole pieces at their mean depth, and the rest."""
    whole, rest = divmod(prompt, ubatch)
    pieces = []
    if whole:
        pieces.append((float(whole), Step(ubatch, (whole - 1) * ubatch / 2, n_seq)))
    if rest:
        pieces.append((1.0, Step(rest, whole * ubatch, n_seq)))
    return pieces


def predict(
    model: SpeedModel, place: NDArray[np.intp], ctx: int, ubatch: int, n_seq: int
) -> list[Rate]:
    """Prompts, short and long, then decode at several depths, and of all sequences together."""
    rates = []
    prompts = sorted({min(SHORT_PROMPT, ctx), min(LONG_PROMPT, ctx)})
    for prompt in prompts:
        rates.append(model.rate(Step(min(ubatch, prompt), 0), place, prompt))
    for depth in (*(d for d in DEPTHS if d < ctx - 1), ctx - 1):
        rates.append(model.rate(Step(1, depth), place))
    if n_seq > 1:
        rates.append(model.rate(Step(1, min(4096, ctx - 1), n_seq), place))
    return rates


def sources(machine: Machine, used: Sequence[str]) -> list[str]:
    """One line a figure that the prediction rests on, assumed or measured."""
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


# --- calibration ------------------------------------------------------------------------------
