"""Runs a tape on the CPU: packs the weights for the kernels, and lowers the ops to native calls."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside import _native
from deskside.backends.native.weights import load
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.quants import FLOAT_TYPES
from deskside.lowering.buffers import plan_arena, stride
from deskside.lowering.steps import NativeOp, Stretch, plan_steps
from deskside.machine.host import HostOptions
from deskside.machine.system import available_memory
from deskside.progress import Progress, silent
from deskside.tape import Tape, Value
from deskside.tape.cache import Batch, Cache

Place = tuple[int, int, int]  # offset into the arena, width, stride
NO_PLACE: Place = (0, 0, 0)


class CpuBackend:
    """One native program for a tape, for at most `max_tokens` tokens per step.

    reserve    bytes that must stay free, for a cache
    stretches  the parts of the tape that run here, in order (`run_stretch`); None for all
    packed     another backend's `weights`, used here as they are

    DesksideError for an instruction set that this machine lacks, a type without a kernel, or what
    does not fit.
    """

    def __init__(
        self,
        file: GGUF,
        tape: Tape,
        host: HostOptions,
        *,
        max_tokens: int,
        reserve: int = 0,
        stretches: Sequence[Stretch] | None = None,
        packed: Mapping[str, _native.Weights] | None = None,
        progress: Progress = silent,
    ) -> None:
        self.tape = tape
        self._host = host
        self._cache: Cache | None = None
        try:
            _native.choose(host.isa or "")
        except ValueError as error:
            raise DesksideError(f"--isa {host.isa}: {error}") from None
        ops = tape.ops if stretches is None else [op for s in stretches for op in s.ops]
        _check_types(w for op in ops for w in op.weights)
        self.steps = plan_steps(tape, stretches)
        self._ranges: list[tuple[int, int]] = []  # of each stretch: its native steps [begin, end)
        offsets, biases, arena = plan_arena(self.steps, max_tokens, tape.logits)
        too_large = DesksideError(
            f"-ub {max_tokens} needs at least {4 * arena / 1e9:.1f} GB of work memory; lower it"
        )
        if 4 * arena > available_memory():
            raise too_large
        reserve += 4 * arena
        try:
            try:
                self.program = _native.Program(host.most_threads, max_tokens, arena, host.isa or "")
            except RuntimeError as error:  # from the system
                raise DesksideError(
                    f"-t {host.most_threads}: the system starts no more threads: {error}; lower it"
                ) from None
            self.weights = load(
                self.steps, host, reserve=reserve, progress=progress, packed=packed or {}
            )
            lowering = _Lowering(self.program, file, tape, offsets, biases, self.weights)
            self._lower(lowering)
            self.program.finish()
        except MemoryError:
            raise too_large from None
        except ValueError as error:
            raise DesksideError(f"{file.path}: {error}") from None
        self._offsets = offsets
        self._activations = self.program.activations
        infos = tape.weights()
        for name, (at, width, _) in biases.items():
            self._activations[at : at + width] = file.dequantized(infos[name])

    def _lower(self, lowering: _Lowering) -> None:
        n, hops = 0, []
        for step in self.steps:
            if step.where == "hop":
                hops.append(n)
                continue
            self.program.begin(step.where)
            n += 1
            for op in step.ops:
                LOWERINGS[op.kind](lowering, op)
        self._ranges = list(zip(hops[::2], hops[1::2], strict=True))

    @property
    def isa(self) -> str:
        """The instruction set of the kernels."""
        return str(self.program.isa)

    @property
    def nbytes(self) -> int:
        """Bytes of work memory: activations and scratch, without weights and cache."""
        return int(self.program.nbytes)

    def run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """See `Backend.run`."""
        return self._run(batch, cache, out, False)[0]

    def profile(self, batch: Batch, cache: Cache) -> tuple[NDArray[np.float32], list[float]]:
        """As `run`, and the microseconds of each of `steps`."""
        return self._run(batch, cache, None, True)

    def run_stretch(self, i: int, batch: Batch, cache: Cache, logits: NDArray[np.float32]) -> None:
        """Run stretch `i`. Its imports must be in `values`, and its exports are there afterwards.

        logits: written if the stretch has the head. The cache is not advanced.
        """
        begin, end = self._ranges[i]
        self._call(batch, cache, logits, False, begin, end)

    def values(self, value: Value, rows: int) -> NDArray[np.float32]:
        """A stretch's import or export: a view (rows, width) of the program's memory."""
        at, step = self._offsets[value.id], stride(value.width)
        return self._activations[at : at + rows * step].reshape(rows, step)[:, : value.width]

    def _run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None, profile: bool
    ) -> tuple[NDArray[np.float32], list[float]]:
        shape = (len(batch.outputs), self.tape.n_vocab)
        logits = np.empty(shape, np.float32) if out is None else out
        micros = self._call(batch, cache, logits, profile)
        cache.advance(batch)
        return logits, micros

    def _call(
        self,
        batch: Batch,
        cache: Cache,
        logits: NDArray[np.float32],
        profile: bool,
        begin: int = 0,
        end: int = -1,
    ) -> list[float]:
        if cache is not self._cache:
            self._bind(cache)
        cache.check(batch)
        segments = np.array([(s.slot, s.pos, s.n) for s in batch.segments], np.int32)
        threads = self._host.n_threads
        if any(s.n > 1 for s in batch.segments):
            threads = self._host.n_threads_batch or threads
        return self.program.run(
            batch.tokens, segments, batch.outputs, logits, profile, begin, end, threads
        )

    def _bind(self, cache: Cache) -> None:
        types = (cache.k_type.id, cache.v_type.id)
        # States on another device have no array here: pass a dummy that is never read.
        self.program.set_states(
            [
                (*arrays, *types) if len(arrays) == 2 else arrays or (np.zeros(1, np.uint8),)
                for arrays in cache.arrays
            ]
        )
        self._cache = cache


def _check_types(weights: Iterable[TensorInfo]) -> None:
    for info in weights:
        if info.type.name not in KERNEL_TYPES:
            raise DesksideError(
                f"{info.path}: tensor {info.name} has type {info.type.name}, which has no kernel; "
                f"the types with one are {', '.join(sorted(KERNEL_TYPES))}"
            )


@dataclass
class _Lowering:
    """Turns ops into calls of the native program: one method per kind."""

    program: _native.Program
    file: GGUF
    tape: Tape
    offsets: dict[int, int]
    biases: dict[str, Place]
    weights: dict[str, _native.Weights]

    def place(self, value: Value) -> Place:
        return (self.offsets.get(value.id, 0), value.width, stride(value.width))

    def places(self, op: NativeOp) -> list[Place]:
        """The places of the op's inputs, then of its outputs."""
        return [self.place(v) for v in (*op.inputs, *op.outputs)]

    def floats(self, info: TensorInfo) -> NDArray[np.float32]:
        """A small tensor in float32, in NumPy's order of dimensions."""
        return np.ascontiguousarray(self.file.dequantized(info))

    def embed(self, op: NativeOp) -> None:
        (info,) = op.op.weights
        (out,) = self.places(op)
        self.program.embed(self.file.raw(info), info.type.id, info.row_len, out)

    def rms_norm(self, op: NativeOp) -> None:
        x, out = self.places(op)
        self.program.norm(x, out, self.floats(op.op.weights[0]), op.op.attrs["eps"])

    def bias(self, op: NativeOp) -> None:
        x, out = self.places(op)
        self.program.add(x, self.biases[op.op.weights[0].name], out)

    def gated_norm(self, op: NativeOp) -> None:
        x, z, out = self.places(op)
        self.program.norm(x, out, self.floats(op.op.weights[0]), op.op.attrs["eps"], z)

    def quantize(self, op: NativeOp) -> None:
        self.program.quantize(*self.places(op))

    def linear(self, op: NativeOp) -> None:
        x, *record = (self.place(v) for v in op.inputs)
        parts = []
        for part in op.parts:
            up = self.weights[part.up.weights[0].name] if part.up else None
            conv = None
            if part.conv:
                # the file stores (channels, taps), the kernel reads (taps, channels)
                taps = np.ascontiguousarray(self.floats(part.conv.weights[0]).T)
                conv = (taps, part.conv.state)
            to_logits = part.out.id == self.tape.logits.id
            weights = self.weights[part.op.weights[0].name]
            parts.append((weights, self.place(part.out), to_logits, up, conv))
        per_output = op.inputs[0].per_output
        self.program.linear(x, record[0] if record else NO_PLACE, per_output, parts)

    def split_gate(self, op: NativeOp) -> None:
        self.program.split_gate(*self.places(op), op.op.attrs["heads"], op.op.attrs["head_dim"])

    def rope(self, op: NativeOp) -> None:
        x, out = self.places(op)
        a, n_rot = op.op.attrs, op.op.size("n_rot")
        inv_freq = op.op.number("base") ** (-np.arange(n_rot // 2) * 2 / n_rot)
        if op.op.weights:
            inv_freq = inv_freq / self.floats(op.op.weights[0])
        shape = (a["heads"], a["head_dim"], n_rot, bool(a["neox"]))
        self.program.rope(x, out, *shape, inv_freq.tolist())

    def store_kv(self, op: NativeOp) -> None:
        a = op.op.attrs
        k, v = (self.place(v) for v in op.inputs)
        self.program.store_kv(k, v, a["kv_heads"], a["head_dim"], op.op.state)

    def attention(self, op: NativeOp) -> None:
        a = op.op.attrs
        shape = (a["heads"], a["kv_heads"], a["head_dim"], a["scale"])
        q, out = self.place(op.inputs[0]), self.place(op.outputs[0])
        self.program.attention(q, out, *shape, op.op.state)

    def merge_attention(self, op: NativeOp) -> None:
        a = op.op.attrs
        self.program.merge_attention(self.place(op.outputs[0]), a["heads"], a["head_dim"])

    def delta_gates(self, op: NativeOp) -> None:
        a = op.op.attrs
        tensors = (self.floats(w) for w in op.op.weights)
        places = (self.place(v) for v in op.inputs)
        shape = (a["k_heads"], a["v_heads"], a["head_dim"], a["eps"])
        self.program.delta_gates(*places, *tensors, *shape)

    def gated_delta(self, op: NativeOp) -> None:
        a = op.op.attrs
        shape = (a["k_heads"], a["v_heads"], a["head_dim"])
        self.program.gated_delta(*self.places(op), *shape, op.op.state)

    def swiglu(self, op: NativeOp) -> None:
        self.program.swiglu(*self.places(op))

    def sigmoid_gate(self, op: NativeOp) -> None:
        self.program.sigmoid_gate(*self.places(op))

    def add(self, op: NativeOp) -> None:
        self.program.add(*self.places(op))

    def route(self, op: NativeOp) -> None:
        self.program.route(*self.places(op), op.op.attrs["top_k"])

    def sort_experts(self, op: NativeOp) -> None:
        _, width, n_expert = op.op.weights[0].shape
        self.program.sort_experts(self.place(op.inputs[0]), n_expert, width)

    def experts_up(self, op: NativeOp) -> None:
        x, *record = (self.place(v) for v in op.inputs[:-1])
        gate, up = (self.weights[w.name] for w in op.op.weights[:2])
        top_k = op.op.inputs[1].width
        floats, records = self.hidden(op.op.weights[2], self.place(op.outputs[0]), top_k)
        self.program.experts_up(
            x, record[0] if record else NO_PLACE, floats, records, top_k, gate, up
        )

    def experts_down(self, op: NativeOp) -> None:
        hidden, _, weights = (self.place(v) for v in op.inputs)
        down = op.op.weights[2]
        top_k = op.op.inputs[1].width
        floats, records = self.hidden(down, hidden, top_k)
        out = self.place(op.outputs[0])
        self.program.experts_down(floats, records, weights, out, top_k, self.weights[down.name])

    @staticmethod
    def hidden(down: TensorInfo, place: Place, top_k: int) -> tuple[Place, Place]:
        """The place of the experts' hidden values: as floats, as records. One of them is used."""
        width = top_k * down.row_len
        floats = (place[0], width, width)
        is_float = down.type.name in FLOAT_TYPES
        return floats, NO_PLACE if is_float else place

    def take_rows(self, op: NativeOp) -> None:
        self.program.take_rows(*self.places(op))


# A test keeps these equal to the table in native/isa/matmul.cpp.
LEGACY_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q6_0", "Q8_0", "IQ4_NL", "MXFP4")
SUPERBLOCK_TYPES = (
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS"),
    *("IQ4_K", "IQ5_K", "IQ6_K", "IQ4_KS", "IQ4_KSS", "IQ5_KS"),
)
KERNEL_TYPES = frozenset((*FLOAT_TYPES, *LEGACY_TYPES, *SUPERBLOCK_TYPES))


# By kind of native op.
LOWERINGS: dict[str, Callable[[_Lowering, NativeOp], None]] = {
    f.__name__: f
    for f in (
        _Lowering.embed,
        _Lowering.rms_norm,
        _Lowering.bias,
        _Lowering.gated_norm,
        _Lowering.quantize,
        _Lowering.linear,
        _Lowering.split_gate,
        _Lowering.rope,
        _Lowering.store_kv,
        _Lowering.attention,
        _Lowering.merge_attention,
        _Lowering.delta_gates,
        _Lowering.gated_delta,
        _Lowering.swiglu,
        _Lowering.sigmoid_gate,
        _Lowering.add,
        _Lowering.route,
        _Lowering.sort_experts,
        _Lowering.experts_up,
        _Lowering.experts_down,
        _Lowering.take_rows,
    )
}
