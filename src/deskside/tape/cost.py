"""What a model must read and multiply, and the speed that a machine's limits allow it.

Bytes are those of weights, of keys and values and of recurrent state, each once a step. MACs are
those of weight matrices; attention and the delta rule come on top, so the limit is a bound from
above. Which experts several tokens share is a matter of the model: they are counted as if every
token chose at random, which is true of random weights.
"""

from __future__ import annotations

from dataclasses import dataclass

from deskside.gguf.quants import quant_type
from deskside.tape.cache import cache_bytes
from deskside.tape.tape import State, Tape


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer."""

    nbytes: int
    used: int
    total: int

    def read(self, n_tokens: int) -> float:
        """Expected bytes that n tokens read."""
        return self.nbytes * (1 - (1 - self.used / self.total) ** n_tokens)


@dataclass(frozen=True)
class Work:
    """One model. `macs` are those of a token, `head_macs` those of a token whose logits are asked.

    The embedding table counts one row a token, unless it is the head too. Layers for multi-token
    prediction are not on the tape and not counted.
    """

    dense_bytes: int
    row_bytes: int
    experts: tuple[Experts, ...]
    macs: int
    head_macs: int
    states: tuple[State, ...]

    @classmethod
    def of(cls, tape: Tape) -> Work:
        dense = row = macs = head = 0
        experts = []
        for op in tape.ops:
            nbytes = sum(w.nbytes for w in op.weights)
            if op.kind == "embed":
                row = op.weights[0].row_bytes
            elif op.kind == "experts":
                used, total = op.inputs[1].width, op.weights[0].shape[2]
                experts.append(Experts(nbytes, used, total))
                macs += used * sum(w.row_len * w.shape[1] for w in op.weights)
            else:
                dense += nbytes
                if op.kind == "linear":
                    n = op.weights[0].row_len * op.weights[0].n_rows
                    head, macs = (head + n, macs) if op.inputs[0].per_output else (head, macs + n)
        return cls(dense, row, tuple(experts), macs, head, tape.states)

    def state_bytes(self, depth: int, kv: str) -> int:
        """Keys and values of `depth` positions, read; recurrent state, read and written."""
        kv_bytes, recurrent = cache_bytes(self.states, depth, quant_type(kv), quant_type(kv))
        return kv_bytes + 2 * recurrent

    def weight_bytes(self, n_tokens: int) -> float:
        """Expected bytes of weights that a step of n tokens reads."""
        return (
            self.dense_bytes
            + n_tokens * self.row_bytes
            + sum(layer.read(n_tokens) for layer in self.experts)
        )

    def decode(self, depth: int, kv: str, n_seq: int = 1) -> dict[str, float]:
        """Bytes and MACs a token, in steps of one token for each of n_seq sequences."""
        total = self.weight_bytes(n_seq) + n_seq * self.state_bytes(depth, kv)
        return {"bytes": total / n_seq, "macs": self.macs + self.head_macs}

    def prefill(self, n_tokens: int, batch: int | None = None) -> dict[str, float]:
        """Bytes and MACs a token, for n tokens in steps of `batch` (in one step without) and the
        logits of the last."""
        full, rest = divmod(n_tokens, batch or n_tokens)
        nbytes = full * self.weight_bytes(batch or n_tokens)
        nbytes += self.weight_bytes(rest) if rest else 0
        return {"bytes": nbytes / n_tokens, "macs": self.macs + self.head_macs / n_tokens}


def limit(
    work: dict[str, float], bandwidth: float | None, compute: float | None, *, prefill: bool
) -> float | None:
    """Tokens per second that the machine allows; None where the limit that binds is not known.

    bandwidth in bytes per second, compute in int8 multiply-adds per second. Decode is bound by
    bandwidth where compute is not known, prefill without it is not bounded usefully.
    """
    if bandwidth is None or (compute is None and prefill):
        return None
    reading = bandwidth / work["bytes"]
    return reading if compute is None else min(reading, compute / work["macs"])
