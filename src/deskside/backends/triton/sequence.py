"""Triton kernels for decode with state: the gated delta rule, and attention over a KV cache."""

import triton
import triton.language as tl

from deskside.backends.triton.decode import decode, first


@triton.jit
def _sigmoid(x):
    return 1 / (1 + tl.exp(-x))


@triton.jit
def delta_step(
    qkv_ptr,  # float32 (n, (2 k_heads + v_heads) DIM)
    a_ptr,  # float32 (n, v_heads), as b
    b_ptr,
    ssm_a_ptr,  # float32 (v_heads,), as dt_bias
    dt_bias_ptr,
    slot_ptr,  # int32 (n,): the slot of each sequence's state; all different
    state_ptr,  # float32 (slots, v_heads, DIM keys, DIM values), updated in place
    out_ptr,  # float32 (n, v_heads DIM)
    k_heads,
    v_heads,
    eps,
    DIM: tl.constexpr,
    COLUMNS: tl.constexpr,  # columns of the state per CTA; columns are independent
):
    """One token of each sequence. Grid: (DIM / COLUMNS, v_heads, n).

    The gated delta rule in one pass over the state (docs/MODEL.md). With p = S^T k and r = S^T q of
    the old S:

        delta = beta (v - e^g p),  o = e^g r + delta (k . q),  S <- e^g S + k delta^T
    """
    head = tl.program_id(1)
    token = tl.program_id(2)
    i = tl.arange(0, DIM)
    j = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    width = (2 * k_heads + v_heads) * DIM
    q_at = qkv_ptr + token * width + head % k_heads * DIM
    q = tl.load(q_at + i)
    k = tl.load(q_at + k_heads * DIM + i)
    v = tl.load(qkv_ptr + token * width + (2 * k_heads + head) * DIM + j)
    q = q / (tl.sqrt(tl.sum(q * q) + eps) * tl.sqrt(DIM * 1.0))
    k = k / tl.sqrt(tl.sum(k * k) + eps)

    beta = _sigmoid(tl.load(b_ptr + token * v_heads + head))
    z = tl.load(a_ptr + token * v_heads + head) + tl.load(dt_bias_ptr + head)
    softplus = tl.maximum(z, 0.0) + tl.log(1 + tl.exp(-tl.abs(z)))
    decay = tl.exp(tl.load(ssm_a_ptr + head) * softplus)

    slot = tl.load(slot_ptr + token).to(tl.int64)
    at = state_ptr + (slot * v_heads + head) * DIM * DIM + i[:, None] * DIM + j[None, :]
    s = tl.load(at)
    p = tl.sum(s * k[:, None], 0)
    r = tl.sum(s * q[:, None], 0)
    delta = beta * (v - decay * p)
    tl.store(at, decay * s + k[:, None] * delta[None, :])
    o = decay * r + delta * tl.sum(k * q)
    tl.store(out_ptr + (token * v_heads + head) * DIM + j, o)


@triton.jit
def attend(
    q_ptr,  # float32 (n, kv_heads GROUP DIM)
    k_ptr,  # uint8 (slots, kv_heads, n_ctx, K_BYTES)
    v_ptr,  # uint8 (slots, kv_heads, n_ctx, V_BYTES)
    slot_ptr,  # int32 (n,)
    length_ptr,  # int32 (n,): positions to attend to; the token's own is the last
    part_ptr,  # float32 (n, kv_heads, splits, GROUP, DIM): sums of e^(s - max) v
    stats_ptr,  # float32 (n, kv_heads, splits, GROUP, 2): max, sum of e^(s - max)
    kv_heads,
    n_ctx,
    scale,
    K_TYPE: tl.constexpr,
    V_TYPE: tl.constexpr,
    K_BYTES: tl.constexpr,
    V_BYTES: tl.constexpr,
    GROUP: tl.constexpr,  # query heads per KV head
    DIM: tl.constexpr,
    TILE: tl.constexpr,  # positions at once
    PRECISION: tl.constexpr,  # "f16", or tl.dot's input_precision for float32
):
    """Grid: (splits, kv_heads, n). Split i computes tiles i, i + splits, ...; `merge` joins them.

    Online softmax (https://arxiv.org/abs/1805.02867): a larger maximum rescales the sums so far.
    """
    PAIR: tl.constexpr = 16
    HEADS: tl.constexpr = max(16, triton.next_power_of_2(GROUP))  # tl.dot needs 16 rows
    split = tl.program_id(0)
    splits = tl.num_programs(0)
    kv = tl.program_id(1)
    token = tl.program_id(2)
    length = tl.load(length_ptr + token)
    cache_row = (tl.load(slot_ptr + token).to(tl.int64) * kv_heads + kv) * n_ctx

    h = tl.arange(0, HEADS)
    lane = tl.arange(0, DIM // 2)[None, :]
    d = first(lane // 16, lane % 16, PAIR)
    group = tl.arange(0, DIM // 32)[None, :, None]
    i = tl.arange(0, 16)[None, None, :]
    q = q_ptr + ((token * kv_heads + kv) * GROUP + tl.minimum(h, GROUP - 1))[:, None] * DIM + d
    q0 = tl.load(q) * scale
    q1 = tl.load(q + PAIR) * scale
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc0 = tl.zeros((HEADS, DIM // 2), tl.float32)
    acc1 = tl.zeros((HEADS, DIM // 2), tl.float32)
    for start in range(split * TILE, length, splits * TILE):
        position = start + tl.arange(0, TILE)
        # positions past the end repeat the last one, so that only written positions are read
        row = cache_row + tl.minimum(position, length - 1)[:, None, None]
        k0, k1 = decode(k_ptr + row * K_BYTES, group, i, K_TYPE)
        s = _dot(
            q0, tl.trans(k0.reshape(TILE, DIM // 2)), tl.zeros((HEADS, TILE), tl.float32), PRECISION
        )
        s = _dot(q1, tl.trans(k1.reshape(TILE, DIM // 2)), s, PRECISION)
        s = tl.where((position < length)[None, :], s, float("-inf"))
        new = tl.maximum(best, tl.max(s, 1))
        shrink = tl.exp(best - new)
        p = tl.exp(s - new[:, None])
        total = total * shrink + tl.sum(p, 1)
        v0, v1 = decode(v_ptr + row * V_BYTES, group, i, V_TYPE)
        acc0 = _dot(p, v0.reshape(TILE, DIM // 2), acc0 * shrink[:, None], PRECISION)
        acc1 = _dot(p, v1.reshape(TILE, DIM // 2), acc1 * shrink[:, None], PRECISION)
        best = new

    part = ((token * kv_heads + kv) * splits + split) * GROUP + h
    live = h < GROUP
    at = part_ptr + part[:, None] * DIM + d
    tl.store(at, acc0, live[:, None])
    tl.store(at + PAIR, acc1, live[:, None])
    tl.store(stats_ptr + part * 2, best, live)
    tl.store(stats_ptr + part * 2 + 1, total, live)


@triton.jit
def merge(
    part_ptr,  # as in attend
    stats_ptr,
    out_ptr,  # float32 (n, kv_heads GROUP DIM)
    splits,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    SPLITS: tl.constexpr,  # splits, rounded up to a power of 2
):
    """Grid: (GROUP, n kv_heads). A split without positions has max -inf, so its weight is 0."""
    h = tl.program_id(0)
    head = tl.program_id(1)
    i = tl.arange(0, SPLITS)
    d = tl.arange(0, DIM)
    part = (head * splits + i) * GROUP + h
    live = i < splits
    best = tl.load(stats_ptr + part * 2, live, float("-inf"))
    weight = tl.exp(best - tl.max(best))
    total = tl.sum(weight * tl.load(stats_ptr + part * 2 + 1, live, 0.0))
    acc = tl.load(part_ptr + part[:, None] * DIM + d[None, :], live[:, None], 0.0)
    out = tl.sum(acc * weight[:, None], 0) / total
    tl.store(out_ptr + (head * GROUP + h) * DIM + d, out)


@triton.jit
def _dot(x, y, acc, PRECISION: tl.constexpr):
    """acc + x y."""
    if PRECISION == "f16":
        return tl.dot(x.to(tl.float16), y.to(tl.float16), acc)
    else:
        return tl.dot(x, y, acc, input_precision=PRECISION)
