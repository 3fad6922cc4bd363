"""Encoders of superblocks: 256 weights with a fp16 scale of the scales of their sub-blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.gguf.decoders import CODEBOOKS, Bytes, Floats
from deskside.gguf.scale_search import (
    as_float,
    best_scale,
    best_scale_and_min,
    ends,
    half,
    min_tables,
    pack_nibbles,
    reciprocal,
    search_tables,
    snap,
    snap_table,
)

_SHIFTS = np.arange(0, 8, 2, dtype=np.uint8)
_K0_SNAP = snap_table(CODEBOOKS[0])
_K0_TABLES = search_tables(CODEBOOKS[0], ends(CODEBOOKS[0]))
_Q3_CODES, _Q6_CODES = (np.arange(-n, n, dtype=np.float32) for n in (4, 32))
_Q3_TABLES, _Q6_TABLES = (
    search_tables(codes, [e + t / 4 for e in (codes[0], codes[-1]) for t in range(-8, 9)])
    for codes in (_Q3_CODES, _Q6_CODES)
)


def _quarters(q: NDArray[Any]) -> Bytes:
    """Two bits of 256 weights (N, ...) -> (N, 64): in each half, four groups of 32 side by side."""
    parts = q.reshape(-1, 2, 4, 32) << _SHIFTS[:, None]
    return np.asarray(np.bitwise_or.reduce(parts, axis=2).reshape(-1, 64), np.uint8)


def _high_bits(q: NDArray[Any]) -> Bytes:
    """A bit of 256 weights (N, ...) -> (N, 32): bit s of byte l is weight l's of the s-th 32."""
    return np.packbits(q.reshape(-1, 8, 32), axis=1, bitorder="little").reshape(-1, 32)


def _scaled(
    x: Floats, size: int, tables: Floats, low: int, high: int
) -> tuple[Bytes, Bytes, Floats]:
    """fp16 d (N, 2); scales - low (N, 256 / size); what is to be coded (N, ., size).

    Scales are whole multiples low..high of d; the largest becomes low.
    """
    b = x.reshape(-1, 256 // size, size)
    scale = best_scale(b.reshape(-1, size), tables)[0].reshape(len(b), -1)
    peak = scale[np.arange(len(scale)), np.abs(scale).argmax(axis=1)]
    stored = half(peak / low)
    d = as_float(stored)
    s = np.clip(np.rint(scale * reciprocal(d)), low, high)
    return stored, (s - low).astype(np.uint8), b * reciprocal(d * s)[:, :, None]


def _iq4_xs(x: Floats) -> Bytes:
    """8 sub-blocks of 32 with 6-bit scales."""
    d, s, v = _scaled(x, 32, _K0_TABLES, -32, 31)
    high = np.bitwise_or.reduce((s >> 4).reshape(-1, 2, 4) << _SHIFTS, axis=2)
    pairs = (s & 15).reshape(-1, 4, 2)
    qs = pack_nibbles(snap(v, _K0_SNAP)).reshape(-1, 128)
    return np.hstack([d, high, pairs[:, :, 0] | pairs[:, :, 1] << 4, qs])


def _q6_k(x: Floats) -> Bytes:
    """16 sub-blocks of 16 with int8 scales."""
    d, s, v = _scaled(x, 16, _Q6_TABLES, -128, 127)
    q = (np.clip(np.rint(v), -32, 31) + 32).astype(np.uint8)
    ql = pack_nibbles((q & 15).reshape(-1, 2, 128)).reshape(-1, 128)
    return np.hstack([ql, _quarters(q >> 4), s ^ 128, d])


def _q3_k(x: Floats) -> Bytes:
    """16 sub-blocks of 16 with 6-bit scales: see `decoders._q3_k`."""
    d, s, v = _scaled(x, 16, _Q3_TABLES, -32, 31)
    q = (np.clip(np.rint(v), -4, 3) + 4).astype(np.uint8)
    high = np.bitwise_or.reduce((s >> 4).reshape(-1, 4, 4) << _SHIFTS[:, None], axis=1)
    return np.hstack([_high_bits(q >> 2), _quarters(q & 3), pack_nibbles(s & 15), high, d])


# The largest value maps to the top code, or up to one code above or below it; Q2_K has few codes.
_Q2_TABLES = min_tables(3, [2 + 0.1 * t for t in range(21)])
_Q4_TABLES = min_tables(15, [14 + 0.1 * t for t in range(21)])
_Q5_TABLES = min_tables(31, [30 + 0.1 * t for t in range(21)])


def _with_minima(
    x: Floats, size: int, tables: Floats, top_scale: int, top_code: int
) -> tuple[list[Bytes], Bytes, Bytes, Bytes]:
    """fp16 d and dmin (N, 2); scales, minima (N, 256 / size), 0..top_scale; codes (N, ., size).

    Scales and minima are whole multiples of d and dmin, the largest of each is top_scale.
    """
    b = x.reshape(-1, 256 // size, size)
    found = best_scale_and_min(b.reshape(-1, size), tables)
    scale, offset = (v.reshape(len(b), -1) for v in found)
    halves = [half(v.max(axis=1) / top_scale) for v in (scale, offset)]
    d, dmin = (as_float(h) for h in halves)
    sc = np.clip(np.rint(scale * reciprocal(d)), 0, top_scale)
    m = np.clip(np.rint(offset * reciprocal(dmin)), 0, top_scale)
    v = (b + (dmin * m)[:, :, None]) * reciprocal(d * sc)[:, :, None]
    q = np.clip(np.rint(v), 0, top_code).astype(np.uint8)
    return halves, sc.astype(np.uint8), m.astype(np.uint8), q


def _q2_k(x: Floats) -> Bytes:
    """16 sub-blocks of 16 with 4-bit scales and minima."""
    halves, sc, m, q = _with_minima(x, 16, _Q2_TABLES, 15, 3)
    return np.hstack([sc | m << 4, _quarters(q), *halves])


def _k_header(halves: list[Bytes], sc: Bytes, m: Bytes) -> Bytes:
    """See `decoders._k_scales`."""
    first = sc[:, :4] | sc[:, 4:] >> 4 << 6
    second = m[:, :4] | m[:, 4:] >> 4 << 6
    third = (sc[:, 4:] & 15) | m[:, 4:] << 4
    return np.hstack([*halves, first, second, third])


def _q4_k(x: Floats) -> Bytes:
    """8 sub-blocks of 32 with 6-bit scales and minima."""
    halves, sc, m, q = _with_minima(x, 32, _Q4_TABLES, 63, 15)
    qs = pack_nibbles(q.reshape(-1, 4, 64)).reshape(-1, 128)
    return np.hstack([_k_header(halves, sc, m), qs])


def _q5_k(x: Floats) -> Bytes:
    halves, sc, m, q = _with_minima(x, 32, _Q5_TABLES, 63, 31)
    qs = pack_nibbles((q & 15).reshape(-1, 4, 64)).reshape(-1, 128)
    return np.hstack([_k_header(halves, sc, m), _high_bits(q >> 4), qs])


SUPER_ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_XS": _iq4_xs,
}
