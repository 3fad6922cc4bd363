"""What a model must read and multiply, and the speed that a machine's limits allow it.

`work` gives the cost of one op. Planner, benchmarks and profile all sum it. Bytes are those of
weights, keys and values, and recurrent state, each counted once per step. Every token is assumed to
choose its experts at random. That holds for random weights; a trained model may differ.

`Work` has a model's totals. It leaves out the products of attention, the delta rule and row-wise
ops, so `limit` is an upper bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deskside.gguf.quants import FLOAT_TYPES, QuantType, quant_type
from deskside.tape.cache import cache_bytes
from deskside.tape.tape import KVState, Op, State, Tape

F16 = quant_type("f16")
# Sorts of ops that multiply by weight matrices. The other sorts are attention, delta and rows.
MATRICES = frozenset({"dense", "experts", "head", "router"})


@dataclass(frozen=True)
class BatchShape:
    """`n` tokens for each of `n_seq` sequences, after `depth` cached ones; logits of each last."""

    n: int
    depth: float = 0
    n_seq: int = 1

    @property
    def tokens(self) -> int:
        return self.n * self.n_seq


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer."""

    nbytes: int
    used: int
    total: int

    @classmethod
    def of(cls, op: Op) -> Experts:
        nbytes = sum(w.nbytes for w in op.weights)
        return cls(nbytes, op.inputs[1].width, op.weights[0].shape[2])

    def read(self, n_tokens: int) -> float:
        """Expected bytes that n tokens read, each choosing `used` of `total` experts at random:
        a token misses an expert with probability 1 - used / total."""
        return self.nbytes * (1 - (1 - self.used / self.total) ** n_tokens)


class OpWork(NamedTuple):
    """Bytes and multiply-adds of one op in one step. weights: bytes of weights read. state: bytes
    of keys and values read, and of recurrent state read and written."""

    sort: str
    weights: float
    state: float
    macs: float

    @property
    def nbytes(self) -> float:
        return self.weights + self.state


def work(
    op: Op,
    states: Sequence[State],
    shape: BatchShape,
    k_type: QuantType = F16,
    v_type: QuantType = F16,
) -> OpWork:
    """Cost of an op of the tape with `states` in a step of `shape`. k_type, v_type: of the cache.

    Multiply-adds:
    linear       n_in * n_out per row
    attention    two per position and element of its output: with keys and with values
    gated delta  three per token and element of the state S (S^T k, k d^T, S^T q) in the rule
                 S <- g S; d = b (v - S^T k); S <- S + k d^T; o = S^T q (arXiv:2412.06464)
    convolution  `kernel` per element
    """
    rows = shape.n_seq if op.outputs[0].per_output else shape.tokens
    width = op.outputs[0].width
    weights = sum(w.nbytes for w in op.weights)
    if op.kind == "embed":
        return OpWork("rows", rows * op.weights[0].row_bytes, 0, rows * width)
    if op.kind == "experts":
        experts = Experts.of(op)
        macs = rows * experts.used * sum(w.row_len * w.shape[1] for w in op.weights)
        return OpWork("experts", experts.read(rows), 0, macs)
    if op.kind == "linear":
        w = op.weights[0]
        sort = "head" if op.inputs[0].per_output else "dense"
        sort = "router" if w.type.name in FLOAT_TYPES else sort
        return OpWork(sort, weights, 0, rows * w.row_len * w.n_rows)
    if op.state is None:
        return OpWork("rows", weights, 0, rows * sum(v.width for v in op.outputs))
    state = states[op.state]
    moved = shape.n_seq * state_bytes([state], shape, k_type, v_type)
    if isinstance(state, KVState):
        # On average: the first token sees `depth` positions, the last n - 1 more.
        seen = shape.depth + (shape.n - 1) / 2
        return OpWork("attention", weights, moved, rows * seen * 2 * width)
    per_output = 3 * op.attrs["head_dim"] if op.kind == "gated_delta" else op.attrs["kernel"]
    return OpWork("delta", weights, moved, rows * width * per_output)


def state_bytes(
    states: Sequence[State], shape: BatchShape, k_type: QuantType, v_type: QuantType
) -> float:
    """Bytes that one sequence's states move in a step of `shape`.

    Keys and values of all positions before the last token are read once for all tokens. Recurrent
    state is read and written.
    """
    kv, recurrent = cache_bytes(states, 1, k_type, v_type)
    return kv * (shape.depth + shape.n - 1) + 2 * recurrent


@dataclass(frozen=True)
class Work:
    """One model: the sum of `work` over its tape.

    macs: of a token with the weight matrices. head_macs: further ones of a token whose logits are
    wanted; head_bytes, a part of dense_bytes, of their matrix. The embedding table counts one row
    per token, unless it is the head too. Layers for multi-token prediction are not on the tape and
    do not count.
    """

    dense_bytes: int
    row_bytes: int
    experts: tuple[Experts, ...]
    macs: int
    head_macs: int
    head_bytes: int
    states: tuple[State, ...]

    @classmethod
    def of(cls, tape: Tape) -> Work:
        dense = row = macs = head = head_bytes = 0
        experts = []
        for op in tape.ops:
            one = work(op, tape.states, BatchShape(1))
            if op.kind == "embed":
                row = int(one.weights)
            elif op.kind == "experts":
                experts.append(Experts.of(op))
            else:
                dense += int(one.weights)
            if one.sort in MATRICES and op.outputs[0].per_output:
                head += int(one.macs)
                head_bytes += int(one.weights)
            elif one.sort in MATRICES:
                macs += int(one.macs)
        return cls(dense, row, tuple(experts), macs, head, head_bytes, tape.states)

    def state_bytes(self, depth: int, kv: str) -> float:
        """Bytes of state for a sequence's next token, after `depth` positions."""
        return state_bytes(self.states, BatchShape(1, depth), quant_type(kv), quant_type(kv))

    def weight_bytes(self, n_tokens: int) -> float:
        """Expected bytes of weights that a step of n tokens reads."""
        return (
            self.dense_bytes
            + n_tokens * self.row_bytes
            + sum(layer.read(n_tokens) for layer in self.experts)
        )

    def decode(self, depth: int, kv: str, n_seq: int = 1) -> dict[str, float]:
        """Bytes and MACs per token, in steps of one token for each of n_seq sequences."""
        total = self.weight_bytes(n_seq) + n_seq * self.state_bytes(depth, kv)
        return {"bytes": total / n_seq, "macs": self.macs + self.head_macs}

    def prefill(self, n_tokens: int, batch: int | None = None) -> dict[str, float]:
        """Bytes and MACs per token for a prompt of n tokens in steps of `batch` (None: one step).
        Only the last token's logits are computed."""
        full, rest = divmod(n_tokens, batch or n_tokens)
        nbytes = full * self.weight_bytes(batch or n_tokens)
        nbytes += self.weight_bytes(rest) if rest else 0
        return {"bytes": nbytes / n_tokens, "macs": self.macs + self.head_macs / n_tokens}


class Limit(NamedTuple):
    """Tokens per second, and what binds: "bandwidth" or "compute"."""

    rate: float
    of: str


def limit(
    work: dict[str, float], bandwidth: float | None, compute: float | None, *, prefill: bool
) -> Limit | None:
    """The speed that the machine allows; None if the binding limit is unknown.

    bandwidth: bytes per second. compute: int8 multiply-adds per second. Without compute, decode is
    bound by bandwidth and prefill has no useful bound.
    """
    if bandwidth is None or (compute is None and prefill):
        return None
    if compute is None:
        return Limit(bandwidth / work["bytes"], "bandwidth")
    return bound(work, bandwidth, compute)


def bound(work: dict[str, float], bandwidth: float, compute: float) -> Limit:
    """`limit` where both are known."""
    reading = Limit(bandwidth / work["bytes"], "bandwidth")
    return min(reading, Limit(compute / work["macs"], "compute"))
