"""Defines every op in NumPy float32: one function per op, slow and plain.

Weights are dequantised one tensor at a time, in `experts` one expert at a time. So the memory
needed is that of the largest matrix, not of the model.

Each function takes the op, its inputs (rows, width) and the step, and returns the outputs. In the
formulas, `w` stands for dequantised weights. The sources are in docs/MODEL.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.encoders import quantize
from deskside.gguf.quants import QuantType, dequantize
from deskside.tape import Op, Tape
from deskside.tape.cache import Batch, Cache

Matrix = NDArray[np.float32]


@dataclass
class BatchStep:
    """One batch, its cache, and access to the weights: dequantised, or as the file's bytes."""

    batch: Batch
    cache: Cache
    weight: Callable[[TensorInfo], Matrix]
    matrices: Callable[[TensorInfo], NDArray[np.uint8]]

    def positions(self) -> NDArray[np.int64]:
        """The position of each token in its sequence: (tokens,)."""
        spans = [np.arange(s.pos, s.pos + s.n) for s in self.batch.segments]
        return np.concatenate(spans)


class ReferenceBackend:
    """Runs a tape with the functions of this module."""

    def __init__(self, file: GGUF, tape: Tape) -> None:
        self.file = file
        self.tape = tape

    def run(self, batch: Batch, cache: Cache, out: Matrix | None = None) -> Matrix:
        step = BatchStep(
            batch,
            cache,
            weight=self.file.dequantized,
            matrices=self.file.matrices,
        )
        values: dict[int, Matrix] = {}
        for op in self.tape.ops:
            outputs = OPS[op.kind](op, [values[v.id] for v in op.inputs], step)
            for value, output in zip(op.outputs, outputs, strict=True):
                values[value.id] = output
        logits = values[self.tape.logits.id]
        cache.advance(batch)
        if out is None:
            return logits
        out[:] = logits
        return out


def sigmoid(x: Matrix) -> Matrix:
    with np.errstate(over="ignore"):
        return np.asarray(1 / (1 + np.exp(-x)), np.float32)


def silu(x: Matrix) -> Matrix:
    return x * sigmoid(x)


def softplus(x: Matrix) -> Matrix:
    return np.logaddexp(0, x).astype(np.float32)


def embed(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = row `token` of the embedding matrix."""
    (info,) = op.weights
    rows = step.matrices(info)[0][step.batch.tokens]
    return [dequantize(rows, info.type, info.row_len)]


def rms_norm(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = w x / sqrt(mean(x^2) + eps) over groups as long as w."""
    (x,) = inputs
    w = step.weight(op.weights[0])
    groups = x.reshape(len(x), x.shape[1] // w.size, w.size)
    scale = 1 / np.sqrt((groups * groups).mean(-1, keepdims=True) + np.float32(op.number("eps")))
    return [(groups * scale * w).reshape(x.shape)]


def linear(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = W x."""
    (x,) = inputs
    w = step.weight(op.weights[0]).reshape(-1, x.shape[1])
    return [x @ w.T]


def bias(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = x + b in every row."""
    return [inputs[0] + step.weight(op.weights[0])]


def split_gate(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """Split [q | gate] of each head: all heads' q, then all heads' gates."""
    (x,) = inputs
    pairs = x.reshape(len(x), op.size("heads"), 2, op.size("head_dim"))
    return [pairs[:, :, i].reshape(len(x), -1) for i in (0, 1)]


def rope(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """Rotate the pairs of the first n_rot dimensions of each head by pos * base^(-2i / n_rot).

    Pair i is (i, i + n_rot / 2) in NeoX order, else (2i, 2i + 1).
    """
    (x,) = inputs
    n_rot = op.size("n_rot")
    half = n_rot // 2
    inv_freq = op.number("base") ** (-np.arange(half) * 2 / n_rot)
    if op.weights:
        inv_freq = inv_freq / step.weight(op.weights[0])
    angle = step.positions()[:, None] * inv_freq
    cos, sin = (f(angle).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    y = x.reshape(len(x), op.size("heads"), op.size("head_dim")).copy()
    if op.attrs["neox"]:
        a, b = y[..., :half].copy(), y[..., half:n_rot].copy()
        y[..., :half], y[..., half:n_rot] = a * cos - b * sin, a * sin + b * cos
    else:
        a, b = y[..., 0:n_rot:2].copy(), y[..., 1:n_rot:2].copy()
        y[..., 0:n_rot:2], y[..., 1:n_rot:2] = a * cos - b * sin, a * sin + b * cos
    return [y.reshape(x.shape)]


def attention(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """Append k and v to the cache, then y = softmax(scale q K^T) V.

    A token attends to positions up to its own. Query head h reads KV head h // (heads / kv_heads).
    """
    q, k, v = inputs
    heads, kv_heads, head_dim = map(op.size, ("heads", "kv_heads", "head_dim"))
    assert op.state is not None
    k_cache, v_cache = step.cache.arrays[op.state]
    out = np.empty_like(q)
    start = 0
    for seg in step.batch.segments:
        rows = slice(start, start + seg.n)
        start += seg.n
        end = seg.pos + seg.n
        keys, values = (
            _append(x[rows], array[seg.slot], t, seg.pos, kv_heads, head_dim)
            for x, array, t in ((k, k_cache, step.cache.k_type), (v, v_cache, step.cache.v_type))
        )
        future = np.arange(end)[None, :] > np.arange(seg.pos, end)[:, None]
        for h in range(heads):
            columns = slice(h * head_dim, (h + 1) * head_dim)
            kv = h // (heads // kv_heads)
            scores = (q[rows, columns] @ keys[kv].T) * np.float32(op.number("scale"))
            scores[future] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[rows, columns] = (p / p.sum(-1, keepdims=True)) @ values[kv]
    return [out]


def _append(
    x: Matrix, cache: NDArray[np.uint8], t: QuantType, pos: int, kv_heads: int, head_dim: int
) -> Matrix:
    """Store x (n, kv_heads * head_dim) at `pos`; return all positions (kv_heads, end, head_dim)."""
    n = len(x)
    per_head = np.ascontiguousarray(x.reshape(n, kv_heads, head_dim).swapaxes(0, 1))
    encoded = quantize(per_head.reshape(-1, head_dim), t)
    cache[:, pos : pos + n] = encoded.reshape(kv_heads, n, -1)
    stored = np.ascontiguousarray(cache[:, : pos + n])
    flat = dequantize(stored.reshape(-1, stored.shape[-1]), t, head_dim)
    return flat.reshape(kv_heads, pos + n, head_dim)


def conv_silu(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """Causal depthwise convolution, then SiLU: y_t = silu(sum_j w_j u_(t - kernel + 1 + j))."""
    (x,) = inputs
    w = step.weight(op.weights[0])
    kernel = op.size("kernel")
    assert op.state is not None
    (state,) = step.cache.arrays[op.state]
    out = np.empty_like(x)
    start = 0
    for seg in step.batch.segments:
        u = np.concatenate([state[seg.slot], x[start : start + seg.n]])
        taps = np.stack([u[j : j + seg.n] for j in range(kernel)], axis=-1)
        out[start : start + seg.n] = silu((taps * w).sum(-1))
        state[seg.slot] = u[seg.n :]
        start += seg.n
    return [out]


def gated_delta(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """The gated delta rule, token by token (docs/MODEL.md).

        S <- e^g S;  delta = beta (v - S^T k);  S <- S + k delta^T;  o = S^T q

    beta = sigmoid(b) and g = ssm_a softplus(a + dt_bias). q and k are scaled to length 1, then q is
    divided by sqrt(head_dim). Value head j reads key head j % k_heads.
    """
    qkv, a, b = inputs
    k_heads, v_heads, dim = map(op.size, ("k_heads", "v_heads", "head_dim"))
    ssm_a, dt_bias = (step.weight(w) for w in op.weights)
    n = len(qkv)

    def unit(x: Matrix) -> Matrix:
        length: Matrix = np.sqrt((x * x).sum(-1, keepdims=True) + np.float32(op.number("eps")))
        return x / length

    heads = qkv.reshape(n, -1, dim)
    q = unit(heads[:, :k_heads]) / np.float32(dim**0.5)
    k = unit(heads[:, k_heads : 2 * k_heads])
    v = heads[:, 2 * k_heads :]
    q, k = (np.tile(x, (1, v_heads // k_heads, 1)) for x in (q, k))
    beta = sigmoid(b)
    decay = np.exp(ssm_a * softplus(a + dt_bias))

    assert op.state is not None
    (states,) = step.cache.arrays[op.state]
    out = np.empty((n, v_heads, dim), np.float32)
    start = 0
    for seg in step.batch.segments:
        s = states[seg.slot]
        for t in range(start, start + seg.n):
            s = s * decay[t][:, None, None]
            delta = beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", s, k[t]))
            s = s + k[t][:, :, None] * delta[:, None, :]
            out[t] = np.einsum("hkv,hk->hv", s, q[t])
        states[seg.slot] = s
        start += seg.n
    return [out.reshape(n, -1)]


def gated_norm(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = rms_norm(x) * silu(z)."""
    x, z = inputs
    return [rms_norm(op, [x], step)[0] * silu(z)]


def sigmoid_gate(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = x * sigmoid(gate). A gate of width 1 scales the whole row."""
    x, gate = inputs
    return [x * sigmoid(gate)]


def swiglu(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = silu(gate) * up."""
    gate, up = inputs
    return [silu(gate) * up]


def add(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """x + y."""
    x, y = inputs
    return [x + y]


def route(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """Select the top_k experts of each token, best first, and the softmax over their logits.

    This equals a softmax over all experts, divided by the sum of the selected. Of equal logits the
    lower index wins. Ids are float32, which is exact up to 2^24.
    """
    (logits,) = inputs
    ids = np.argsort(-logits, axis=-1, kind="stable")[:, : op.size("top_k")]
    chosen = np.take_along_axis(logits, ids, -1)
    p = np.exp(chosen - chosen.max(-1, keepdims=True))
    return [ids.astype(np.float32), p / p.sum(-1, keepdims=True)]


def experts(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """y = sum over a token's experts e of p_e W_down,e (silu(W_gate,e x) * W_up,e x)."""
    x, ids, p = inputs
    out = np.zeros_like(x)
    for e in np.unique(ids).astype(int):
        token, slot = np.nonzero(ids == e)
        gate, up, down = (_expert(info, e, step) for info in op.weights)
        h = silu(x[token] @ gate.T) * (x[token] @ up.T)
        np.add.at(out, token, p[token, slot][:, None] * (h @ down.T))
    return [out]


def _expert(info: TensorInfo, e: int, step: BatchStep) -> Matrix:
    return dequantize(step.matrices(info)[e], info.type, info.row_len)


def take_rows(op: Op, inputs: list[Matrix], step: BatchStep) -> list[Matrix]:
    """Select the rows whose logits are wanted."""
    (x,) = inputs
    return [x[step.batch.outputs]]


OPS: dict[str, Callable[[Op, list[Matrix], BatchStep], list[Matrix]]] = {
    f.__name__: f
    for f in (
        embed,
        rms_norm,
        linear,
        bias,
        split_gate,
        rope,
        attention,
        conv_silu,
        gated_delta,
        gated_norm,
        sigmoid_gate,
        swiglu,
        add,
        route,
        experts,
        take_rows,
    )
}
