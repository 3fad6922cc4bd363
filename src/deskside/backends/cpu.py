"""Runs a tape on the CPU: lowers it to a native program with the weights packed for its kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside import _native
from deskside.backends.buffers import plan_buffers, stride
from deskside.backends.steps import FLOAT_TYPES, NativeOp, plan_steps
from deskside.backends.weights import load
from deskside.cache import Batch, Cache
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.progress import Progress, silent
from deskside.system import available_memory
from deskside.tape import Tape, Value

Place = tuple[int, int, int]  # offset into the arena, width, stride
NO_PLACE: Place = (0, 0, 0)


class CpuBackend:
    """One native program for a tape, at most `max_tokens` tokens a step.

    isa: name of a compiled instruction set, None for the fastest that this machine runs;
    DesksideError for one that it lacks. reserve: bytes that must stay free, for a cache.
    """

    def __init__(
        self,
        file: GGUF,
        tape: Tape,
        *,
        n_threads: int,
        max_tokens: int,
        isa: str | None = None,
        reserve: int = 0,
        progress: Progress = silent,
    ) -> None:
        self.tape = tape
        self._cache: Cache | None = None
        try:
            _native.choose(isa or "")
        except ValueError as error:
            raise DesksideError(f"--isa {isa}: {error}") from None
        for info in tape.weights().values():
            if info.type.name not in KERNEL_TYPES:
                raise DesksideError(
                    f"{info.path}: tensor {info.name} has type {info.type.name}, "
                    "which has no kernel"
                )
        self.steps = plan_steps(tape)
        offsets, arena = plan_buffers(self.steps, max_tokens, tape.logits)
        too_large = DesksideError(
            f"-ub {max_tokens} needs {4 * arena / 1e9:.1f} GB and more of work memory; lower it"
        )
        if 4 * arena > available_memory():
            raise too_large
        reserve += 4 * arena
        try:
            self.program = _native.Program(n_threads, max_tokens, arena, isa or "")
            weights = load(self.steps, n_threads=n_threads, reserve=reserve, progress=progress)
            lowering = _Lowering(self.program, file, tape, offsets, weights)
            for step in self.steps:
                self.program.begin(step.where)
                for op in step.ops:
                    method: Callable[[NativeOp], None] = getattr(lowering, op.kind)
                    method(op)
            self.program.finish()
        except MemoryError:
            raise too_large from None
        except ValueError as error:
            raise DesksideError(f"{file.path}: {error}") from None

    @property
    def isa(self) -> str:
        return str(self.program.isa)

    @property
    def nbytes(self) -> int:
        """Work memory: activations and scratch, without weights and cache."""
        return int(self.program.nbytes)

    def run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        return self._run(batch, cache, out, False)[0]

    def profile(self, batch: Batch, cache: Cache) -> tuple[NDArray[np.float32], list[float]]:
        """As `run`, with the microseconds of each of `steps`."""
        return self._run(batch, cache, None, True)

    def _run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None, profile: bool
    ) -> tuple[NDArray[np.float32], list[float]]:
        if cache is not self._cache:
            self._bind(cache)
        for s in batch.segments:
            inside = 0 <= s.slot < cache.n_slots and s.pos >= 0 and s.pos + s.n <= cache.n_ctx
            if not inside:
                raise ValueError(f"{s} lies outside the cache")
        segments = np.array([(s.slot, s.pos, s.n) for s in batch.segments], np.int32)
        shape = (len(batch.outputs), self.tape.n_vocab)
        logits = np.empty(shape, np.float32) if out is None else out
        micros = self.program.run(batch.tokens, segments, batch.outputs, logits, profile)
        return logits, micros

    def _bind(self, cache: Cache) -> None:
        types = (cache.k_type.id, cache.v_type.id)
        self.program.set_states(
            [(*arrays, *types) if len(arrays) == 2 else arrays for arrays in cache.arrays]
        )
        self._cache = cache


@dataclass
class _Lowering:
    """Turns ops into calls of the native program; one method a kind."""

    program: _native.Program
    file: GGUF
    tape: Tape
    offsets: dict[int, int]
    weights: dict[str, _native.Weights]

    def place(self, value: Value) -> Place:
        return (self.offsets.get(value.id, 0), value.width, stride(value.width))

    def places(self, op: NativeOp) -> list[Place]:
        """Inputs, then outputs."""
        return [self.place(v) for v in (*op.inputs, *op.outputs)]

    def floats(self, info: TensorInfo) -> NDArray[np.float32]:
        """A small tensor in float32."""
        return np.ascontiguousarray(self.file.dequantized(info.name))

    def embed(self, op: NativeOp) -> None:
        (info,) = op.op.weights
        (out,) = self.places(op)
        self.program.embed(self.file.raw(info.name), info.type.id, info.row_len, out)

    def rms_norm(self, op: NativeOp) -> None:
        x, out = self.places(op)
        self.program.norm(x, out, self.floats(op.op.weights[0]), op.op.attrs["eps"])

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
                # The file has a channel's taps side by side; the kernel wants a tap's channels.
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
        a = op.op.attrs
        n_rot = int(a["n_rot"])
        inv_freq = float(a["base"]) ** (-np.arange(n_rot // 2) * 2 / n_rot)
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
        """What lies between the experts' matrices, as floats and as records: one is used."""
        width = top_k * down.row_len
        floats = (place[0], width, width)
        is_float = down.type.name in FLOAT_TYPES
        return floats, NO_PLACE if is_float else place

    def take_rows(self, op: NativeOp) -> None:
        self.program.take_rows(*self.places(op))


# Kept equal to native/matmul.cpp's table by a test.
LEGACY_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
SUPERBLOCK_TYPES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_KS", "IQ4_KSS")
KERNEL_TYPES = frozenset((*FLOAT_TYPES, *LEGACY_TYPES, *SUPERBLOCK_TYPES))
