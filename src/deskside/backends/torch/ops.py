"""Computes every op in torch, in float32, on any device. `backends/reference.py` defines the ops.

Weights stay the file's bytes. They are decoded where they are used, in pieces of bounded size. If
the device has a kernel that reads the bytes themselves, it is used instead (`kernels.py`).
Activations for quantised weights are rounded to 8 bits per block of 32, as on the CPU. So devices
differ only in the order of their sums.

If each sequence has one token, ops read the batch from `BatchTensors`. All shapes then follow from
the number of sequences, the number of wanted logits, and the bucket of positions. Nothing waits for
the device, so `graph.py` can capture the step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from deskside.backends.torch.kernels import NONE, Kernels
from deskside.backends.torch.quants import decode_cached, dequantize, encode_cached, round_to_8_bits
from deskside.gguf import TensorInfo
from deskside.gguf.quants import FLOAT_TYPES, QuantType
from deskside.lowering.scratch import FEW_PAIRS, PIECE
from deskside.tape import Op
from deskside.tape.cache import Batch

DELTA_BLOCK = 64  # tokens that the delta rule computes at once
MIN_BUCKET = 256  # positions; see `BatchTensors.bucket`


@dataclass(frozen=True)
class BatchTensors:
    """A batch on the device, int32.

    bucket: if each sequence has one token, a power of 2 of at least MIN_BUCKET that no sequence's
    length exceeds; else 0.
    """

    tokens: Tensor  # (n,): ids
    slots: Tensor  # (n,): the slot of each token's sequence
    positions: Tensor  # (n,): the position of each token
    outputs: Tensor  # (wanted logits,): their rows
    bucket: int

    @staticmethod
    def packed(batch: Batch) -> Tensor:
        """All four tensors in one array on the host, int32 (3 n + wanted logits,)."""
        slots = [np.full(s.n, s.slot, np.int32) for s in batch.segments]
        positions = [np.arange(s.pos, s.pos + s.n, dtype=np.int32) for s in batch.segments]
        parts = [batch.tokens, *slots, *positions, batch.outputs]
        return torch.from_numpy(np.concatenate(parts).astype(np.int32))

    @staticmethod
    def of(batch: Batch, packed: Tensor) -> BatchTensors:
        """Views of `packed`, which may be on any device."""
        n = len(batch.tokens)
        tokens, slots, positions, outputs = packed.split([n, n, n, len(batch.outputs)])
        return BatchTensors(tokens, slots, positions, outputs, bucket_of(batch))


def bucket_of(batch: Batch) -> int:
    """See `BatchTensors.bucket`."""
    if any(s.n != 1 for s in batch.segments):
        return 0
    longest = 1 + max(s.pos for s in batch.segments)
    return max(MIN_BUCKET, 1 << (longest - 1).bit_length())


@dataclass
class TorchStep:
    """One batch on one device.

    states: by index, the arrays of the device's states, in the layouts of `tape/cache.py`.
    weights: by name, the file's bytes, uint8 (n_rows, row_bytes).
    """

    batch: Batch
    device: torch.device
    weights: Mapping[str, Tensor]
    states: Mapping[int, tuple[Tensor, ...]]
    k_type: QuantType
    v_type: QuantType
    kernels: Kernels = NONE
    offload: Any = None  # `expert_ops.Offloads`: experts that the device computes for the host
    _rotations: dict[tuple[object, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)

    @cached_property
    def tensors(self) -> BatchTensors:
        """The batch's tensors on the device."""
        return BatchTensors.of(self.batch, BatchTensors.packed(self.batch).to(self.device))

    def floats(self, info: TensorInfo) -> Tensor:
        """A small tensor in float32, in NumPy's order of dimensions."""
        data = self.weights[info.name]
        return dequantize(data, info.type, info.row_len).reshape(info.shape[::-1])

    def rotation(self, op: Op) -> tuple[Tensor, Tensor]:
        """Cosines and sines of a rope: (tokens, 1, n_rot / 2) each. Layers with equal ropes share
        them."""
        key = (op.attrs["n_rot"], op.attrs["base"], *(w.name for w in op.weights))
        if key not in self._rotations:
            n_rot = op.size("n_rot")
            exponent = -torch.arange(n_rot // 2, dtype=torch.float64, device=self.device)
            inv_freq = op.number("base") ** (exponent * 2 / n_rot)
            if op.weights:
                inv_freq = inv_freq / self.floats(op.weights[0])
            angle = self.tensors.positions[:, None, None] * inv_freq
            self._rotations[key] = (angle.cos().float(), angle.sin().float())
        return self._rotations[key]


def rounded(x: Tensor, t: QuantType) -> Tensor:
    """The activations as weights of type t multiply them: rounded to 8 bits if t is quantised."""
    return x if t.name in FLOAT_TYPES else round_to_8_bits(x)


def multiply(x: Tensor, w: Tensor, info: TensorInfo, kernels: Kernels) -> Tensor:
    """x w^T: float32 (m, n_in), already rounded, by uint8 (rows, row_bytes) -> (m, rows)."""
    if kernels.matmul is not None and kernels.takes(w, info):
        return kernels.matmul(x, w, info)
    out = x.new_empty(len(x), len(w))
    step = max(1, PIECE // (4 * info.row_len))
    for i in range(0, len(w), step):
        piece = dequantize(w[i : i + step], info.type, info.row_len)
        torch.mm(x, piece.T, out=out[:, i : i + step])
    return out


def embed(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (info,) = op.weights
    rows = step.weights[info.name][step.tensors.tokens]
    return [dequantize(rows, info.type, info.row_len)]


def rms_norm(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (x,) = inputs
    w = step.floats(op.weights[0])
    groups = x.reshape(len(x), x.shape[1] // w.numel(), w.numel())
    scale = torch.rsqrt((groups * groups).mean(-1, keepdim=True) + op.attrs["eps"])
    return [(groups * scale * w).reshape(x.shape)]


def linear(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (x,) = inputs
    (info,) = op.weights
    return [multiply(rounded(x, info.type), step.weights[info.name], info, step.kernels)]


def bias(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    return [inputs[0] + step.floats(op.weights[0])]


def split_gate(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (x,) = inputs
    pairs = x.reshape(len(x), op.size("heads"), 2, op.size("head_dim"))
    return [pairs[:, :, i].reshape(len(x), -1) for i in (0, 1)]


def rope(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (x,) = inputs
    n_rot = op.size("n_rot")
    cos, sin = step.rotation(op)
    y = x.reshape(len(x), op.size("heads"), op.size("head_dim")).clone()
    first, second = (
        (slice(0, n_rot // 2), slice(n_rot // 2, n_rot))
        if op.attrs["neox"]
        else (slice(0, n_rot, 2), slice(1, n_rot, 2))
    )
    a, b = y[..., first].clone(), y[..., second].clone()
    y[..., first] = a * cos - b * sin
    y[..., second] = a * sin + b * cos
    return [y.reshape(x.shape)]


def attention(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    q, k, v = inputs
    heads, kv_heads, dim = map(op.size, ("heads", "kv_heads", "head_dim"))
    assert op.state is not None
    k_cache, v_cache = step.states[op.state]
    if step.tensors.bucket:
        return [_attend_tokens(op, q, k, v, step)]
    out = torch.empty_like(q)
    start = 0
    for seg in step.batch.segments:
        rows = slice(start, start + seg.n)
        start += seg.n
        for x, cache, t in ((k, k_cache, step.k_type), (v, v_cache, step.v_type)):
            per_head = x[rows].reshape(seg.n, kv_heads, dim).transpose(0, 1)
            cache[seg.slot, :, seg.pos : seg.pos + seg.n] = encode_cached(per_head, t.name)
        # (kv_heads, tokens * heads of a group, dim): queries of the same keys are in one matrix
        queries = q[rows].reshape(seg.n, kv_heads, heads // kv_heads, dim).transpose(0, 1)
        result = _attend(
            queries.reshape(kv_heads, -1, dim) * op.attrs["scale"],
            (k_cache[seg.slot], step.k_type.name),
            (v_cache[seg.slot], step.v_type.name),
            seg.pos,
            seg.n,
        )
        grouped = result.reshape(kv_heads, seg.n, heads // kv_heads, dim).transpose(0, 1)
        out[rows] = grouped.reshape(seg.n, -1)
    return [out]


def _attend_tokens(op: Op, q: Tensor, k: Tensor, v: Tensor, step: TorchStep) -> Tensor:
    """Attention if each of n sequences has one token: (n, heads * dim), like q."""
    kv_heads, dim = op.size("kv_heads"), op.size("head_dim")
    assert op.state is not None
    caches, types = step.states[op.state], (step.k_type.name, step.v_type.name)
    tensors, n = step.tensors, len(q)
    for x, cache, t in zip((k, v), caches, types, strict=True):
        cache[tensors.slots, :, tensors.positions] = encode_cached(x.reshape(n, kv_heads, dim), t)
    bucket = min(tensors.bucket, caches[0].shape[2])
    kernels, names = step.kernels, (types[0].lower(), types[1].lower())
    if kernels.attention is not None and kernels.takes_attention(*names, dim):
        return kernels.attention(
            q.contiguous(),
            *caches,
            tensors.slots,
            tensors.positions + 1,
            k_type=names[0],
            v_type=names[1],
            dim=dim,
            scale=op.number("scale"),
            splits=kernels.splits(bucket),
        )
    grouped = q.reshape(n, kv_heads, -1, dim) * op.attrs["scale"]
    return _attend_bucket(grouped, caches, types, tensors, bucket).reshape(q.shape)


def _attend_bucket(
    q: Tensor,
    caches: tuple[Tensor, ...],
    types: tuple[str, str],
    tensors: BatchTensors,
    bucket: int,
) -> Tensor:
    """Softmax attention of q (n, kv_heads, group, dim), one token per sequence: the shape of q.

    All `bucket` positions are computed, and those past a token's own are masked. It runs in pieces,
    as `_attend`. Each token sees position 0, so after the first piece every maximum is finite.
    """
    n, kv_heads, group, dim = q.shape
    size = max(64, PIECE // (4 * n * kv_heads * (group + 2 * dim)))
    top = q.new_full((n, kv_heads, group, 1), -torch.inf)
    total, acc = torch.zeros_like(top), torch.zeros_like(q)
    for a in range(0, bucket, size):
        b = min(a + size, bucket)
        past = torch.arange(a, b, device=q.device) > tensors.positions[:, None]
        keys, values = (
            decode_cached(cache[:, :, a:b].index_select(0, tensors.slots), t)
            for cache, t in zip(caches, types, strict=True)
        )
        scores = q @ keys.transpose(2, 3)
        scores.masked_fill_(past[:, None, None, :], -torch.inf)
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        p = scores.sub_(new).exp_()
        kept = (top - new).exp()
        total = total * kept + p.sum(-1, keepdim=True)
        # Past the end the cache may hold any bits, and 0 * NaN is NaN: set those values to 0.
        acc = acc * kept + p @ values.masked_fill_(past[:, None, :, None], 0)
        top = new
    return acc / total


def _attend(
    q: Tensor, keys: tuple[Tensor, str], values: tuple[Tensor, str], pos: int, n: int
) -> Tensor:
    """Softmax attention of q (kv_heads, n * group, dim), n tokens from position `pos` on.

    It runs over pieces of positions. Each piece rescales the sums of the earlier ones to the new
    maximum (online softmax, https://arxiv.org/abs/1805.02867).
    """
    heads, rows, dim = q.shape
    end = pos + n
    own = torch.arange(pos, end, device=q.device).repeat_interleave(rows // n)
    size = max(64, PIECE // (4 * heads * (rows + 2 * dim)))
    top = q.new_full((heads, rows, 1), -torch.inf)
    total, acc = torch.zeros_like(top), torch.zeros_like(q)
    for a in range(0, end, size):
        b = min(a + size, end)
        scores = q @ decode_cached(keys[0][:, a:b], keys[1]).transpose(1, 2)
        if b > pos + 1:
            future = torch.arange(a, b, device=q.device) > own[:, None]
            scores.masked_fill_(future, -torch.inf)
        new = torch.maximum(top, scores.amax(-1, keepdim=True))
        p = scores.sub_(new).exp_()
        kept = (top - new).exp()
        total = total * kept + p.sum(-1, keepdim=True)
        acc = acc * kept + p @ decode_cached(values[0][:, a:b], values[1])
        top = new
    return acc / total


def conv_silu(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (x,) = inputs
    w = step.floats(op.weights[0])
    kernel = op.size("kernel")
    assert op.state is not None
    (state,) = step.states[op.state]
    if step.tensors.bucket:
        u = torch.cat([state[step.tensors.slots], x[:, None]], 1)
        y = u[:, 0] * w[:, 0]
        for j in range(1, kernel):
            y += u[:, j] * w[:, j]
        state[step.tensors.slots] = u[:, 1:]
        return [torch.nn.functional.silu(y)]
    out = torch.empty_like(x)
    start = 0
    for seg in step.batch.segments:
        u = torch.cat([state[seg.slot], x[start : start + seg.n]])
        y = u[: seg.n] * w[:, 0]
        for j in range(1, kernel):
            y += u[j : j + seg.n] * w[:, j]
        out[start : start + seg.n] = torch.nn.functional.silu(y)
        state[seg.slot] = u[seg.n :]
        start += seg.n
    return [out]


def gated_delta(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    qkv, a, b = inputs
    k_heads, v_heads, dim = map(op.size, ("k_heads", "v_heads", "head_dim"))
    ssm_a, dt_bias = (step.floats(w) for w in op.weights)
    n = len(qkv)
    assert op.state is not None
    (states,) = step.states[op.state]
    kernel = step.kernels.delta_step
    if step.tensors.bucket and kernel is not None and step.kernels.takes_delta(dim):
        given = (qkv.contiguous(), a.contiguous(), b.contiguous(), ssm_a, dt_bias)
        eps = op.number("eps")
        return [kernel(*given, states, step.tensors.slots, k_heads=k_heads, eps=eps)]

    def unit(x: Tensor) -> Tensor:
        length = ((x * x).sum(-1, keepdim=True) + op.attrs["eps"]).sqrt()
        return (x / length).repeat(1, v_heads // k_heads, 1).transpose(0, 1)

    heads = qkv.reshape(n, -1, dim)
    q = unit(heads[:, :k_heads]) / dim**0.5
    k = unit(heads[:, k_heads : 2 * k_heads])
    v = heads[:, 2 * k_heads :].transpose(0, 1)
    beta = b.sigmoid().T
    g = (ssm_a * torch.nn.functional.softplus(a + dt_bias, threshold=50)).T

    if step.tensors.bucket:
        tokens = [
            delta_token(q[:, i], k[:, i], v[:, i], g[:, i], beta[:, i], states, slot)
            for i, slot in enumerate(step.tensors.slots.split(1))
        ]
        return [torch.stack(tokens).reshape(n, -1)]
    out = torch.empty_like(v)
    start = 0
    for seg in step.batch.segments:
        s = states[seg.slot]
        end = start + seg.n
        for i in range(start, end, DELTA_BLOCK):
            t = slice(i, min(i + DELTA_BLOCK, end))
            out[:, t], s = delta_block(q[:, t], k[:, t], v[:, t], g[:, t], beta[:, t], s)
        states[seg.slot] = s
        start = end
    return [out.transpose(0, 1).reshape(n, -1)]


def delta_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, slot: Tensor
) -> Tensor:
    """The delta rule for one token of the sequence in `slot` (1,). Its state changes in place.

    q, k, v (heads, dim), log decay g and beta (heads,) -> (heads, dim).
    """
    s = states.index_select(0, slot)[0].mul_(g.exp()[:, None, None])
    d = beta[:, None] * (v - (k[:, None] @ s)[:, 0])
    s.baddbmm_(k[:, :, None], d[:, None])
    states[slot] = s[None]
    return (q[:, None] @ s)[:, 0]


def delta_block(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, s: Tensor
) -> tuple[Tensor, Tensor]:
    """The delta rule over a block of n tokens at once (docs/MODEL.md).

    q, k, v (heads, n, dim), log decay g and beta (heads, n), state s (heads, dim keys, dim values)
    -> outputs (heads, n, dim), the new state.

    The rule for token t is

        S_t = e^g_t S_(t-1) + k_t d_t^T,  d_t = beta_t (v_t - (e^g_t S_(t-1))^T k_t)

    Let G_t be the sum of g up to t. Unrolling S_t from the state S_0 gives

        S_t = e^G_t S_0 + sum_(j<=t) e^(G_t - G_j) k_j d_j^T

    Put into d_t, this is a triangular system for all d:

        (1 + L) D = beta (V - e^G K S_0),  L_tj = beta_t e^(G_t - G_j) k_t.k_j for j < t

    Since g <= 0, no exponent is positive.
    """
    total = g.cumsum(-1)
    n = g.shape[-1]
    late = torch.ones(n, n, dtype=torch.bool, device=g.device).triu(1)
    decay = (total[:, :, None] - total[:, None, :]).masked_fill(late, -torch.inf).exp()
    from_start = total.exp()[:, :, None]
    system = (beta[:, :, None] * decay * (k @ k.transpose(1, 2))).tril(-1)
    right = beta[:, :, None] * (v - from_start * (k @ s))
    # unitriangular: torch takes the diagonal as 1
    d = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    out = from_start * (q @ s) + (decay * (q @ k.transpose(1, 2))) @ d
    to_end = (total[:, -1:] - total).exp()[:, :, None]
    return out, from_start[:, -1:] * s + (k * to_end).transpose(1, 2) @ d


def gated_norm(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    x, z = inputs
    return [rms_norm(op, [x], step)[0] * torch.nn.functional.silu(z)]


def sigmoid_gate(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    x, gate = inputs
    return [x * gate.sigmoid()]


def swiglu(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    gate, up = inputs
    return [torch.nn.functional.silu(gate) * up]


def add(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    x, y = inputs
    return [x + y]


def route(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """See `reference.route`. The sort is stable, so of equal logits the lower index wins."""
    (logits,) = inputs
    values, ids = logits.sort(dim=-1, descending=True, stable=True)
    top_k = op.size("top_k")
    return [ids[:, :top_k].to(torch.float32), values[:, :top_k].softmax(-1)]


def experts(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    x, ids, p = inputs
    gate, up, down = op.weights
    w_gate, w_up = step.weights[gate.name], step.weights[up.name]
    kernels = step.kernels
    both = kernels.takes(w_gate, gate) and kernels.takes(w_up, up)
    if kernels.pairs is not None and gate.type == up.type and both:
        h = kernels.pairs(rounded(x, gate.type), w_gate, gate, ids, w_up)
        return [_sum_experts(h.reshape(len(x), -1), ids, p, down, step)]
    h = torch.nn.functional.silu(_per_pair(x, ids, gate, step)) * _per_pair(x, ids, up, step)
    return [_sum_experts(h, ids, p, down, step)]


def expert_linear(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """One matrix of the experts: (tokens, top_k * rows). For matrices on different devices."""
    x, ids = inputs
    return [_per_pair(x, ids, op.weights[0], step)]


def expert_sum(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """The last matrix of the experts, summed over a token's experts: (tokens, rows)."""
    h, ids, p = inputs
    return [_sum_experts(h, ids, p, op.weights[0], step)]


def _per_pair(x: Tensor, ids: Tensor, info: TensorInfo, step: TorchStep) -> Tensor:
    """W_e x for each token and each of its experts: (tokens, top_k * rows)."""
    n, top_k = ids.shape
    rows = info.shape[1]
    w = step.weights[info.name]
    x = rounded(x, info.type)
    if step.kernels.pairs is not None and step.kernels.takes(w, info):
        return step.kernels.pairs(x, w, info, ids, None).reshape(n, -1)
    if n * top_k <= FEW_PAIRS:
        per_pair = x.repeat_interleave(top_k, dim=0)
        matrices = w.reshape(-1, rows, w.shape[-1])
        return gathered(per_pair, ids.reshape(-1).long(), matrices, info).reshape(n, -1)
    matrices, out = w.reshape(-1, rows, w.shape[-1]), x.new_empty(n, top_k, rows)
    for e, token, slot in by_expert(ids):
        out[token, slot] = multiply(x[token], matrices[e], info, step.kernels)
    return out.reshape(n, -1)


def _sum_experts(h: Tensor, ids: Tensor, p: Tensor, info: TensorInfo, step: TorchStep) -> Tensor:
    """Sum over a token's experts of p_e W_e h_e: h (tokens, top_k * width) -> (tokens, rows)."""
    n, top_k = ids.shape
    rows = info.shape[1]
    w = step.weights[info.name]
    h = rounded(h.reshape(n * top_k, info.row_len), info.type)
    if step.kernels.pairs is not None and step.kernels.takes(w, info):
        y = step.kernels.pairs(h, w, info, ids, None).reshape(n, top_k, rows)
        return (p[:, :, None] * y).sum(1)
    if n * top_k <= FEW_PAIRS:
        matrices = w.reshape(-1, rows, w.shape[-1])
        y = gathered(h, ids.reshape(-1).long(), matrices, info).reshape(n, top_k, rows)
        return (p[:, :, None] * y).sum(1)
    h = h.reshape(n, top_k, info.row_len)
    matrices, out = w.reshape(-1, rows, w.shape[-1]), h.new_zeros(n, rows)
    for e, token, slot in by_expert(ids):
        y = multiply(h[token, slot], matrices[e], info, step.kernels)
        # a token has an expert at most once, so its sum runs by ascending id of the experts
        out[token] += p[token, slot][:, None] * y
    return out


def by_expert(ids: Tensor) -> list[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots in top_k) of every selected expert, by ascending id.

    ids: float32 (tokens, top_k). Ids below 0 are left out. It waits for the device.
    """
    order = ids.reshape(-1).sort(stable=True).indices
    chosen, counts = ids.long().cpu().unique(return_counts=True)
    parts = order.split(counts.tolist())
    top_k = ids.shape[1]
    found = zip(chosen.tolist(), parts, strict=True)
    return [(e, i // top_k, i % top_k) for e, i in found if e >= 0]


def gathered(x: Tensor, ids: Tensor, matrices: Tensor, info: TensorInfo) -> Tensor:
    """Row i of x, already rounded, times matrix ids[i]: (pairs, rows).

    matrices: uint8 (n, rows, row_bytes). It does not wait for the device.
    """
    rows, pairs = info.shape[1], len(ids)
    out = x.new_empty(pairs, rows)
    step = max(1, PIECE // (4 * info.row_len * pairs))
    for i in range(0, rows, step):
        piece = matrices[:, i : i + step][ids]
        decoded = dequantize(piece.reshape(-1, matrices.shape[2]), info.type, info.row_len)
        decoded = decoded.reshape(pairs, -1, info.row_len)
        out[:, i : i + step] = (decoded @ x[:, :, None])[:, :, 0]
    return out


def take_rows(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    (x,) = inputs
    return [x[step.tensors.outputs]]


OPS: dict[str, Callable[[Op, list[Tensor], TorchStep], list[Tensor]]] = {
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
        expert_linear,
        expert_sum,
        take_rows,
    )
}
