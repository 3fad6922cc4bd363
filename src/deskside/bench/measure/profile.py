"""Time of each sort of step, in a decode step and in a batch of prefill, beside its work.

Steps run between barriers and hold several ops (backends/steps.py); steps whose ops have the same
names are one row. Bytes and products are counted as `cost.Work` does, so the rows of decode add up
to it; those of prefill have recurrent states besides.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import numpy as np

from deskside.backends.native.program import CpuBackend
from deskside.bench.record import OpProfile
from deskside.engine import LLM
from deskside.errors import DesksideError
from deskside.gguf import TensorInfo
from deskside.lowering.steps import NativeOp, Step
from deskside.progress import Progress, silent
from deskside.tape.cache import Batch, Segment, cache_bytes
from deskside.tape.cost import Experts

REPEATS = 9
SEED = 0

# A matrix by the name of its tensor: the first that matches. Shared experts before the dense block.
MATRICES = (
    (r"attn_qkv|ssm_(alpha|beta|in|ba)", "delta net: in-projections"),
    (r"attn_gate", "delta net: in-projections"),
    (r"ssm_out", "delta net: out-projection"),
    (r"attn_(q|k|v)\.", "attention: in-projections"),
    (r"attn_output", "attention: out-projection"),
    (r"ffn_gate_inp\.", "router"),
    (r"ffn_gate_inp_shexp", "shared expert: gate and up"),
    (r"ffn_(gate|up)_shexp", "shared expert: gate and up"),
    (r"ffn_down_shexp", "shared expert: down"),
    (r"ffn_(gate|up)\.", "feed-forward: gate and up"),
    (r"ffn_down\.", "feed-forward: down"),
    (r"^(output|token_embd)\.", "head"),
)
# Other ops that have work worth a name; what remains is done row by row.
OPS = {
    "attention": "attention",
    "gated_delta": "delta net",
    "experts_up": "experts: gate and up",
    "experts_down": "experts: down",
}
SMALL = "norms, gates, rounding"


@dataclass
class _Row:
    seconds: float = 0.0
    nbytes: float = 0.0
    macs: float = 0.0


def profile(llm: LLM, depth: int, progress: Progress = silent) -> list[OpProfile]:
    """Rows for a decode step behind `depth` tokens and for a batch of prefill as large as fits.

    Forgets what the model's cache holds. DesksideError if the context is too short or the backend
    has no steps.
    """
    backend = llm.backend
    if not isinstance(backend, CpuBackend):
        raise DesksideError("--profile: only the cpu backend has steps to time")
    if not 0 < depth < llm.ctx:
        raise DesksideError(f"--profile: a depth of {depth} does not fit the context of {llm.ctx}")
    ordinary = np.flatnonzero(~llm.tokenizer.banned(llm.tape.n_vocab))
    tokens = np.random.default_rng(SEED).choice(ordinary, llm.ctx).astype(np.int32)
    chunk = min(llm.ubatch, llm.ctx)
    try:
        prefill = _timed(llm, backend, tokens, 0, chunk, progress)
        llm.reset()
        for start in range(0, depth, chunk):
            progress("profile: filling the cache", start, depth)
            _run(llm, backend, tokens, start, min(chunk, depth - start))
        decode = _timed(llm, backend, tokens, depth, 1, progress)
    finally:
        llm.reset()
    return [
        *_rows(llm, backend.steps, decode, "decode", 1, depth),
        *_rows(llm, backend.steps, prefill, "prefill", chunk, 0),
    ]


def _run(llm: LLM, backend: CpuBackend, tokens: np.ndarray, at: int, n: int) -> list[float]:
    """Microseconds of each step for n tokens at a position."""
    outputs = np.array([n - 1], np.int32)
    batch = Batch(tokens[at : at + n], (Segment(0, at, n),), outputs)
    return backend.profile(batch, llm.cache)[1]


def _timed(
    llm: LLM, backend: CpuBackend, tokens: np.ndarray, at: int, n: int, progress: Progress
) -> list[float]:
    """Seconds of each step, the median of REPEATS; the first time of all is not counted.

    The recurrent state goes on meanwhile and is of no use afterwards.
    """
    taken = []
    for i in range(REPEATS + 1):
        progress("profile", i, REPEATS + 1)
        taken.append(_run(llm, backend, tokens, at, n))
    return [median(times) / 1e6 for times in zip(*taken[1:], strict=True)]


def _rows(
    llm: LLM, steps: list[Step], seconds: list[float], phase: str, n: int, depth: int
) -> list[OpProfile]:
    rows: dict[str, _Row] = {}
    work = _Counter(llm, n, depth)
    for step, taken in zip(steps, seconds, strict=True):
        row = rows.setdefault(name(step), _Row())
        row.seconds += taken / n
        for op in step.ops:
            nbytes, macs = work.of(op)
            row.nbytes += nbytes / n
            row.macs += macs / n
    return [
        OpProfile(label, phase, row.seconds, row.nbytes, row.macs)
        for label, row in sorted(rows.items(), key=lambda entry: -entry[1].seconds)
    ]


def name(step: Step) -> str:
    """What a step does: the names of its ops, those of rows together one name."""
    names: dict[str, None] = {}
    for op in step.ops:
        parts = [p.op.weights[0] for p in op.parts] + [p.up.weights[0] for p in op.parts if p.up]
        for label in [_matrix(w) for w in parts] or [OPS.get(op.kind, "")]:
            names[label] = None
    return " + ".join(label for label in names if label) or SMALL


def _matrix(weight: TensorInfo) -> str:
    bare = re.sub(r"^blk\.\d+\.", "", weight.name)
    return next((label for pattern, label in MATRICES if re.match(pattern, bare)), bare)


class _Counter:
    """Bytes and products of native ops in a step of n tokens with one output."""

    def __init__(self, llm: LLM, n: int, depth: int) -> None:
        self._llm, self._n, self._depth = llm, n, depth

    def of(self, op: NativeOp) -> tuple[float, float]:
        count: Callable[[NativeOp], tuple[float, float]]
        count = getattr(self, op.kind, self.nothing)
        return count(op)

    def nothing(self, op: NativeOp) -> tuple[float, float]:
        """Ops that belong to another one (rounding, storing, merging) or read no weights."""
        return 0.0, 0.0

    def rms_norm(self, op: NativeOp) -> tuple[float, float]:
        return float(sum(w.nbytes for w in op.op.weights)), 0.0

    gated_norm = rope = rms_norm

    def embed(self, op: NativeOp) -> tuple[float, float]:
        return float(self._n * op.op.weights[0].row_bytes), 0.0

    def linear(self, op: NativeOp) -> tuple[float, float]:
        nbytes = macs = 0.0
        rows = 1 if op.inputs[0].per_output else self._n
        for part in op.parts:
            for matrix in (part.op, part.up):
                if matrix:
                    weight = matrix.weights[0]
                    nbytes += weight.nbytes
                    macs += rows * weight.row_len * weight.n_rows
            if part.conv:
                nbytes += part.conv.weights[0].nbytes + self._state(part.conv.state)
        return nbytes, macs

    def gated_delta(self, op: NativeOp) -> tuple[float, float]:
        return sum(w.nbytes for w in op.op.weights) + self._state(op.op.state), 0.0

    def attention(self, op: NativeOp) -> tuple[float, float]:
        return self._state(op.op.state), 0.0

    def experts_up(self, op: NativeOp) -> tuple[float, float]:
        return self._experts(op, op.op.weights[:2])

    def experts_down(self, op: NativeOp) -> tuple[float, float]:
        return self._experts(op, op.op.weights[2:])

    def _experts(self, op: NativeOp, weights: tuple[TensorInfo, ...]) -> tuple[float, float]:
        used, total = op.op.inputs[1].width, weights[0].shape[2]
        layer = Experts(sum(w.nbytes for w in weights), used, total)
        macs = self._n * used * sum(w.row_len * w.shape[1] for w in weights)
        return layer.read(self._n), float(macs)

    def _state(self, index: int | None) -> float:
        """Keys and values of the depth, read; recurrent state, read and written."""
        assert index is not None
        state = self._llm.tape.states[index]
        cache = self._llm.cache
        kv, recurrent = cache_bytes([state], self._depth, cache.k_type, cache.v_type)
        return float(kv + 2 * recurrent)
