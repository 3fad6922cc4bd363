"""Turns a tape into steps of a native program: fuses ops, and groups them between barriers.

There are four kinds of steps:

    rows     ops that treat every row on its own; all ops run on one row, one after another
    outputs  the same for the rows of wanted logits
    once     ops that one thread runs
    tasks    independent ops, whose work the threads share

At decode only tasks steps cost a barrier. So every op is scheduled as early as its inputs allow,
and ops that can run together share a step.

Fused are linears that read the same value, and a swiglu or a causal convolution into the linears
that feed it. Quantised weights read their input in 8 bits: `quantize` makes that record once for
all its readers.

A program may run a part of a tape, in stretches. Other devices work between two stretches. A *hop*
marks either end of a stretch. It is not a native step: it tells `plan_buffers` which values come in
and which go out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from deskside import _native
from deskside.gguf import TensorInfo
from deskside.gguf.quants import FLOAT_TYPES
from deskside.tape import Op, Tape, Value

# Ops that treat every row on its own. What is in neither this nor `tasks` has no native op.
ROWS = frozenset({
    "embed", "rms_norm", "bias", "split_gate", "rope", "gated_norm", "sigmoid_gate", "swiglu",
    "add", "route", "take_rows",
})  # fmt: skip


@dataclass(frozen=True)
class Part:
    """A matrix of a `linear`: alone, with a swiglu's `up`, or with the convolution that follows."""

    op: Op
    out: Value
    up: Op | None = None
    conv: Op | None = None


@dataclass(frozen=True)
class NativeOp:
    """One op of the native program. kind: names its method. where: the kind of step it needs."""

    kind: str
    where: str
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    op: Op
    parts: tuple[Part, ...] = ()


@dataclass
class Step:
    where: str
    ops: list[NativeOp] = field(default_factory=list)


@dataclass(frozen=True)
class Stretch:
    """Ops that run together, with the values that other devices give (imports), need (exports)."""

    ops: tuple[Op, ...]
    imports: tuple[Value, ...] = ()
    exports: tuple[Value, ...] = ()


def plan_steps(tape: Tape, stretches: Sequence[Stretch] | None = None) -> list[Step]:
    """The steps that carry out `tape`, or those of its `stretches`, each between two hops."""
    if stretches is None:
        return schedule(list(_Rewriter(tape, tape.ops).ops(tape.ops)))
    # What stands for an op of the tape elsewhere reads values too, and has some of its own.
    rewriter = _Rewriter(tape, [*tape.ops, *(op for s in stretches for op in s.ops)])
    steps = []
    for s in stretches:
        steps += [hop((), s.imports), *schedule(list(rewriter.ops(s.ops))), hop(s.exports, ())]
    return steps


def hop(inputs: tuple[Value, ...], outputs: tuple[Value, ...]) -> Step:
    """Values (`inputs`) that leave the program's memory, or (`outputs`) that come into it."""
    return Step(
        "hop", [NativeOp("hop", "hop", inputs, outputs, Op(-1, "hop", -1, inputs, outputs))]
    )


class _Rewriter:
    """Tape ops to native ops, in the tape's order."""

    def __init__(self, tape: Tape, ops: Sequence[Op]) -> None:
        self.tape = tape
        self.next_id = 1 + max(v.id for op in ops for v in (*op.inputs, *op.outputs))
        self.readers: dict[int, list[Op]] = defaultdict(list)
        for op in tape.ops:
            for value in op.inputs:
                self.readers[value.id].append(op)
        self.records: dict[int, Value] = {}
        # The program's memory that all ops share: attention's parts, and the experts' routing.
        self.shared = self.value(0)
        self.fused: set[int] = set()  # by index, ops that became part of another
        self.here: set[int] = set()  # by index, the ops of this stretch
        self.tasks: dict[str, Callable[[Op], Iterator[NativeOp]]] = {
            "linear": self.linear,
            "conv_silu": self.conv_silu,
            "attention": self.attention,
            "gated_delta": self.gated_delta,
            "experts": self.experts,
        }

    def value(self, width: int, per_output: bool = False) -> Value:
        self.next_id += 1
        return Value(self.next_id - 1, width, per_output)

    def ops(self, ops: Sequence[Op]) -> Iterator[NativeOp]:
        """Native ops of a stretch; nothing is fused over its ends."""
        self.here = {op.index for op in ops}
        for op in ops:
            if op.index not in self.fused:
                yield from (self.rows if op.kind in ROWS else self.tasks[op.kind])(op)

    def rows(self, op: Op) -> Iterator[NativeOp]:
        yield NativeOp(op.kind, rows_of(op.outputs[0]), op.inputs, op.outputs, op)

    def inputs(
        self, x: Value, weights: Iterable[TensorInfo], op: Op
    ) -> Generator[NativeOp, None, tuple[Value, ...]]:
        """What matrices read of x: itself, and its 8-bit twin (made once) if one is quantised."""
        if all(w.type.name in FLOAT_TYPES for w in weights):
            return (x,)
        if x.id not in self.records:
            record = self.value(_native.record_bytes(x.width) // 4, x.per_output)
            self.records[x.id] = record
            yield NativeOp("quantize", rows_of(x), (x,), (record,), op)
        return (x, self.records[x.id])

    def linear(self, op: Op) -> Iterator[NativeOp]:
        x = op.inputs[0]
        together = [o for o in self.readers[x.id] if o.kind == "linear" and o.index in self.here]
        self.fused.update(o.index for o in together)
        parts: list[Part] = []
        for linear in together:
            if any(p.up is linear for p in parts):
                continue
            parts.append(self.part(linear, together))
        reads = yield from self.inputs(x, (o.weights[0] for o in together), op)
        yield NativeOp("linear", "tasks", reads, tuple(p.out for p in parts), op, tuple(parts))

    def part(self, linear: Op, together: Sequence[Op]) -> Part:
        readers = self.readers[linear.outputs[0].id]
        reader = readers[0] if len(readers) == 1 else None
        if reader and reader.index in self.here and linear.outputs[0].id != self.tape.logits.id:
            if reader.kind == "conv_silu":
                self.fused.add(reader.index)
                return Part(linear, reader.outputs[0], conv=reader)
            if reader.kind == "swiglu" and reader.inputs[0].id == linear.outputs[0].id:
                ups = [o for o in together if o.outputs[0].id == reader.inputs[1].id]
                if ups and len(self.readers[reader.inputs[1].id]) == 1 and ups[0] is not linear:
                    self.fused.add(reader.index)
                    return Part(linear, reader.outputs[0], up=ups[0])
        return Part(linear, linear.outputs[0])

    def conv_silu(self, op: Op) -> Iterator[NativeOp]:
        raise NotImplementedError("a convolution that no linear feeds")

    def attention(self, op: Op) -> Iterator[NativeOp]:
        q, k, v = op.inputs
        stored = self.value(0)
        yield NativeOp("store_kv", "rows", (k, v), (stored,), op)
        yield NativeOp("attention", "tasks", (q, stored), (*op.outputs, self.shared), op)
        yield NativeOp("merge_attention", "tasks", (*op.outputs, self.shared), op.outputs, op)

    def gated_delta(self, op: Op) -> Iterator[NativeOp]:
        yield NativeOp("delta_gates", "rows", op.inputs, op.inputs, op)
        yield NativeOp("gated_delta", "tasks", op.inputs, op.outputs, op)

    def experts(self, op: Op) -> Iterator[NativeOp]:
        x, ids, weights = op.inputs
        gate, up, down = op.weights
        top_k, width = ids.width, gate.shape[1]
        yield NativeOp("sort_experts", "once", (ids,), (self.shared,), op)
        reads = yield from self.inputs(x, (gate, up), op)
        per_pair = _native.record_bytes(width) // 4
        is_float = down.type.name in FLOAT_TYPES
        hidden = self.value(top_k * (width if is_float else per_pair))
        yield NativeOp("experts_up", "tasks", (*reads, self.shared), (hidden,), op)
        yield NativeOp("experts_down", "tasks", (hidden, self.shared, weights), op.outputs, op)


def rows_of(value: Value) -> str:
    """The sort of step in which a value's rows are made."""
    return "outputs" if value.per_output else "rows"


def schedule(ops: Sequence[NativeOp]) -> list[Step]:
    """Steps in which every op runs as early as what it reads and overwrites allows."""
    waits = dependencies(ops)
    steps: list[Step] = []
    done: set[int] = set()
    left = list(range(len(ops)))
    while left:
        before = len(left)
        for where in ("rows", "outputs", "once", "tasks"):
            step = Step(where)
            ready = set(done)
            for i in list(left):
                if where == "tasks" and len(step.ops) == _native.MAX_TASKS_OPS:
                    break
                if ops[i].where == where and waits[i] <= ready:
                    step.ops.append(ops[i])
                    left.remove(i)
                    done.add(i)
                    # Only rows ops may use what their own step makes: of the same row.
                    if where in ("rows", "outputs"):
                        ready.add(i)
            if step.ops:
                steps.append(step)
                if where == "tasks":
                    break
        if len(left) == before:
            raise ValueError("the tape's ops wait for each other")
    return steps


def dependencies(ops: Sequence[NativeOp]) -> list[set[int]]:
    """For each op the earlier ones that must be over: writers of what it uses, readers of what it
    overwrites."""
    writers: dict[int, list[int]] = defaultdict(list)
    readers: dict[int, list[int]] = defaultdict(list)
    waits: list[set[int]] = []
    for i, op in enumerate(ops):
        wait: set[int] = set()
        for value in (*op.inputs, *op.outputs):
            wait.update(writers[value.id])
        for value in op.outputs:
            wait.update(readers[value.id])
        waits.append(wait - {i})
        for value in op.inputs:
            readers[value.id].append(i)
        for value in op.outputs:
            writers[value.id].append(i)
    return waits
