"""Searches that every encoder of blocks uses: the scale, or scale and minimum, of each block.

Every search uses a closed form. Take one block x, its codes q from a candidate scale, and weights
w = x^2. The best scale is d = sum(w q x) / sum(w q^2). It leaves an error of
sum(w x^2) - sum(w q x)^2 / sum(w q^2), so two sums judge a candidate.

Blocks are first divided by their signed value of largest magnitude, so x lies in [-1, 1]. A
candidate scale is then one scalar for all blocks, and its codes are a table over a fine grid of x.
The last rounding is exact, with the scale as stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.gguf.decoders import Bytes, Floats

# Blocks (for types with a row scale: rows) with no larger magnitude become zeros. It is far below
# what an fp16 scale can express, and its reciprocal is finite.
TINY = np.float32(1e-30)
# Grid over [-1, 1] of the search tables: a grid step is 1/32 of the finest code step (Q6_K).
GRID = 2048


def half(d: Floats) -> Bytes:
    """(N,) -> fp16 bytes (N, 2); DesksideError on overflow."""
    with np.errstate(over="ignore"):
        half = d.astype("<f2")
    if np.isinf(half).any():
        worst = float(np.abs(d).max())
        raise DesksideError(f"a value or scale of {worst:.3g} exceeds fp16's largest, 65504")
    return half.reshape(-1, 1).view(np.uint8)


def as_float(half: Bytes) -> Floats:
    return half.view("<f2").astype(np.float32)


def reciprocal(d: Floats) -> Floats:
    """1 / d, and 0 where |d| is too small to divide by."""
    safe = np.abs(d) > TINY
    return np.where(safe, 1 / np.where(safe, d, 1), np.float32(0)).astype(np.float32)


def snap_table(codes: Floats) -> NDArray[np.uint8]:
    """Index of the code nearest to v, by cell floor(2 v) + 256. Codes are whole numbers in
    -128..127, so the border between two is a multiple of 1/2 and lies between two cells."""
    v = np.arange(-256, 256, dtype=np.float32)[:, None] / 2 + np.float32(0.25)
    nearest: NDArray[np.intp] = np.abs(v - codes).argmin(axis=1)
    return nearest.astype(np.uint8)


def snap(v: Floats, table: NDArray[np.uint8]) -> Bytes:
    """Index of the nearest code to each v, by a `snap_table`."""
    cell = np.clip(v * 2 + 256, 0, 511).astype(np.intp)
    return np.take(table, cell)


def search_tables(codes: Floats, factors: Sequence[float]) -> Floats:
    """Codes nearest to factor * x over the grid of x: (len(factors), 2 GRID + 1)."""
    x = np.arange(-GRID, GRID + 1, dtype=np.float32) / GRID
    borders = (codes[1:] + codes[:-1]) / 2
    return np.stack([codes[np.searchsorted(borders, x * np.float32(f))] for f in factors])


def best_scale(b: Floats, tables: Floats) -> tuple[Floats, Floats]:
    """The best scale per block (N, k), and the share of sum(w x^2) that it explains.

    A scale may be negative: the value of largest magnitude maps to either end of the codes.
    """
    peak = b[np.arange(len(b)), np.abs(b).argmax(axis=1)]
    x = b * reciprocal(peak)[:, None]
    w = x * x
    wx = w * x
    cell = np.rint(x * GRID + GRID).astype(np.intp)
    best = np.zeros(len(b), np.float32)
    scale = np.zeros(len(b), np.float32)
    q = np.empty_like(x)
    for table in tables:
        table.take(cell, out=q, mode="clip")
        qx = np.einsum("bi,bi->b", q, wx)
        q *= q
        q2 = np.einsum("bi,bi->b", q, w)
        d = qx / np.maximum(q2, TINY)
        gain = d * qx
        better = gain > best
        best[better] = gain[better]
        scale[better] = d[better]
    return scale * peak, best / np.maximum(np.einsum("bi,bi->b", w, w), TINY)


def ends(codes: Floats, reach: int = 7) -> list[float]:
    """Candidate scales: the largest value maps to the first or last code, give or take `reach`."""
    return [end + t for end in (codes[0], codes[-1]) for t in range(-reach, reach + 1)]


def min_tables(top: int, factors: Sequence[float]) -> Floats:
    """Codes 0..top of x over the grid of [0, 1]: for each factor, the code that 1 maps to."""
    return search_tables(np.arange(top + 1, dtype=np.float32), factors)[:, GRID:]


def best_scale_and_min(b: Floats, tables: Floats) -> tuple[Floats, Floats]:
    """Scale d >= 0 and m >= 0 per block (N, k) that minimise sum(w (d q - m - x)^2).

    The weights are rms(x) + |x|. For given codes q the optimum is the weighted linear
    regression of x on q, with m = 0 where it would be negative.
    """
    peak = np.abs(b).max(axis=1)
    x = b * reciprocal(peak)[:, None]
    w = np.abs(x) + np.sqrt(np.einsum("bi,bi->b", x, x) / x.shape[1])[:, None]
    low = np.minimum(x.min(axis=1), 0)
    span = x.max(axis=1) - low
    cell = np.rint((x - low[:, None]) * (GRID * reciprocal(span))[:, None]).astype(np.intp)
    wx = w * x
    s_w, s_x = w.sum(axis=1), wx.sum(axis=1)
    best = np.full(len(b), np.inf, np.float32)
    scale, offset = np.zeros_like(peak), np.zeros_like(peak)
    q = np.empty_like(x)
    for table in tables:
        table.take(cell, out=q, mode="clip")
        s_xq = np.einsum("bi,bi->b", q, wx)
        s_q = np.einsum("bi,bi->b", q, w)
        q *= q
        s_qq = np.einsum("bi,bi->b", q, w)
        det = s_w * s_qq - s_q * s_q
        inverse = reciprocal(det)
        d = (s_w * s_xq - s_x * s_q) * inverse
        m = (s_q * s_xq - s_qq * s_x) * inverse
        positive = (m < 0) | (inverse == 0)
        d = np.where(positive, s_xq / np.maximum(s_qq, TINY), d)
        m = np.where(positive, 0, m)
        error = d * (d * s_qq - 2 * (m * s_q + s_xq)) + m * (m * s_w + 2 * s_x)
        better = error < best
        best[better] = error[better]
        scale[better] = d[better]
        offset[better] = m[better]
    return scale * peak, offset * peak


def pack_nibbles(index: NDArray[Any]) -> Bytes:
    """(..., 2k) indices -> (..., k) bytes, the first half in the low nibbles."""
    k = index.shape[-1] // 2
    return np.asarray(index[..., :k] | index[..., k:] << 4, np.uint8)
