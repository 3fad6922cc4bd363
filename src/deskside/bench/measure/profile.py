"""Times each kind of step, in decode and in prefill, beside its bytes and multiply-adds.

A step runs between two barriers and holds several ops (lowering/steps.py). Steps with ops of the
same names are one row. Bytes are those of `cost.work`. Multiply-adds are those with weight
matrices. The rows of decode add up to `cost.Work`; the rows of prefill also count states.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from deskside.backends.native.program import CpuBackend
from deskside.bench.record import OpProfile
from deskside.engine import LLM
from deskside.errors import DesksideError
from deskside.gguf import TensorInfo
from deskside.gguf.roles import Role, role
from deskside.lowering.steps import NativeOp, Step
from deskside.progress import Progress, silent
from deskside.tape import Op
from deskside.tape.cache import Batch, Segment
from deskside.tape.cost import MATRICES, BatchShape, work

REPEATS = 9
SEED = 0

# By role: a part of the name of the matrix that ends a block, its label, the others' label.
PROJECTIONS = ("_out", "out-projection", "in-projections")
FEED_FORWARD = ("_down", "down", "gate and up")
SIDES = {
    Role.DELTA: PROJECTIONS,
    Role.ATTENTION: PROJECTIONS,
    Role.SHARED: FEED_FORWARD,
    Role.FFN: FEED_FORWARD,
}
# Labels of other ops that take time. All remaining ops work row by row.
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
    """Profile one decode step at `depth` tokens, and the largest batch of prefill that fits.

    Clears the model's cache. DesksideError if the context is too short or the backend has no steps.
    """
    backend = llm.backend
    if not isinstance(backend, CpuBackend):
        raise DesksideError("--profile: only the cpu backend can time its steps")
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
    """Seconds of each step: the median of REPEATS, after one pass that does not count.

    Every pass advances the recurrent state, so the state is useless afterwards.
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
    shape, states = BatchShape(n, depth), llm.tape.states
    k_type, v_type = llm.cache.k_type, llm.cache.v_type
    for step, taken in zip(steps, seconds, strict=True):
        row = rows.setdefault(name(step), _Row())
        row.seconds += taken / n
        for native in step.ops:
            ops = [work(op, states, shape, k_type, v_type) for op in _tape_ops(native)]
            row.nbytes += sum(op.nbytes for op in ops) / n
            row.macs += sum(op.macs for op in ops if op.sort in MATRICES) / n
    return [
        OpProfile(label, phase, row.seconds, row.nbytes, row.macs)
        for label, row in sorted(rows.items(), key=lambda entry: -entry[1].seconds)
    ]


def name(step: Step) -> str:
    """The label of a step: the labels of its ops. All row-wise ops share one label."""
    names: dict[str, None] = {}
    for op in step.ops:
        parts = [p.op.weights[0] for p in op.parts] + [p.up.weights[0] for p in op.parts if p.up]
        for label in [_matrix(w) for w in parts] or [OPS.get(op.kind, "")]:
            names[label] = None
    return " + ".join(label for label in names if label) or SMALL


def _matrix(weight: TensorInfo) -> str:
    found = role(weight.name)
    if found in SIDES:
        piece, last, first = SIDES[found]
        return f"{found}: {last if piece in weight.name else first}"
    return Role.HEAD if found is Role.EMBEDDING else found


def _tape_ops(native: NativeOp) -> list[Op]:
    """The tape ops that a native op computes.

    Empty for native ops that only help another one: rounding, storing, merging.
    """
    if native.parts:
        return [op for p in native.parts for op in (p.op, p.up, p.conv) if op]
    if native.kind == "experts_up":
        return [replace(native.op, weights=native.op.weights[:2])]
    if native.kind == "experts_down":
        return [replace(native.op, weights=native.op.weights[2:])]
    return [native.op] if native.kind == native.op.kind else []
