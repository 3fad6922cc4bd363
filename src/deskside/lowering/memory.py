"""Bytes that a model takes on a device, as the engine takes them.

CPU (panels.py, buffers.py, native/program/program.cpp): matrices in panels of 16 rows, each group
on pages of its own; vectors in float32; the embedding stays in the mapped file and counts only
where it may not (`--no-mmap`, `--mlock`); an arena of activations and work memory for each
thread. GPU: the file's bytes, in blocks of 512 as torch hands them out, and what its sections need
while they run (lowering/scratch.py), which depends on the placement: `Memory` has bounds for any
placement, `buffers` the figures of one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deskside import _native
from deskside.lowering.buffers import plan_buffers
from deskside.lowering.panels import layout, matrices
from deskside.lowering.scratch import MAX_OUTPUTS, work_bytes
from deskside.lowering.sections import HOST, HOST_TORCH, Offload, Section, cut_by_device
from deskside.lowering.steps import NativeOp, Step, Stretch, plan_steps
from deskside.tape import Tape

# native/kernels.h, ops.h, ops_sequence.cpp; a test compares the sum with a real program's.
_PANEL = 16
_FEW, _TASK_PANELS, _PAIR_PANELS, _PAIR_TOKENS = 16, 2, 8, 256
_SUMS, _MAX_PANELS = 32 << 10, 32
_QUERY_ROWS, _SPLIT_TOKENS, _MAX_SPLITS, _KEY_BLOCK, _MAX_KEYS = 32, 8, 64, 64, 8
_FLOAT_ROWS = 4
GPU_BLOCK = 512


class Memory:
    """Bytes of a tape's tensors and buffers. `mapped`: names that stay in the mapped file."""

    def __init__(self, tape: Tape, *, threads: int, ubatch: int) -> None:
        self.infos = tape.weights()
        steps = plan_steps(tape)
        _, arena = plan_buffers(steps, ubatch, tape.logits)
        self.cpu_buffers = 4 * arena + work_memory(steps, threads, ubatch)
        # A part of the tape needs no more than the whole, and a few values on their way.
        whole = cut_by_device(tape, dict.fromkeys(self.infos, "gpu"))
        widest = max(v.width for op in tape.ops for v in op.outputs if not v.per_output)
        self.gpu_buffers = work_bytes(whole, "gpu", ubatch, min(ubatch, MAX_OUTPUTS))
        self.gpu_buffers += 4 * 4 * ubatch * widest
        self.cpu = {name: 4 * info.row_len * info.n_rows for name, info in self.infos.items()}
        ranges, total = layout(matrices(steps))
        for p in ranges:
            panels = -(-p.rows // _PANEL) * p.groups
            self.cpu[p.info.name] = _native.panel_bytes(p.info.type.id, p.info.row_len) * panels
        packed = {p.info.name for p in ranges}
        # what rounding to pages adds goes to the first matrix
        if ranges:
            self.cpu[ranges[0].info.name] += total - sum(self.cpu[n] for n in packed)
        self.gpu = {
            name: -(-info.nbytes // GPU_BLOCK) * GPU_BLOCK for name, info in self.infos.items()
        }
        self.mapped = {
            op.weights[0].name: op.weights[0].nbytes for op in tape.ops if op.kind == "embed"
        }
        for name in self.mapped:
            if name not in packed:
                self.cpu[name] = 0

    def of(self, name: str, *, cpu: bool, resident: bool) -> int:
        """Bytes of a tensor. resident: what could stay in the mapped file is read as well."""
        if not cpu:
            return self.gpu[name]
        return self.cpu[name] + (self.mapped.get(name, 0) if resident else 0)


@dataclass(frozen=True)
class StepShape:
    """Steps of at most `rows` tokens, with a device that computes experts of the host, if any."""

    rows: int
    offload: Offload | None = None


def buffers(
    tape: Tape, placement: Mapping[str, str], shapes: Sequence[StepShape], *, threads: int
) -> tuple[dict[str, int], tuple[Section, ...]]:
    """Bytes of activations and work memory on every device of a placement, for all `shapes`; the
    sections of the first."""
    cuts = [cut_by_device(tape, placement, offload=shape.offload) for shape in shapes]
    names = {s.device for sections in cuts for s in sections} - {HOST, HOST_TORCH}
    found = dict.fromkeys((HOST, HOST_TORCH, *names), 0)
    for shape, sections in zip(shapes, cuts, strict=True):
        outputs = min(shape.rows, MAX_OUTPUTS)
        for name in (HOST_TORCH, *names):
            found[name] = max(found[name], work_bytes(sections, name, shape.rows, outputs))
        native = [Stretch(s.ops, s.imports, s.exports) for s in sections if s.device == HOST]
        if native:  # a program of its own
            steps = plan_steps(tape, native if names else None)
            _, arena = plan_buffers(steps, shape.rows, tape.logits)
            found[HOST] += 4 * arena + work_memory(steps, threads, shape.rows)
    found[HOST] += found.pop(HOST_TORCH)
    return found, cuts[0]


def _align64(n: int) -> int:
    return (n + 63) & ~63


def work_memory(steps: list[Step], threads: int, max_tokens: int) -> int:
    """What `Program::finish` takes besides the arena: shared, and each thread's."""
    shared, work, cols = 0, 0, 32
    for step in steps:
        for op in step.ops:
            s, w, c = _needs(op, max_tokens)
            shared, work, cols = max(shared, s), max(work, w), max(cols, c)
    tile = _align64(_PANEL * cols) + _align64(cols // 16 * _PANEL * 4)
    tile += _align64(cols // 32 * _PANEL * 4)
    each = _align64(4 * work) + 2 * tile + _align64(_FLOAT_ROWS * cols * 4)
    return _align64(shared) + each * threads


def _needs(op: NativeOp, max_tokens: int) -> tuple[int, int, int]:
    """Shared bytes, floats of a thread, longest row of weights."""
    pair = 2 * _PAIR_TOKENS * _PAIR_PANELS * _PANEL
    if op.kind == "linear":
        conv = max(_FEW * _PAIR_PANELS, max_tokens * _TASK_PANELS) * _PANEL
        return 0, max(conv, pair), op.inputs[0].width
    if op.kind == "experts_up":
        return _routing(op, max_tokens), pair, op.inputs[0].width
    if op.kind == "experts_down":
        sums = max(_SUMS, max_tokens * 2 * _PANEL)
        return 0, 2 * max(sums, _MAX_PANELS * _PANEL), op.op.weights[2].row_len
    if op.kind == "attention":
        dim, heads = int(op.op.attrs["head_dim"]), int(op.op.attrs["heads"])
        padded = (dim + 31) // 32 * 32
        tile = padded * (_QUERY_ROWS + _MAX_KEYS) + (_KEY_BLOCK + _MAX_KEYS) * _QUERY_ROWS
        tile += _KEY_BLOCK * 32 + _QUERY_ROWS * 36 + 16
        part = dim + 2
        return _SPLIT_TOKENS * heads * _MAX_SPLITS * part * 4, tile + _QUERY_ROWS * part, 32
    return 0, 0, 32


def _routing(op: NativeOp, max_tokens: int) -> int:
    """`Routing` of native/program/ops.h: six arrays of int32, each on a cache line."""
    experts, pairs = op.op.weights[0].shape[2], max_tokens * op.op.inputs[1].width
    return sum(_align64(4 * n) for n in (1, experts, experts + 1, pairs, pairs, experts))
