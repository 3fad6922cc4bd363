"""A tape cut into sections of one device each, and the values that pass between them.

An op runs on the device of its first weight. An op without weights runs where its first input was
made; so does a rope, whose few factors all layers share. Its state lives on the same device.

An `add` of values from two devices runs on the device that needs the sum. If it always ran with its
first input, every layer would go back to the embedding's device, and the device of the routed
experts would wait for that of the shared expert.

A section holds all ops that a device can run before it must wait for another one. Ops that other
devices wait for form a section of their own, before the rest. With the routed experts on the CPU,
for example, a GPU runs attention and the router, hands over, and then computes the shared expert
while the CPU works.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from deskside.errors import DesksideError
from deskside.gguf import TensorInfo
from deskside.tape import Op, Tape, Value

HOST = "cpu"  # the native program
# Ops on the host that no native kernel has: a convolution apart from its linear, and experts whose
# matrices lie on several devices. Torch runs them, on the file's mapped bytes.
HOST_TORCH = "cpu (torch)"
# Ops whose weights the placement has on the host; the device that computes them brings them in.
OFFLOADED = frozenset({"expert_offload", "expert_offload_pairs"})
# What that device computes: these, the division of the ids before and the sum after them.
_THERE = OFFLOADED | {"expert_divide", "expert_merge"}


@dataclass(frozen=True)
class Offload:
    """A device that computes experts whose weights the placement has on the host.

    all: whether it computes every chosen expert. If not, it selects some in each step, and the host
    computes the rest.
    """

    device: str
    all: bool


@dataclass(frozen=True)
class Section:
    """Ops of one device.

    imports: values from other devices that no earlier section here imported. exports: values that
    other devices need. waits: indices of the sections that make the imports.
    """

    device: str
    ops: tuple[Op, ...]
    imports: tuple[Value, ...] = ()
    exports: tuple[Value, ...] = ()
    waits: tuple[int, ...] = ()


def cut_by_device(
    tape: Tape,
    placement: Mapping[str, str],
    *,
    native: bool = True,
    offload: Offload | None = None,
) -> tuple[Section, ...]:
    """The sections of `tape`, in an order in which they can run.

    placement: the device of every tensor that the tape reads; DesksideError if one is missing.
    native: whether the host has the native program; else torch runs there too. offload: see there.
    """
    for name in tape.weights():
        if name not in placement:
            raise DesksideError(f"the placement has no device for tensor {name}")
    new = _New.of(tape)
    ops = list(_split_experts(tape, placement, new))
    if offload is not None:
        offloaded = {op.index for op in offloadable(tape, placement)}
        parts = [
            _offloaded(op, offload, native, new) if op.index in offloaded else [op] for op in ops
        ]
        ops = [op for part in parts for op in part]
    devices = _devices(ops, placement, offload)
    if not native:
        devices = {i: HOST_TORCH if d == HOST else d for i, d in devices.items()}
    return _link(_order(_sections(ops, devices), devices), tape.logits)


@dataclass(frozen=True)
class _New:
    """Makes the ops and values of a cut that its tape lacks."""

    indices: Iterator[int]
    ids: Iterator[int]

    @classmethod
    def of(cls, tape: Tape) -> _New:
        last = max(v.id for op in tape.ops for v in op.outputs)
        return cls(itertools.count(len(tape.ops)), itertools.count(1 + last))

    def op(
        self,
        kind: str,
        layer: int,
        inputs: tuple[Value, ...],
        outputs: tuple[Value, ...],
        weights: tuple[TensorInfo, ...] = (),
    ) -> Op:
        return Op(next(self.indices), kind, layer, inputs, outputs, weights)

    def value(self, width: int) -> Value:
        return Value(next(self.ids), width)


def _split_experts(tape: Tape, placement: Mapping[str, str], new: _New) -> Iterable[Op]:
    """The tape's ops; experts whose matrices lie on several devices become one op a matrix.

    expert_linear   x, ids; W     per chosen expert e of a token W_e x, side by side
    expert_sum      h, ids, p; W  sum over a token's experts of p_e W_e h_e
    """
    for op in tape.ops:
        if op.kind != "experts" or len({placement[w.name] for w in op.weights}) == 1:
            yield op
            continue
        x, ids, p = op.inputs
        gate, up, down = op.weights
        g, u, h = (new.value(ids.width * gate.shape[1]) for _ in range(3))
        yield new.op("expert_linear", op.layer, (x, ids), (g,), (gate,))
        yield new.op("expert_linear", op.layer, (x, ids), (u,), (up,))
        yield new.op("swiglu", op.layer, (g, u), (h,))
        yield new.op("expert_sum", op.layer, (h, ids, p), op.outputs, (down,))


def offloadable(tape: Tape, placement: Mapping[str, str]) -> list[Op]:
    """The experts that can be offloaded: whole layers that the placement has on the host."""
    return [
        op
        for op in tape.ops
        if op.kind == "experts" and all(placement[w.name] == HOST for w in op.weights)
    ]


def _offloaded(op: Op, offload: Offload, native: bool, new: _New) -> list[Op]:
    """What a layer's experts become where a device computes some of them.

    expert_divide         ids             there, here: the ids of either part, -1 for the others
    expert_offload        x, there, p; W  the sum over a token's experts there; brings in W
    expert_offload_pairs  x, there; W     the terms of that sum side by side, without p
    expert_pairs          x, here; W      the same of the host's part
    expert_merge          y, z, ids, p    the sum over both parts' terms, in `experts`' own order

    The native program adds up its part by itself: then the parts' sums are added.
    """
    x, ids, p = op.inputs
    (out,) = op.outputs
    if offload.all:
        return [new.op("expert_offload", op.layer, (x, ids, p), (out,), op.weights)]
    there, here = (new.value(ids.width) for _ in range(2))
    width = out.width if native else out.width * ids.width
    y, z = (new.value(width) for _ in range(2))
    divide = new.op("expert_divide", op.layer, (ids,), (there, here))
    if native:
        return [
            divide,
            new.op("expert_offload", op.layer, (x, there, p), (y,), op.weights),
            new.op("experts", op.layer, (x, here, p), (z,), op.weights),
            new.op("add", op.layer, (y, z), (out,)),
        ]
    return [
        divide,
        new.op("expert_offload_pairs", op.layer, (x, there), (y,), op.weights),
        new.op("expert_pairs", op.layer, (x, here), (z,), op.weights),
        new.op("expert_merge", op.layer, (y, z, ids, p), (out,)),
    ]


def _devices(
    ops: Sequence[Op], placement: Mapping[str, str], offload: Offload | None
) -> dict[int, str]:
    """The device of each op, by its index."""

    def home(op: Op) -> str | None:
        if offload is not None and op.kind in _THERE:
            return offload.device
        return placement[op.weights[0].name] if op.weights and op.kind != "rope" else None

    needed: dict[int, str] = {}  # by value: where it is read first
    for op in reversed(ops):
        reader = home(op) or needed.get(op.outputs[0].id, "")
        needed.update({v.id: reader for v in op.inputs})
    made: dict[int, str] = {}
    devices: dict[int, str] = {}
    for op in ops:
        device = home(op) or made[op.inputs[0].id]
        if op.kind == "add" and needed.get(op.outputs[0].id) in {made[v.id] for v in op.inputs}:
            device = needed[op.outputs[0].id]
        apart = op.kind == "conv_silu" and made[op.inputs[0].id] != HOST
        if device == HOST and (apart or op.kind.startswith("expert_")):
            device = HOST_TORCH
        if device == HOST_TORCH and not op.weights:
            device = HOST
        devices[op.index] = device
        made.update({v.id: device for v in op.outputs})
    return devices


def _sections(ops: Sequence[Op], devices: Mapping[int, str]) -> list[Section]:
    left, made = list(ops), set[int]()
    sections: list[Section] = []
    while left:
        device = devices[left[0].index]
        run: list[Op] = []
        ready = set(made)
        for op in left:
            if devices[op.index] == device and all(v.id in ready for v in op.inputs):
                run.append(op)
                ready.update(v.id for v in op.outputs)
        away = {v.id for op in left if devices[op.index] != device for v in op.inputs}
        first = _leading_to(run, away)
        leading = {op.index for op in first}
        rest = [op for op in run if op.index not in leading]
        sections += [Section(device, tuple(part)) for part in (first, rest) if part]
        made = ready
        done = {op.index for op in run}
        left = [op for op in left if op.index not in done]
    return sections


def _leading_to(run: Sequence[Op], wanted: set[int]) -> list[Op]:
    """The ops of `run` that make the values `wanted`, and what those need."""
    wanted = set(wanted)
    found: list[Op] = []
    for op in reversed(run):
        if any(v.id in wanted for v in op.outputs):
            found.insert(0, op)
            wanted.update(v.id for v in op.inputs)
    return found


def _order(sections: Sequence[Section], devices: Mapping[int, str]) -> list[Section]:
    """Native sections as early as their inputs allow: they run beside those that follow."""
    left, made = list(sections), set[int]()
    ordered: list[Section] = []

    def ready(section: Section) -> bool:
        own = {v.id for op in section.ops for v in op.outputs}
        return all(v.id in made or v.id in own for op in section.ops for v in op.inputs)

    while left:
        # A device's sections keep their order: only its first one left may be next.
        heads = [s for i, s in enumerate(left) if all(o.device != s.device for o in left[:i])]
        section = next(
            (s for s in heads if s.device == HOST and ready(s)), next(filter(ready, heads))
        )
        ordered.append(section)
        left = [s for s in left if s is not section]
        made.update(v.id for op in section.ops for v in op.outputs)
    return ordered


def _link(sections: Sequence[Section], logits: Value) -> tuple[Section, ...]:
    """With imports, exports and waits."""
    maker = {v.id: i for i, s in enumerate(sections) for op in s.ops for v in op.outputs}
    arrived: dict[str, set[int]] = {s.device: set() for s in sections}
    exports: list[dict[int, Value]] = [{} for _ in sections]
    linked: list[Section] = []
    for i, s in enumerate(sections):
        imports: dict[int, Value] = {}
        for value in (v for op in s.ops for v in op.inputs):
            source = sections[maker[value.id]]
            if source.device != s.device and value.id not in arrived[s.device]:
                imports[value.id] = value
                exports[maker[value.id]][value.id] = value
        arrived[s.device].update(imports)
        for value in (v for op in s.ops for v in op.outputs):
            if value.id == logits.id and s.device != HOST:
                exports[i][value.id] = value
        waits = tuple(sorted({maker[v] for v in imports}))
        linked.append(replace(s, imports=tuple(imports.values()), waits=waits))
    return tuple(
        replace(s, exports=tuple(e.values())) for s, e in zip(linked, exports, strict=True)
    )


def state_homes(sections: Sequence[Section]) -> dict[int, str]:
    """The device of every state, by its index in the tape."""
    return {op.state: s.device for s in sections for op in s.ops if op.state is not None}


def last_uses(sections: Sequence[Section]) -> dict[tuple[str, int], Op]:
    """By device and value, the op after which the device can forget the value."""
    return {
        (s.device, v.id): op for s in sections for op in s.ops for v in (*op.outputs, *op.inputs)
    }


def hops(sections: Sequence[Section], nbytes: Callable[[Value], int]) -> tuple[int, int]:
    """How many transfers from device to device a step makes, and their bytes."""
    maker = {v.id: s.device for s in sections for op in s.ops for v in op.outputs}
    count = total = 0
    for s in sections:
        moved = [v for v in s.imports if {maker[v.id], s.device} != {HOST, HOST_TORCH}]
        count += len({maker[v.id] for v in moved})
        total += sum(nbytes(v) for v in moved)
    return count, total
