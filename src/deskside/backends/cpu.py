"""Runs a tape on the CPU: lowers it to a native program that reads the weights where they lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside import _native
from deskside.backends.buffers import group_linears, plan_buffers
from deskside.cache import Batch, Cache
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.system import available_memory
from deskside.tape import Op, Tape, Value

Place = tuple[int, int]  # offset into the arena, width


class CpuBackend:
    """One native program for a tape, at most `max_tokens` tokens a step.

    isa: name of a compiled instruction set, None for the fastest that this machine runs;
    DesksideError for one that it lacks.
    """

    def __init__(
        self, file: GGUF, tape: Tape, *, n_threads: int, max_tokens: int, isa: str | None = None
    ) -> None:
        self.tape = tape
        self._cache: Cache | None = None
        try:
            _native.choose(isa or "")
        except ValueError as error:
            raise DesksideError(f"--isa {isa}: {error}") from None
        self.steps = group_linears(tape.ops)
        offsets, arena = plan_buffers(self.steps, max_tokens, tape.logits)
        too_large = DesksideError(
            f"-ub {max_tokens} needs {4 * arena / 1e9:.1f} GB and more of work memory; lower it"
        )
        if 4 * arena > available_memory():
            raise too_large
        try:
            self.program = _native.Program(n_threads, max_tokens, arena, isa or "")
            lowering = _Lowering(self.program, file, tape, offsets)
            for step in self.steps:
                lowering.lower(step)
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

    def run(self, batch: Batch, cache: Cache) -> NDArray[np.float32]:
        return self._run(batch, cache, False)[0]

    def profile(self, batch: Batch, cache: Cache) -> tuple[NDArray[np.float32], list[float]]:
        """As `run`, with the microseconds of each of `steps`."""
        return self._run(batch, cache, True)

    def _run(
        self, batch: Batch, cache: Cache, profile: bool
    ) -> tuple[NDArray[np.float32], list[float]]:
        if cache is not self._cache:
            self._bind(cache)
        for s in batch.segments:
            inside = 0 <= s.slot < cache.n_slots and s.pos >= 0 and s.pos + s.n <= cache.n_ctx
            if not inside:
                raise ValueError(f"{s} lies outside the cache")
        segments = np.array([(s.slot, s.pos, s.n) for s in batch.segments], np.int32)
        logits = np.empty((len(batch.outputs), self.tape.n_vocab), np.float32)
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
    """Turns steps into calls of the native program; one method a kind."""

    program: _native.Program
    file: GGUF
    tape: Tape
    offsets: dict[int, int]

    def lower(self, step: list[Op]) -> None:
        kind = step[0].kind
        if kind == "linear":
            self.linear(step)
        else:
            method: Callable[[Op], None] = getattr(self, kind)
            method(step[0])

    def place(self, value: Value) -> Place:
        return (self.offsets.get(value.id, 0), value.width)

    def places(self, op: Op) -> list[Place]:
        """Inputs, then outputs."""
        return [self.place(v) for v in (*op.inputs, *op.outputs)]

    def matrix(self, info: TensorInfo) -> NDArray[np.uint8]:
        raw = self.file.raw(info.name)
        if info.type.name not in KERNEL_TYPES:
            raise DesksideError(
                f"{info.path}: tensor {info.name} has type {info.type.name}, which has no kernel"
            )
        return raw

    def floats(self, info: TensorInfo) -> NDArray[np.float32]:
        """A small tensor in float32."""
        return np.ascontiguousarray(self.file.dequantized(info.name))

    def embed(self, op: Op) -> None:
        (info,) = op.weights
        (out,) = self.places(op)
        self.program.embed(self.matrix(info), info.type.id, info.row_len, out)

    def rms_norm(self, op: Op) -> None:
        x, out = self.places(op)
        weight = self.floats(op.weights[0])
        self.program.norm(x, out, weight, op.attrs["eps"], op.inputs[0].per_output)

    def gated_norm(self, op: Op) -> None:
        x, z, out = self.places(op)
        self.program.norm(x, out, self.floats(op.weights[0]), op.attrs["eps"], False, z)

    def linear(self, step: list[Op]) -> None:
        x = step[0].inputs[0]
        parts = [
            (
                self.matrix(op.weights[0]),
                op.weights[0].type.id,
                self.place(op.outputs[0]),
                op.outputs[0].id == self.tape.logits.id,
            )
            for op in step
        ]
        self.program.linear(self.place(x), x.per_output, parts)

    def split_gate(self, op: Op) -> None:
        self.program.split_gate(*self.places(op), op.attrs["heads"], op.attrs["head_dim"])

    def rope(self, op: Op) -> None:
        x, out = self.places(op)
        n_rot = int(op.attrs["n_rot"])
        inv_freq = float(op.attrs["base"]) ** (-np.arange(n_rot // 2) * 2 / n_rot)
        if op.weights:
            inv_freq = inv_freq / self.floats(op.weights[0])
        self.program.rope(
            x,
            out,
            op.attrs["heads"],
            op.attrs["head_dim"],
            n_rot,
            bool(op.attrs["neox"]),
            inv_freq.tolist(),
        )

    def attention(self, op: Op) -> None:
        a = op.attrs
        self.program.attention(
            *self.places(op), a["heads"], a["kv_heads"], a["head_dim"], a["scale"], op.state
        )

    def conv_silu(self, op: Op) -> None:
        # The file has a channel's taps side by side; the kernel wants a tap's channels.
        taps = np.ascontiguousarray(self.floats(op.weights[0]).T)
        self.program.conv_silu(*self.places(op), taps, op.state)

    def gated_delta(self, op: Op) -> None:
        a = op.attrs
        ssm_a, dt_bias = (self.floats(w) for w in op.weights)
        self.program.gated_delta(
            *self.places(op),
            ssm_a,
            dt_bias,
            a["k_heads"],
            a["v_heads"],
            a["head_dim"],
            a["eps"],
            op.state,
        )

    def swiglu(self, op: Op) -> None:
        self.program.swiglu(*self.places(op))

    def sigmoid_gate(self, op: Op) -> None:
        self.program.sigmoid_gate(*self.places(op))

    def add(self, op: Op) -> None:
        self.program.add(*self.places(op))

    def route(self, op: Op) -> None:
        self.program.route(*self.places(op), op.attrs["top_k"])

    def experts(self, op: Op) -> None:
        _, width, n_expert = op.weights[0].shape
        matrices = [(self.matrix(w), w.type.id) for w in op.weights]
        self.program.experts(*self.places(op), n_expert, width, *matrices)

    def take_rows(self, op: Op) -> None:
        self.program.take_rows(*self.places(op))


# Kept equal to native/matmul.cpp's table by a test.
FLOAT_TYPES = ("F32", "F16", "BF16")
LEGACY_TYPES = ("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "IQ4_NL")
SUPERBLOCK_TYPES = ("Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ4_KS", "IQ4_KSS")
KERNEL_TYPES = frozenset((*FLOAT_TYPES, *LEGACY_TYPES, *SUPERBLOCK_TYPES))
