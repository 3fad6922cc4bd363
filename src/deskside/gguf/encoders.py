"""NumPy encoders: float32 rows to quantised rows, without an importance matrix.

Every search uses a closed form. Take one block x, its codes q from a candidate scale, and weights
w = x^2. The best scale is d = sum(w q x) / sum(w q^2). It leaves an error of
sum(w x^2) - sum(w q x)^2 / sum(w q^2), so two sums judge a candidate.

Blocks are first divided by their signed value of largest magnitude, so x lies in [-1, 1]. A
candidate scale is then one scalar for all blocks, and its codes are a table over a fine grid of x.
The last rounding is exact, with the scale as stored.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.gguf.decoders import CODEBOOKS, Bytes, Floats
from deskside.gguf.quants import QuantType

# Rows are encoded in chunks of about this many weights: the working set stays in the CPU's cache.
_CHUNK = 1 << 17
# Blocks (for types with a row scale: rows) with no larger magnitude become zeros. It is far below
# what an fp16 scale can express, and its reciprocal is finite.
_TINY = np.float32(1e-30)
# Grid over [-1, 1] of the search tables: a grid step is 1/32 of the finest code step (Q6_K).
_GRID = 2048


def quantize(x: Floats, t: QuantType) -> Bytes:
    """Encode rows of weights: float32 (rows, n) -> uint8 (rows, t.row_bytes(n)).

    Each row depends on itself only. DesksideError if `n` does not fit the type, the type has no
    encoder, or a weight is NaN, Inf or too large for the type.
    """
    encode = _ENCODERS.get(t.name)
    if encode is None:
        raise DesksideError(f"{t.name} cannot be written; choose one of {', '.join(_ENCODERS)}")
    if x.ndim != 2:
        raise DesksideError(f"weights to encode are (rows, n), not {x.shape}")
    rows, n = x.shape
    out = np.empty((rows, t.row_bytes(n)), np.uint8)
    step = max(1, _CHUNK // n)
    for start in range(0, rows, step):
        part = np.ascontiguousarray(x[start : start + step], np.float32)
        if not np.isfinite(part).all():
            row = start + int(np.flatnonzero(~np.isfinite(part).all(axis=1))[0])
            raise DesksideError(f"row {row} holds a NaN or Inf and cannot be encoded")
        out[start : start + step] = encode(part).reshape(len(part), -1)
    return out


def encodable() -> tuple[str, ...]:
    """The names of the types that `quantize` can write."""
    return tuple(_ENCODERS)


def _half(d: Floats) -> Bytes:
    """(N,) -> fp16 bytes (N, 2); DesksideError on overflow."""
    with np.errstate(over="ignore"):
        half = d.astype("<f2")
    if np.isinf(half).any():
        worst = float(np.abs(d).max())
        raise DesksideError(f"a value or scale of {worst:.3g} exceeds fp16's largest, 65504")
    return half.reshape(-1, 1).view(np.uint8)


def _as_float(half: Bytes) -> Floats:
    return half.view("<f2").astype(np.float32)


def _reciprocal(d: Floats) -> Floats:
    """1 / d, and 0 where |d| is too small to divide by."""
    safe = np.abs(d) > _TINY
    return np.where(safe, 1 / np.where(safe, d, 1), np.float32(0)).astype(np.float32)


def _f32(x: Floats) -> Bytes:
    return x.astype("<f4", copy=False).view(np.uint8)


def _f16(x: Floats) -> Bytes:
    return _half(x.reshape(-1))


def _bf16(x: Floats) -> Bytes:
    """Round to nearest, ties to even: add half of the dropped part, less one if bit 16 is 0."""
    u = x.view(np.uint32)
    rounded = ((u + 0x7FFF + (u >> 16 & 1)) >> 16).astype("<u2")
    if (rounded & 0x7F80 == 0x7F80).any():
        raise DesksideError("a weight exceeds BF16's largest, 3.39e38")
    return rounded.view(np.uint8)


def _q8_0(x: Floats) -> Bytes:
    """d = max|x| / 127; q = x / d rounded to nearest, ties away from zero."""
    b = x.reshape(-1, 32)
    d = np.abs(b).max(axis=1, keepdims=True) / np.float32(127)
    v = b * _reciprocal(d)
    magnitude = np.abs(v)
    whole = np.floor(magnitude)
    whole += magnitude - whole >= 0.5
    q = np.copysign(whole, v).astype(np.int8)
    return np.hstack([_half(d[:, 0]), q.view(np.uint8)])


def _snap_table(codes: Floats) -> NDArray[np.uint8]:
    """Index of the code nearest to v, by cell floor(2 v) + 256. Codes are whole numbers in
    -128..127, so the border between two is a multiple of 1/2 and lies between two cells."""
    v = np.arange(-256, 256, dtype=np.float32)[:, None] / 2 + np.float32(0.25)
    nearest: NDArray[np.intp] = np.abs(v - codes).argmin(axis=1)
    return nearest.astype(np.uint8)


def _snap(v: Floats, table: NDArray[np.uint8]) -> Bytes:
    """Index of the nearest code to each v, by a `_snap_table`."""
    cell = np.clip(v * 2 + 256, 0, 511).astype(np.intp)
    return np.take(table, cell)


def _search_tables(codes: Floats, factors: Sequence[float]) -> Floats:
    """Codes nearest to factor * x over the grid of x: (len(factors), 2 _GRID + 1)."""
    x = np.arange(-_GRID, _GRID + 1, dtype=np.float32) / _GRID
    borders = (codes[1:] + codes[:-1]) / 2
    return np.stack([codes[np.searchsorted(borders, x * np.float32(f))] for f in factors])


def _best_scale(b: Floats, tables: Floats) -> tuple[Floats, Floats]:
    """The best scale per block (N, k), and the share of sum(w x^2) that it explains.

    A scale may be negative: the value of largest magnitude maps to either end of the codes.
    """
    peak = b[np.arange(len(b)), np.abs(b).argmax(axis=1)]
    x = b * _reciprocal(peak)[:, None]
    w = x * x
    wx = w * x
    cell = np.rint(x * _GRID + _GRID).astype(np.intp)
    best = np.zeros(len(b), np.float32)
    scale = np.zeros(len(b), np.float32)
    q = np.empty_like(x)
    for table in tables:
        table.take(cell, out=q, mode="clip")
        qx = np.einsum("bi,bi->b", q, wx)
        q *= q
        q2 = np.einsum("bi,bi->b", q, w)
        d = qx / np.maximum(q2, _TINY)
        gain = d * qx
        better = gain > best
        best[better] = gain[better]
        scale[better] = d[better]
    return scale * peak, best / np.maximum(np.einsum("bi,bi->b", w, w), _TINY)


def _ends(codes: Floats) -> list[float]:
    """Candidate scales: the largest value maps to the first or the last code, give or take 7."""
    return [end + t for end in (float(codes[0]), float(codes[-1])) for t in range(-7, 8)]


_SNAP = [_snap_table(book) for book in CODEBOOKS]
_TABLES = [_search_tables(book, _ends(book)) for book in CODEBOOKS]


def _pack_nibbles(index: Bytes) -> Bytes:
    """(..., 2k) indices -> (..., k) bytes, the first half in the low nibbles."""
    k = index.shape[-1] // 2
    return np.asarray(index[..., :k] | index[..., k:] << 4, np.uint8)


def _iq4_nl(x: Floats) -> Bytes:
    b = x.reshape(-1, 32)
    d = _half(_best_scale(b, _TABLES[0])[0])
    index = _snap(b * _reciprocal(_as_float(d)), _SNAP[0])
    return np.hstack([d, _pack_nibbles(index)])


def _iq4_xs(x: Floats) -> Bytes:
    """Block scales are (ls - 32) d with 6-bit ls: the largest one becomes -32 d."""
    b = x.reshape(-1, 8, 32)
    scale = _best_scale(b.reshape(-1, 32), _TABLES[0])[0].reshape(-1, 8)
    peak = scale[np.arange(len(scale)), np.abs(scale).argmax(axis=1)]
    half = _half(peak / -32)
    d = _as_float(half)
    ls = np.clip(np.rint(scale * _reciprocal(d)), -32, 31)
    index = _snap(b * _reciprocal(d * ls)[:, :, None], _SNAP[0])
    u = (ls + 32).astype(np.uint16)
    high = ((u >> 4) << np.arange(0, 16, 2, dtype=np.uint16)).sum(axis=1).astype("<u2")
    low = (u & 15).astype(np.uint8).reshape(-1, 4, 2)
    packed = low[:, :, 0] | low[:, :, 1] << 4
    qs = _pack_nibbles(index).reshape(-1, 128)
    return np.hstack([half, high[:, None].view(np.uint8), packed, qs])


_Q6_CODES = np.arange(-32, 32, dtype=np.float32)
_Q6_TABLES = _search_tables(_Q6_CODES, [e + t / 4 for e in (-32, 31) for t in range(-8, 9)])


def _q6_k(x: Floats) -> Bytes:
    """16 sub-blocks of 16 with int8 scales, the largest of which becomes -128 d."""
    b = x.reshape(-1, 16, 16)
    scale = _best_scale(b.reshape(-1, 16), _Q6_TABLES)[0].reshape(-1, 16)
    peak = scale[np.arange(len(scale)), np.abs(scale).argmax(axis=1)]
    half = _half(peak / -128)
    d = _as_float(half)
    sc = np.clip(np.rint(scale * _reciprocal(d)), -128, 127)
    v = np.rint(b * _reciprocal(d * sc)[:, :, None])
    q = (np.clip(v, -32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    ql = _pack_nibbles((q & 15).reshape(-1, 2, 128))
    high = (q >> 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    qh = np.bitwise_or.reduce(high, axis=2)
    sc8 = sc.astype(np.int8).view(np.uint8)
    return np.hstack([ql.reshape(-1, 128), qh.reshape(-1, 64), sc8, half])


# Codes 0..15 of x scaled to [0, 1]: the largest value maps to 14, 14.1 .. 16.
_Q4_TABLES = _search_tables(np.arange(16, dtype=np.float32), [14 + 0.1 * t for t in range(21)])[
    :, _GRID:
]


def _best_scale_and_min(b: Floats) -> tuple[Floats, Floats]:
    """Scale d >= 0 and m >= 0 per block (N, 32) that minimise sum(w (d q - m - x)^2).

    The weights are rms(x) + |x|. For given codes q the optimum is the weighted linear
    regression of x on q, with m = 0 where it would be negative.
    """
    peak = np.abs(b).max(axis=1)
    x = b * _reciprocal(peak)[:, None]
    w = np.abs(x) + np.sqrt(np.einsum("bi,bi->b", x, x) / x.shape[1])[:, None]
    low = np.minimum(x.min(axis=1), 0)
    span = x.max(axis=1) - low
    cell = np.rint((x - low[:, None]) * (_GRID * _reciprocal(span))[:, None]).astype(np.intp)
    wx = w * x
    s_w, s_x = w.sum(axis=1), wx.sum(axis=1)
    best = np.full(len(b), np.inf, np.float32)
    scale, offset = np.zeros_like(peak), np.zeros_like(peak)
    q = np.empty_like(x)
    for table in _Q4_TABLES:
        table.take(cell, out=q, mode="clip")
        s_xq = np.einsum("bi,bi->b", q, wx)
        s_q = np.einsum("bi,bi->b", q, w)
        q *= q
        s_qq = np.einsum("bi,bi->b", q, w)
        det = s_w * s_qq - s_q * s_q
        inverse = _reciprocal(det)
        d = (s_w * s_xq - s_x * s_q) * inverse
        m = (s_q * s_xq - s_qq * s_x) * inverse
        positive = (m < 0) | (inverse == 0)
        d = np.where(positive, s_xq / np.maximum(s_qq, _TINY), d)
        m = np.where(positive, 0, m)
        error = d * (d * s_qq - 2 * (m * s_q + s_xq)) + m * (m * s_w + 2 * s_x)
        better = error < best
        best[better] = error[better]
        scale[better] = d[better]
        offset[better] = m[better]
    return scale * peak, offset * peak


def _q4_k(x: Floats) -> Bytes:
    """8 sub-blocks of 32 with 6-bit scales and minima, relative to the largest of each."""
    b = x.reshape(-1, 8, 32)
    scale, offset = (v.reshape(-1, 8) for v in _best_scale_and_min(b.reshape(-1, 32)))
    halves = [_half(v.max(axis=1) / 63) for v in (scale, offset)]
    d, dmin = (_as_float(half) for half in halves)
    sc = np.clip(np.rint(scale * _reciprocal(d)), 0, 63)
    m = np.clip(np.rint(offset * _reciprocal(dmin)), 0, 63)
    v = (b + (dmin * m)[:, :, None]) * _reciprocal(d * sc)[:, :, None]
    q = np.clip(np.rint(v), 0, 15).astype(np.uint8)
    qs = _pack_nibbles(q.reshape(-1, 4, 64)).reshape(-1, 128)
    s8, m8 = sc.astype(np.uint8), m.astype(np.uint8)
    first = s8[:, :4] | s8[:, 4:] >> 4 << 6
    second = m8[:, :4] | m8[:, 4:] >> 4 << 6
    third = (s8[:, 4:] & 15) | m8[:, 4:] << 4
    return np.hstack([*halves, first, second, third, qs])


# By code index: 1 if its four bits have an odd number of ones. By codebook and parity: the nearest
# code of that parity. Borders between codes of equal parity are multiples of 1/2 too.
_ODD = np.array([bin(i).count("1") & 1 for i in range(16)], np.uint8)


def _parity_snap(book: Floats, odd: int) -> NDArray[np.uint8]:
    members = np.flatnonzero(odd == _ODD).astype(np.uint8)
    return members[_snap_table(book[members])]


_PARITY_SNAP = [[_parity_snap(book, odd) for odd in (0, 1)] for book in CODEBOOKS]


def _even_snap(v: Floats, book: int) -> Bytes:
    """Nearest codes of v (N, 32) such that each IQ4_KSS word has an even number of set bits.

    Word k holds elements 2k, 2k+1, 2k+16, 2k+17. In a word with odd parity one element moves to a
    code of the other parity: the one that raises sum(w (v - code)^2) least. Here w is v^2 plus its
    mean. With v^2 alone, only the small weights of a block would move.
    """
    index = _snap(v, _SNAP[book])
    odd = _ODD[index]
    even_code, odd_code = (_snap(v, table) for table in _PARITY_SNAP[book])
    other = np.where(odd, even_code, odd_code)
    codes = CODEBOOKS[book]
    w = v * v + np.einsum("bi,bi->b", v, v)[:, None] / 32
    cost = ((v - codes[other]) ** 2 - (v - codes[index]) ** 2) * w
    words, others, costs = (_by_word(a) for a in (index, other, cost))
    broken = np.bitwise_xor.reduce(_ODD[words], axis=2) == 1
    cheapest = np.arange(4) == costs.argmin(axis=2)[:, :, None]
    fixed = np.where(cheapest & broken[:, :, None], others, words)
    return np.asarray(fixed.reshape(-1, 8, 2, 2).swapaxes(1, 2).reshape(-1, 32), np.uint8)


def _by_word(a: NDArray[Any]) -> NDArray[Any]:
    """(N, 32) -> (N, 8, 4): the elements of each IQ4_KSS word."""
    return a.reshape(-1, 2, 8, 2).swapaxes(1, 2).reshape(-1, 8, 4)


def _plain_snap(v: Floats, book: int) -> Bytes:
    return _snap(v, _SNAP[book])


def _row_scaled(x: Floats, snap: Callable[[Floats, int], Bytes]) -> tuple[Bytes, Bytes, Bytes]:
    """Row scale bytes (rows, 4), scale bytes (rows, n/32), code indices (rows, n/32, 32).

    A block's scale is an odd multiple, -127..127, of the row scale. Its lowest bit selects the
    codebook. Both codebooks are tried with the scale as stored. At the end the row scale is fitted
    again to the codes.
    """
    rows, n = x.shape
    peak = np.abs(x).max(axis=1, keepdims=True)
    b = (x * _reciprocal(peak)).reshape(-1, 32)
    found = [_best_scale(b, tables) for tables in _TABLES]
    better = found[1][1] > found[0][1]
    largest = np.abs(np.where(better, found[1][0], found[0][0])).reshape(rows, -1).max(axis=1)
    d = np.repeat(largest / 127, n // 32)
    inverse = _reciprocal(d)
    w = b * b
    best = np.full(len(b), np.inf, np.float32)
    scales = np.zeros(len(b), np.uint8)
    index = np.zeros(b.shape, np.uint8)
    fit = np.zeros(b.shape, np.float32)
    for book, (scale, _) in enumerate(found):
        even = np.clip(2 * np.rint((scale * inverse + 127) / 2), 0, 254)
        multiple = (even - 127).astype(np.float32)
        candidate = snap(b * _reciprocal(d * multiple)[:, None], book)
        y = CODEBOOKS[book][candidate] * multiple[:, None]
        error = np.einsum("bi,bi->b", w, (b - y * d[:, None]) ** 2)
        take = error < best
        best[take] = error[take]
        scales[take] = even[take].astype(np.uint8) | book
        index[take] = candidate[take]
        fit[take] = y[take]
    fx = np.einsum("bi,bi,bi->b", w, fit, b).reshape(rows, -1).sum(axis=1)
    ff = np.einsum("bi,bi,bi->b", w, fit, fit).reshape(rows, -1).sum(axis=1)
    row_scale = (fx / np.maximum(ff, _TINY))[:, None] * peak
    header = row_scale.astype("<f4").view(np.uint8)
    return header, scales.reshape(rows, -1), index.reshape(rows, -1, 32)


def _iq4_ks(x: Floats) -> Bytes:
    header, scales, index = _row_scaled(x, _plain_snap)
    qs = _pack_nibbles(index).reshape(len(x), -1, 128)
    blocks = np.concatenate([scales.reshape(len(x), -1, 8), qs], axis=2)
    return np.hstack([header, blocks.reshape(len(x), -1)])


def _iq4_kss(x: Floats) -> Bytes:
    """See `decoders.unpack_kss`: v is the prefix XOR from the top bit of a word of even parity."""
    header, scales, index = _row_scaled(x, _even_snap)
    v = _pack_nibbles(index).view("<u2")
    for shift in (1, 2, 4, 8):
        v = v ^ v >> shift
    bits = np.unpackbits(scales[:, :, None], axis=2, bitorder="little")
    return np.hstack([header, (v | bits).astype("<u2").view(np.uint8).reshape(len(x), -1)])


_ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q6_K": _q6_k,
    "Q4_K": _q4_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "IQ4_KS": _iq4_ks,
    "IQ4_KSS": _iq4_kss,
}
