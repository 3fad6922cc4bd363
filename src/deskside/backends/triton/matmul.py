"""Triton kernels: activations times quantised weights, dequantised in registers.

`matvec` is for few rows of activations, where reading w is the only cost. Every CTA reads some rows
of w once, and multiplies in float32 without tensor cores. `matmul` is for many rows. It dequantises
a tile of w once for BLOCK_M rows of activations, and multiplies on tensor cores, which sum in
float32.

Both have two options. GROUPED: each row of activations, a *pair* of token and selected expert, has
its own matrix. FUSED: two matrices have the same input, and y = silu(gate) * up.

Rows past `n_out` repeat the last row and are not stored. Pointers to weights are uint8, aligned to
4 bytes, without padding between rows or experts.
"""

import triton
import triton.language as tl

from deskside.backends.triton.decode import decode, first


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))


@triton.jit
def matvec(
    x_ptr,  # float32 (rows, N_IN)
    w_ptr,  # uint8 (experts, n_out, ROW_BYTES); the gate if FUSED
    up_ptr,  # as w_ptr if FUSED, else not read
    expert_ptr,  # int32 (pairs,): each pair's expert if GROUPED, else not read
    y_ptr,  # float32 (rows or pairs, n_out)
    n_rows,
    n_out,
    n_experts,
    TYPE: tl.constexpr,
    PAIR: tl.constexpr,
    N_IN: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    ROWS: tl.constexpr,  # rows of x at once, a power of 2; 1 if GROUPED
    SHARE: tl.constexpr,  # pairs that read one row of x, if GROUPED
    GROUPED: tl.constexpr,
    FUSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,  # groups at once
):
    """Grid: (n_out / BLOCK_N, pairs or 1). Each lane has its own sum until the end.

    A pair without a valid expert, 0 to n_experts - 1, gives NaN and reads no weight.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :, None, None]
    offset = tl.minimum(n, n_out - 1).to(tl.int64) * ROW_BYTES
    pair = tl.program_id(1)
    m = tl.arange(0, ROWS)[:, None, None, None]
    x_row = tl.minimum(m, n_rows - 1)
    if GROUPED:
        expert = tl.load(expert_ptr + pair).to(tl.int64)
        if (expert < 0) | (expert >= n_experts):
            no = tl.full((ROWS, BLOCK_N, 1, 1), float("nan"), tl.float32)
            tl.store(y_ptr + (pair + m).to(tl.int64) * n_out + n, no, (m < 1) & (n < n_out))
            return
        offset += expert * n_out * ROW_BYTES
        x_row = m + pair // SHARE
    w = w_ptr + offset
    if FUSED:
        up = up_ptr + offset
    x = x_ptr + x_row.to(tl.int64) * N_IN
    i = tl.arange(0, 16)[None, None, None, :]
    acc = tl.zeros((ROWS, BLOCK_N, GROUPS, 16), tl.float32)
    acc_up = acc
    for start in range(0, N_IN // 32, GROUPS):
        group = start + tl.arange(0, GROUPS)[None, None, :, None]
        k = first(group, i, PAIR)
        x0 = tl.load(x + k)
        x1 = tl.load(x + k + PAIR)
        w0, w1 = decode(w, group, i, TYPE)
        acc += x0 * w0 + x1 * w1
        if FUSED:
            u0, u1 = decode(up, group, i, TYPE)
            acc_up += x0 * u0 + x1 * u1
    y = _sum_lanes(acc)
    if FUSED:
        y = _silu(y) * _sum_lanes(acc_up)
    y_row = pair + m if GROUPED else m
    tl.store(y_ptr + y_row.to(tl.int64) * n_out + n, y, (m < n_rows) & (n < n_out))


@triton.jit
def _sum_lanes(acc):
    return tl.sum(tl.sum(acc, 3, keep_dims=True), 2, keep_dims=True)


@triton.jit
def matmul(
    x_ptr,  # (rows, N_IN): float16, each row divided by its power of 2, or float32
    scale_ptr,  # float32 (rows,): these powers
    w_ptr,  # uint8 (experts, n_out, ROW_BYTES); the gate if FUSED
    up_ptr,  # as w_ptr if FUSED, else not read
    tile_ptr,  # int32 (tiles, 3) if GROUPED: expert, its sorted pairs [first, last)
    order_ptr,  # int32 (pairs,) if GROUPED: the pairs sorted by expert
    y_ptr,  # float32 (rows or pairs, n_out)
    n_rows,
    n_out,
    TYPE: tl.constexpr,
    PAIR: tl.constexpr,
    N_IN: tl.constexpr,
    ROW_BYTES: tl.constexpr,
    SHARE: tl.constexpr,
    GROUPED: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,  # "f16", or tl.dot's input_precision for float32
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUPS: tl.constexpr,  # groups at once
):
    """Grid: (tiles of rows, n_out / BLOCK_N). Neighbouring CTAs then share a tile of w in L2.

    Tiles of y are computed transposed: w x^T. As the left operand, w is split over the warps, and
    each decodes its own rows in registers. As the right operand, every warp would decode all rows.
    """
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    offset = tl.minimum(n, n_out - 1).to(tl.int64)[:, None, None] * ROW_BYTES
    if GROUPED:
        tile = tile_ptr + tl.program_id(0) * 3
        start_m = tl.load(tile + 1)
        end_m = tl.load(tile + 2)
        if start_m >= end_m:
            return
        offset += tl.load(tile).to(tl.int64) * n_out * ROW_BYTES
        m = start_m + tl.arange(0, BLOCK_M)
        live = m < end_m
        y_row = tl.load(order_ptr + m, live, 0)
        x_row = y_row // SHARE
    else:
        live = m < n_rows
        y_row = m
        x_row = tl.minimum(m, n_rows - 1)
    w = w_ptr + offset
    if FUSED:
        up = up_ptr + offset
    x = x_ptr + x_row.to(tl.int64)[:, None] * N_IN
    i = tl.arange(0, 16)[None, None, :]
    lane = tl.arange(0, GROUPS * 16)[None, :]
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc_up = acc
    for start in range(0, N_IN // 32, GROUPS):
        k = first(start + lane // 16, lane % 16, PAIR)
        group = start + tl.arange(0, GROUPS)[None, :, None]
        x0 = tl.load(x + k)
        x1 = tl.load(x + k + PAIR)
        w0, w1 = decode(w, group, i, TYPE)
        acc = _dot(w0, x0, acc, PRECISION)
        acc = _dot(w1, x1, acc, PRECISION)
        if FUSED:
            u0, u1 = decode(up, group, i, TYPE)
            acc_up = _dot(u0, x0, acc_up, PRECISION)
            acc_up = _dot(u1, x1, acc_up, PRECISION)
    scale = tl.load(scale_ptr + x_row)[None, :]
    y = acc * scale
    if FUSED:
        y = _silu(y) * (acc_up * scale)
    at = y_ptr + y_row.to(tl.int64)[None, :] * n_out + n[:, None]
    tl.store(at, y, live[None, :] & (n < n_out)[:, None])


@triton.jit
def _dot(w, x, acc, PRECISION: tl.constexpr):
    """acc + w x^T, with w as decoded: (BLOCK_N, GROUPS, 16)."""
    w = w.reshape(w.shape[0], x.shape[1])
    if PRECISION == "f16":
        return tl.dot(w.to(tl.float16), tl.trans(x), acc)
    else:
        return tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
