"""NumPy encoders: float32 rows to quantised rows, without an importance matrix.

This file has the types whose blocks stand alone. `encoders_super.py` and `encoders_ik.py` have
those with scales of scales. `scale_search.py` finds scales.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from deskside.errors import DesksideError
from deskside.gguf.decoders import CODEBOOKS, E2M1, Bytes, Floats
from deskside.gguf.encoders_ik import IK_ENCODERS
from deskside.gguf.encoders_super import SUPER_ENCODERS
from deskside.gguf.quants import QuantType
from deskside.gguf.scale_search import (
    as_float,
    best_scale,
    ends,
    half,
    pack_nibbles,
    reciprocal,
    search_tables,
    snap,
    snap_table,
)

# Rows are encoded in chunks of about this many weights: the working set stays in the CPU's cache.
_CHUNK = 1 << 17


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


def _f32(x: Floats) -> Bytes:
    return x.astype("<f4", copy=False).view(np.uint8)


def _f16(x: Floats) -> Bytes:
    return half(x.reshape(-1))


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
    v = b * reciprocal(d)
    magnitude = np.abs(v)
    whole = np.floor(magnitude)
    whole += magnitude - whole >= 0.5
    q = np.copysign(whole, v).astype(np.int8)
    return np.hstack([half(d[:, 0]), q.view(np.uint8)])


_SNAP = snap_table(CODEBOOKS[0])
_TABLES = search_tables(CODEBOOKS[0], ends(CODEBOOKS[0]))


def _iq4_nl(x: Floats) -> Bytes:
    b = x.reshape(-1, 32)
    d = half(best_scale(b, _TABLES)[0])
    index = snap(b * reciprocal(as_float(d)), _SNAP)
    return np.hstack([d, pack_nibbles(index)])


_Q6_TABLES = search_tables(
    np.arange(-32, 32, dtype=np.float32), [e + t / 4 for e in (-32, 31) for t in range(-8, 9)]
)


def _q6_0(x: Floats) -> Bytes:
    b = x.reshape(-1, 32)
    d = half(best_scale(b, _Q6_TABLES)[0])
    q = np.clip(np.rint(b * reciprocal(as_float(d))), -32, 31) + 32
    q = q.astype(np.uint8).reshape(-1, 4, 8)
    high = q >> 4
    qh = high[:, 0] | high[:, 2] << 2 | high[:, 1] << 4 | high[:, 3] << 6
    return np.hstack([d, qh, pack_nibbles((q & 15).reshape(-1, 32))])


# Borders between the magnitudes of E2M1, as its doubled values.
_E2M1_BORDERS = (E2M1[1:8] + E2M1[:7]) / 2
_MXFP4_LARGEST = np.ldexp(np.float32(12), 124)


def _mxfp4(x: Floats) -> Bytes:
    """The power of two that leaves the least error: one of the two next to max|x| / 12."""
    b = x.reshape(-1, 32)
    peak = np.abs(b).max(axis=1)
    if (peak > _MXFP4_LARGEST).any():
        raise DesksideError(f"a weight of {peak.max():.3g} exceeds MXFP4's largest, 2.55e38")
    # peak = m 2^e with m in [1/2, 1): 12 times the smaller scale is at least 3/4 of the peak
    exponent = np.frexp(peak)[1] - 4
    best = np.full(len(b), np.inf, np.float32)
    e8 = np.zeros(len(b), np.uint8)
    index = np.zeros(b.shape, np.uint8)
    for step in (0, 1):
        e = np.clip(exponent + step, -128, 124)
        v = np.ldexp(b, -e[:, None])
        code = np.searchsorted(_E2M1_BORDERS, np.abs(v)).astype(np.uint8)
        code |= np.where(v < 0, np.uint8(8), np.uint8(0))
        # in units of the smaller scale: the squares stay within float32
        error = np.ldexp(np.square(v - E2M1[code]).sum(axis=1), 2 * step)
        take = error < best
        best[take] = error[take]
        e8[take] = (e[take] + 128).astype(np.uint8)
        index[take] = code[take]
    return np.hstack([e8[:, None], pack_nibbles(index)])


_ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "F32": _f32,
    "F16": _f16,
    "BF16": _bf16,
    "Q8_0": _q8_0,
    "Q6_0": _q6_0,
    "IQ4_NL": _iq4_nl,
    "MXFP4": _mxfp4,
    **SUPER_ENCODERS,
    **IK_ENCODERS,
}
