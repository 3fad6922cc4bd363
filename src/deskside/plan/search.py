"""Places every tensor: a pure function of a tape, a machine and the user's rules.

The rules come first (`rules.py`). A search places what they leave free:

1. Order the units (`units.py`) by the seconds that each of their bytes saves on a GPU.
2. For every k, put the first k units on GPUs.
3. For each k, try every way to deal the layers to the GPUs in runs, and the head to one GPU.

Of the placements that fit, it selects the fastest decode at half the context. Of equally fast ones
it selects the one that fills the GPUs most evenly. The placements tried do not depend on the
devices' memory. So more memory only adds choices, and is never predicted to be slower.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.lowering.memory import Memory, StepShape, buffers
from deskside.lowering.sections import HOST_TORCH, state_homes
from deskside.machine.devices import CPU, Machine, show_size
from deskside.plan.plan import DoesNotFit, Options, Plan, Usage
from deskside.plan.rules import ALL_LAYERS, Rules, apply
from deskside.plan.speed import SpeedModel, predict, replays
from deskside.plan.units import EMBED, HEAD, KINDS, Grouping, Unit, group_units
from deskside.tape import Tape
from deskside.tape.cache import cache_bytes, kv_type
from deskside.tape.cost import BatchShape

MAX_SPLITS = 512  # ways to deal out layers to GPUs that are tried
GPU = "gpu"  # pinned to some GPU, see rules.py
Indices = NDArray[np.intp]
Bytes = NDArray[np.int64]


def make_plan(
    tape: Tape, machine: Machine, rules: Rules, options: Options, memory: Memory | None = None
) -> Plan:
    """The fastest placement that the rules allow.

    memory: of the same tape, threads and ubatch, if already computed.
    DesksideError for rules that contradict, or a context longer than the model's. DoesNotFit if no
    placement fits.
    """
    if options.ctx > tape.n_ctx_train:
        raise DesksideError(
            f"-c {options.ctx} is more than the model's context of {tape.n_ctx_train} tokens"
        )
    memory = memory or Memory(tape, threads=options.most_threads, ubatch=options.ubatch)
    search = _Search(tape, machine, rules, options, memory)
    while True:
        plan = search.plan(*search.best())
        over = [max(0, -u.free) for u in plan.usage]
        if not any(over):
            return plan
        # Rules that separate an expert's matrices need more work memory than the search expects.
        search.extra += np.array(over)


class _Search:
    """Tries placements. extra: bytes by device beyond the weights, states and expected buffers."""

    def __init__(
        self, tape: Tape, machine: Machine, rules: Rules, options: Options, memory: Memory
    ) -> None:
        self.tape, self.machine, self.rules, self.options = tape, machine, rules, options
        self.memory = memory
        self.names = [d.name for d in machine.devices]
        self.gpus = self.names[1:]
        n_layers = 1 + max(op.layer for op in tape.ops)
        weights = tape.weights()
        sources = {name: w.source for name, w in weights.items() if w.source}
        self.pinned = apply(rules, list(weights), n_layers, self.gpus, sources)
        self.grouping: Grouping = group_units(tape, self.pinned.devices)
        k, v = kv_type(options.ctk, "-ctk"), kv_type(options.ctv, "-ctv")
        self.speed = SpeedModel(self.grouping, machine, k, v)
        self.states = [
            tuple(options.parallel * n for n in cache_bytes([s], options.ctx, k, v))
            for s in tape.states
        ]
        self.atom_states = [
            [op.state for op in a.ops if op.state is not None] for a in self.grouping.atoms
        ]
        # of each unit: bytes on the CPU, on a GPU
        self.unit_sizes = [
            [
                sum(memory.of(n, cpu=cpu, resident=options.resident) for n in unit.tensors)
                for cpu in (True, False)
            ]
            for unit in self.grouping.units
        ]
        self.shape = BatchShape(1, options.ctx // 2)
        self.order = self._order()
        self.room = False
        self.extra: Bytes = np.array([options.reserved.get(n, 0) for n in self.names], np.int64)

    def _order(self) -> list[int]:
        """Free units, by seconds saved per byte. Among equals later layers first, as for -ngl."""
        if not self.gpus:
            return []
        gpu = min(self.machine.gpus, key=lambda d: (-d.bandwidth.value, d.name))

        def key(i: int) -> tuple[float, int, int]:
            unit = self.grouping.units[i]
            size = sum(self.memory.gpu[n] for n in unit.tensors) + sum(
                sum(self.states[s])
                for a, states in zip(self.grouping.atoms, self.atom_states, strict=True)
                if a.unit == i and a.pin is None
                for s in states
            )
            gain = self.speed.gain(i, self.shape, gpu) / max(size, 1)
            # equal layers differ in the last digits only
            return (-float(f"{gain:.6e}"), -unit.layer, i)

        # a token reads one row of the embedding, so it is never worth a GPU's memory
        free = [i for i, u in enumerate(self.grouping.units) if u.tensors and u.role != EMBED]
        return sorted(free, key=key)

    def _splits(self) -> list[tuple[int, ...]]:
        """Every way to deal layers and head to GPUs: the device's index of each layer and head."""
        n, g = self.grouping.n_layers, len(self.gpus)
        if self.pinned.layer_gpu:
            found = [tuple(self.names.index(name) for name in self.pinned.layer_gpu)]
        elif g == 0:
            found = [(0,) * (n + 1)]
        else:
            step = 1
            while g * _combinations(n // step + 1, g - 1) > MAX_SPLITS:
                step += 1
            borders = itertools.combinations_with_replacement(range(0, n + 1, step), g - 1)
            found = [
                (*(1 + sum(layer >= b for b in chosen) for layer in range(n)), head)
                for chosen in borders
                for head in range(g, 0, -1)
            ]
        if self.pinned.head_gpu:
            head = self.names.index(self.pinned.head_gpu)
            found = [(*split[:-1], head) for split in found]
        return found

    def _family(self, split: tuple[int, ...]) -> Indices:
        """(k, units): the device's index of each unit, if the first k in order are on their GPU."""
        n = len(self.order)
        place = np.zeros((n + 1, len(self.grouping.units)), np.intp)
        for at, i in enumerate(self.order):
            place[at + 1 :, i] = self._gpu(split, self.grouping.units[i])
        return place

    @staticmethod
    def _gpu(split: tuple[int, ...], unit: Unit) -> int:
        return split[-1] if unit.role == HEAD else split[max(unit.layer, 0)]

    def _atoms(self, split: tuple[int, ...], units: Indices) -> Indices:
        """(k, atoms): the device of each atom, from those of the units."""
        places = np.empty((len(units), len(self.grouping.atoms)), np.intp)
        for i, atom in enumerate(self.grouping.atoms):
            if atom.pin is None:
                # atoms of a unit whose tensors are all pinned follow those tensors
                places[:, i] = units[:, atom.unit]
            elif atom.pin == GPU:
                places[:, i] = self._gpu(split, self.grouping.units[atom.unit])
            else:
                places[:, i] = self.names.index(atom.pin)
        return places

    def _bytes(self, split: tuple[int, ...], units: Indices, atoms: Indices) -> Bytes:
        """(k, devices): bytes of each placement, with margins and buffers."""
        total = np.zeros((len(units), len(self.names)), np.int64)
        rows = np.arange(len(units))
        resident = self.options.resident
        for i, (unit, sizes) in enumerate(zip(self.grouping.units, self.unit_sizes, strict=True)):
            where = units[:, i]
            total[rows, where] += np.where(where == 0, sizes[0], sizes[1])
            for name in unit.pinned:
                d = self._pinned_device(split, unit, name)
                total[:, d] += self.memory.of(name, cpu=d == 0, resident=resident)
        for i, states in enumerate(self.atom_states):
            total[rows, atoms[:, i]] += sum(sum(self.states[s]) for s in states)
        total[:, 0] += self.memory.cpu_buffers
        for d in range(1, len(self.names)):
            used = (total[:, d] > 0) | (atoms == d).any(axis=1)
            total[:, d] += used * self.memory.gpu_buffers
        need: Bytes = total + self.extra + np.array([d.margin for d in self.machine.devices])
        return need

    def _pinned_device(self, split: tuple[int, ...], unit: Unit, name: str) -> int:
        device = self.pinned.devices[name]
        return self._gpu(split, unit) if device == GPU else self.names.index(device)

    def best(self) -> tuple[tuple[int, ...], Indices]:
        """The split and the units of the fastest placement that fits. DoesNotFit if none does."""
        memories = np.array([d.memory for d in self.machine.devices])
        best: tuple[float, float, tuple[int, ...], Indices] | None = None
        min_over: tuple[int, Bytes] | None = None
        for split in self._splits():
            units = self._family(split)
            atoms = self._atoms(split, units)
            need = self._bytes(split, units, atoms)
            over = np.maximum(need - memories, 0)
            fits = ~over.any(axis=1)
            if not fits.any():
                k = int(over.sum(axis=1).argmin())
                if min_over is None or over[k].sum() < min_over[0]:
                    min_over = int(over[k].sum()), over[k]
                continue
            room = np.append(fits[1:], False)[fits]  # room for the next unit in the order, too
            units, need = units[fits], need[fits]
            seconds = self.speed.seconds(self.shape, atoms[fits])
            k = int(seconds.argmin())
            fill = (need[k, 1:] / memories[1:]).max(initial=0.0)
            if (
                best is None
                or (seconds[k], fill) < (best[0] * (1 - 1e-9), best[1])
                or (abs(seconds[k] - best[0]) <= 1e-9 * best[0] and fill < best[1])
            ):
                best = min(seconds[k], best[0] if best else np.inf), fill, split, units[k]
                self.room = bool(room[k])
        if best is None:
            assert min_over is not None
            raise self._does_not_fit(min_over[1])
        return best[2], best[3]

    def _does_not_fit(self, over: Bytes) -> DoesNotFit:
        short = {n: int(o) for n, o in zip(self.names, over, strict=True) if o}
        said = []
        for name, missing in short.items():
            by_rule: dict[str, int] = {}
            for tensor, device in self.pinned.devices.items():
                if device == name or (device == GPU and name in self.gpus):
                    size = self.memory.of(tensor, cpu=name == "cpu", resident=False)
                    reason = self.pinned.reasons[tensor]
                    by_rule[reason] = by_rule.get(reason, 0) + size
            memory = self.machine.device(name).memory
            text = f"{name} lacks {missing:,} bytes ({show_size(missing)} of {show_size(memory)})"
            if by_rule:
                rule = max(by_rule, key=lambda r: by_rule[r])
                text += f", where {rule} puts {show_size(by_rule[rule])}"
            said.append(text)
        return DoesNotFit(f"the model does not fit: {'; '.join(said)}", short)

    def plan(self, split: tuple[int, ...], units: Indices) -> Plan:
        atoms = self._atoms(split, units[None])[0]
        placement: dict[str, str] = {}
        reasons: dict[str, str] = {}
        for i, unit in enumerate(self.grouping.units):
            for name in unit.tensors:
                placement[name] = self.names[units[i]]
                reasons[name] = self._reason(i, int(units[i]))
            for name in unit.pinned:
                placement[name] = self.names[self._pinned_device(split, unit, name)]
                reasons[name] = self.pinned.reasons[name]
        in_order = self.tape.weights()
        o = self.options
        shapes = o.shapes or (StepShape(o.ubatch),)
        taken, sections = buffers(self.tape, placement, shapes, threads=o.most_threads)
        homes = state_homes(sections)
        states = [CPU if homes[s] == HOST_TORCH else homes[s] for s in range(len(self.states))]
        rates = predict(self.speed, atoms, o.ctx, o.ubatch, o.parallel)
        return Plan(
            self.tape,
            o,
            self.machine,
            self.rules,
            {name: placement[name] for name in in_order},
            {name: reasons[name] for name in in_order},
            tuple(states),
            self.grouping.kinds,
            self._usage(placement, states, taken),
            tuple(rates),
            tuple(replays(self.speed, atoms, self.machine.published, o.ctx, o.ubatch)),
        )

    def _reason(self, i: int, device: int) -> str:
        if not self.gpus:
            return "there is no other device"
        if device:
            return "saves most time per byte"
        if self.grouping.units[i].role == EMBED:
            return "a token reads one row"
        if self.speed.gain(i, self.shape, self.machine.gpus[0]) <= 0:
            return "no faster on a GPU"
        if self.room:
            return "handing over would cost more than it saves"
        return "does not fit, saves least time per byte"

    def _usage(
        self, placement: Mapping[str, str], states: Sequence[str], taken: Mapping[str, int]
    ) -> tuple[Usage, ...]:
        found = []
        resident = self.options.resident
        for d, device in enumerate(self.machine.devices):
            weights = dict.fromkeys(KINDS, 0)
            mapped = 0
            for name, where in placement.items():
                if where == device.name:
                    size = self.memory.of(name, cpu=d == 0, resident=resident)
                    weights[self.grouping.kinds[name]] += size
                    mapped += self.memory.mapped.get(name, 0) if d == 0 and not resident else 0
            kv, recurrent = (
                sum(s[i] for s, w in zip(self.states, states, strict=True) if w == device.name)
                for i in (0, 1)
            )
            weights = {kind: n for kind, n in weights.items() if n}
            work = taken.get(device.name, 0)
            more = self.options.reserved.get(device.name, 0)
            found.append(Usage(device, weights, mapped, kv, recurrent, work, more))
        return tuple(found)


def _combinations(n: int, k: int) -> int:
    """Ways to choose k of n with repetition: (n + k - 1)! / (k! (n - 1)!)."""
    total = 1
    for i in range(k):
        total = total * (n + i) // (i + 1)
    return total


__all__ = ["ALL_LAYERS", "DoesNotFit", "Options", "Plan", "Usage", "make_plan"]
