"""Bytes that a model takes on each device, as the engine allocates them.

CPU (panels.py, buffers.py, native/program/program.cpp):
- matrices in panels of 16 rows, each group on pages of its own
- vectors in float32
- the embedding only with `--no-mmap` or `--mlock`; else it stays in the mapped file
- an arena of activations, and work memory per thread

GPU:
- the file's bytes, in blocks of 512 as torch allocates them
- what its sections need while they run (scratch.py)

The last depends on the placement. `Memory` has bounds for any placement, `buffers` the figures of
one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from deskside import _native
from deskside.lowering.buffers import plan_arena
from deskside.lowering.panels import layout, matrices, panel_bytes
from deskside.lowering.scratch import MAX_OUTPUTS, work_bytes
from deskside.lowering.sections import HOST, HOST_TORCH, Offload, Section, cut_by_device
from deskside.lowering.steps import Step, Stretch, plan_steps
from deskside.tape import Tape

GPU_BLOCK = 512


class Memory:
    """Bytes of a tape's tensors and buffers. mapped: bytes, by name, left in the mapped file."""

    def __init__(self, tape: Tape, *, threads: int, ubatch: int) -> None:
        self.infos = tape.weights()
        steps = plan_steps(tape)
        _, biases, arena = plan_arena(steps, ubatch, tape.logits)
        self.cpu_buffers = 4 * arena + work_memory(steps, threads, ubatch)
        # A part of the tape needs no more than the whole, and a few values on their way.
        whole = cut_by_device(tape, dict.fromkeys(self.infos, "gpu"))
        widest = max(v.width for op in tape.ops for v in op.outputs if not v.per_output)
        self.gpu_buffers = work_bytes(whole, "gpu", ubatch, min(ubatch, MAX_OUTPUTS))
        self.gpu_buffers += 4 * 4 * ubatch * widest
        self.cpu = {name: 4 * info.row_len * info.n_rows for name, info in self.infos.items()}
        self.cpu.update(dict.fromkeys(biases, 0))  # they lie among the buffers
        ranges, total = layout(matrices(steps))
        for p in ranges:
            panels = -(-p.rows // _native.PANEL_ROWS) * p.groups
            self.cpu[p.info.name] = panel_bytes(p.info) * panels
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
    """Steps of at most `rows` tokens, and the offload of experts in them, if any."""

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
            _, _, arena = plan_arena(steps, shape.rows, tape.logits)
            found[HOST] += 4 * arena + work_memory(steps, threads, shape.rows)
    found[HOST] += found.pop(HOST_TORCH)
    return found, cuts[0]


def work_memory(steps: list[Step], threads: int, max_tokens: int) -> int:
    """Bytes that `Program::finish` takes besides the arena: shared, and each thread's.

    The native code answers for each op from its shape; ops that are not named here need none.
    """
    memory = _native.WorkMemory(max_tokens)
    for op in (op for step in steps for op in step.ops):
        width, weights = op.inputs[0].width if op.inputs else 0, op.op.weights
        match op.kind:
            case "linear":
                memory.linear(width)
            case "attention":
                memory.attention(op.op.size("heads"), op.op.size("head_dim"))
            case "sort_experts":
                memory.sort_experts(n_expert=weights[0].shape[2], top_k=width)
            case "experts_up":
                memory.experts_up(width)
            case "experts_down":
                memory.experts_down(weights[2].row_len)
    return memory.nbytes(threads)
