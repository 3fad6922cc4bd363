"""The tape: a model's forward pass as a list of ops, recorded once and read by every other part.

A model file calls the methods of `TapeBuilder`. Each call appends one `Op` and returns the `Value`
that the op makes. A value is a float32 matrix (rows, width). The number of rows is not on the tape,
so one tape serves decode, batched decode and prefill. Values before `take_rows` have one row per
token of the batch. Values after it have one row per requested output.

Ops and the order of their `weights` (shapes in ggml order, fastest dimension first):

| kind         | inputs        | weights                      | attrs                              |
|--------------|---------------|------------------------------|------------------------------------|
| embed        | token ids     | (D, vocab)                   |                                    |
| rms_norm     | x             | (g,), rows split in groups g | eps                                |
| linear       | x             | (n_in, n_out)                |                                    |
| bias         | x             | (n,), added to every row     |                                    |
| split_gate   | x             |                              | heads, head_dim                    |
| rope         | x             | optional (n_rot/2,) factors  | heads, head_dim, n_rot, base, neox |
| attention    | q, k, v       |                              | heads, kv_heads, head_dim, scale   |
| conv_silu    | x             | (kernel, width)              | kernel                             |
| gated_delta  | qkv, a, b     | ssm_a (n_v,), dt_bias (n_v,) | k_heads, v_heads, head_dim, eps    |
| gated_norm   | x, z          | (g,)                         | eps                                |
| sigmoid_gate | x, g          |                              |                                    |
| swiglu       | gate, up      |                              |                                    |
| add          | x, y          |                              |                                    |
| route        | logits        |                              | top_k                              |
| experts      | x, ids, w     | gate, up, down (.., .., E)   |                                    |
| take_rows    | x             |                              |                                    |

`backends/reference.py` defines what each op computes. A backend may overwrite the inputs of
`gated_delta`: nothing else reads them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field

from deskside.gguf import TensorInfo

Attrs = Mapping[str, int | float]


@dataclass(frozen=True)
class Value:
    """A float32 matrix (rows, width) made by an op; `per_output` values have output rows."""

    id: int
    width: int
    per_output: bool = False


@dataclass(frozen=True)
class KVState:
    """Keys and values of one attention layer: per sequence (kv_heads, positions, head_dim)."""

    layer: int
    kv_heads: int
    head_dim: int


@dataclass(frozen=True)
class ConvState:
    """The last `kernel - 1` inputs of a causal convolution: per sequence (kernel - 1, width)."""

    layer: int
    width: int
    kernel: int


@dataclass(frozen=True)
class DeltaState:
    """The delta rule's matrices: per sequence (v_heads, head_dim keys, head_dim values)."""

    layer: int
    v_heads: int
    head_dim: int


State = KVState | ConvState | DeltaState


@dataclass(frozen=True)
class Op:
    """One step of the tape. index: its place there; ops that stand for others have further ones.
    state: its index in `Tape.states`; None for an op without state."""

    index: int
    kind: str
    layer: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    weights: tuple[TensorInfo, ...] = ()
    attrs: Attrs = field(default_factory=dict)
    state: int | None = None

    def size(self, name: str) -> int:
        """An attribute that is a whole number."""
        return int(self.attrs[name])

    def number(self, name: str) -> float:
        """An attribute that is any number."""
        return float(self.attrs[name])


@dataclass(frozen=True)
class Tape:
    """A recorded forward pass: token ids in, `logits` out. notes: what of a file it leaves out."""

    ops: tuple[Op, ...]
    states: tuple[State, ...]
    logits: Value
    n_vocab: int
    n_ctx_train: int
    notes: tuple[str, ...] = ()

    def weights(self) -> dict[str, TensorInfo]:
        """Every tensor that the tape reads, by name."""
        return {w.name: w for op in self.ops for w in op.weights}


class TapeBuilder:
    """Records ops: one method per op. Each returns the value that the op makes."""

    def __init__(self) -> None:
        self.ops: list[Op] = []
        self.states: list[State] = []
        self._layer = -1
        self._n_values = 0

    @contextmanager
    def layer(self, i: int) -> Iterator[None]:
        """Ops recorded inside belong to layer `i`."""
        self._layer = i
        try:
            yield
        finally:
            self._layer = -1

    def finish(self, logits: Value, n_ctx_train: int) -> Tape:
        return Tape(tuple(self.ops), tuple(self.states), logits, logits.width, n_ctx_train)

    def embed(self, w: TensorInfo) -> Value:
        return self._op("embed", (), w.shape[0], (w,))

    def rms_norm(self, x: Value, w: TensorInfo, eps: float) -> Value:
        return self._op("rms_norm", (x,), x.width, (w,), {"eps": eps})

    def linear(self, x: Value, w: TensorInfo, bias: TensorInfo | None = None) -> Value:
        """W x, or W x + bias: two ops."""
        y = self._op("linear", (x,), w.n_rows, (w,))
        return y if bias is None else self._op("bias", (y,), y.width, (bias,))

    def split_gate(self, x: Value, heads: int, head_dim: int) -> tuple[Value, Value]:
        width = heads * head_dim
        outs = (self._value(width, x.per_output), self._value(width, x.per_output))
        attrs = {"heads": heads, "head_dim": head_dim}
        self._record("split_gate", (x,), outs, attrs=attrs)
        return outs

    def rope(
        self,
        x: Value,
        *,
        heads: int,
        head_dim: int,
        n_rot: int,
        base: float,
        neox: bool,
        factors: TensorInfo | None = None,
    ) -> Value:
        attrs = {
            "heads": heads,
            "head_dim": head_dim,
            "n_rot": n_rot,
            "base": base,
            "neox": int(neox),
        }
        return self._op("rope", (x,), x.width, (factors,) if factors else (), attrs)

    def attention(
        self, q: Value, k: Value, v: Value, *, heads: int, kv_heads: int, head_dim: int
    ) -> Value:
        attrs = {
            "heads": heads,
            "kv_heads": kv_heads,
            "head_dim": head_dim,
            "scale": head_dim**-0.5,
        }
        state = self._state(KVState(self._layer, kv_heads, head_dim))
        return self._op("attention", (q, k, v), heads * head_dim, (), attrs, state)

    def conv_silu(self, x: Value, w: TensorInfo) -> Value:
        kernel = w.shape[0]
        state = self._state(ConvState(self._layer, x.width, kernel))
        return self._op("conv_silu", (x,), x.width, (w,), {"kernel": kernel}, state)

    def gated_delta(
        self,
        qkv: Value,
        a: Value,
        b: Value,
        ssm_a: TensorInfo,
        dt_bias: TensorInfo,
        *,
        k_heads: int,
        v_heads: int,
        head_dim: int,
        eps: float,
    ) -> Value:
        attrs = {"k_heads": k_heads, "v_heads": v_heads, "head_dim": head_dim, "eps": eps}
        state = self._state(DeltaState(self._layer, v_heads, head_dim))
        weights = (ssm_a, dt_bias)
        return self._op("gated_delta", (qkv, a, b), v_heads * head_dim, weights, attrs, state)

    def gated_norm(self, x: Value, z: Value, w: TensorInfo, eps: float) -> Value:
        return self._op("gated_norm", (x, z), x.width, (w,), {"eps": eps})

    def sigmoid_gate(self, x: Value, gate: Value) -> Value:
        return self._op("sigmoid_gate", (x, gate), x.width)

    def swiglu(self, gate: Value, up: Value) -> Value:
        return self._op("swiglu", (gate, up), gate.width)

    def add(self, x: Value, y: Value) -> Value:
        return self._op("add", (x, y), x.width)

    def route(self, logits: Value, top_k: int) -> tuple[Value, Value]:
        outs = (self._value(top_k, False), self._value(top_k, False))
        self._record("route", (logits,), outs, attrs={"top_k": top_k})
        return outs

    def experts(
        self,
        x: Value,
        ids: Value,
        weights: Value,
        gate: TensorInfo,
        up: TensorInfo,
        down: TensorInfo,
    ) -> Value:
        return self._op("experts", (x, ids, weights), x.width, (gate, up, down))

    def take_rows(self, x: Value) -> Value:
        out = self._value(x.width, True)
        self._record("take_rows", (x,), (out,))
        return out

    def _op(
        self,
        kind: str,
        inputs: tuple[Value, ...],
        width: int,
        weights: tuple[TensorInfo, ...] = (),
        attrs: Attrs | None = None,
        state: int | None = None,
    ) -> Value:
        out = self._value(width, bool(inputs) and inputs[0].per_output)
        self._record(kind, inputs, (out,), weights, attrs, state)
        return out

    def _record(
        self,
        kind: str,
        inputs: tuple[Value, ...],
        outputs: tuple[Value, ...],
        weights: tuple[TensorInfo, ...] = (),
        attrs: Attrs | None = None,
        state: int | None = None,
    ) -> None:
        index = len(self.ops)
        self.ops.append(Op(index, kind, self._layer, inputs, outputs, weights, attrs or {}, state))

    def _value(self, width: int, per_output: bool) -> Value:
        self._n_values += 1
        return Value(self._n_values - 1, width, per_output)

    def _state(self, state: State) -> int:
        self.states.append(state)
        return len(self.states) - 1
