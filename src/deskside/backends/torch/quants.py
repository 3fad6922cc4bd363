"""Decodes the quant types in torch: rows of the file's bytes to float32, on any device.

`deskside.gguf.decoders` specifies the types. Here is one decoder per type; tests compare the two
bit by bit. A decoder takes blocks, uint8 (N, block_bytes), and returns float32 (N, block).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import torch
from torch import Tensor

from deskside.gguf.decoders import CODEBOOKS, CODEBOOKS_5, CODEBOOKS_6, E2M1
from deskside.gguf.quants import QuantType

ROUNDED = 32  # activations per block of 8-bit rounding


def dequantize(data: Tensor, t: QuantType, n: int) -> Tensor:
    """Decode rows of `n` weights: uint8 (rows, t.row_bytes(n)) -> float32 (rows, n)."""
    rows = data.shape[0]
    blocks = data[:, t.row_header :].reshape(rows * (n // t.block), t.block_bytes)
    if t.row_header:
        d = _as(data[:, : t.row_header], torch.float32).repeat_interleave(n // t.block, dim=0)
        return _ROW_SCALED[t.name](blocks, d).reshape(rows, n)
    return _DECODERS[t.name](blocks).reshape(rows, n)


def round_to_8_bits(x: Tensor) -> Tensor:
    """Round x (m, n) to 8 bits per 32 values, as for quantised weights on every device.

    The result is q d with d = max|x| / 127 and q = x / d rounded to an integer, ties to even. The
    integers equal those of `quantize` in native/isa/matmul.cpp.
    """
    blocks = x.reshape(x.shape[0], x.shape[1] // ROUNDED, ROUNDED)
    top = blocks.abs().amax(-1, keepdim=True)
    some = top <= 1e-30  # such a block counts as zero; NaN and infinity give NaN
    # A tensor, not a number: CUDA divides by a number through its reciprocal, with other bits.
    max_q = torch.full_like(top, 127.0)
    q = (blocks * (max_q / top).masked_fill(some, 0.0)).round_()
    return (q * (top / max_q).masked_fill(some, 0.0)).reshape(x.shape)


def encode_cached(x: Tensor, name: str) -> Tensor:
    """Encode keys or values for a cache: float32 (..., n) -> uint8 (..., row_bytes).

    name: F16, F32 or Q8_0.
    """
    if name == "F32":
        return x.contiguous().view(torch.uint8)
    if name == "F16":
        return x.to(torch.float16).contiguous().view(torch.uint8)
    blocks = x.reshape(*x.shape[:-1], x.shape[-1] // 32, 32)
    top = blocks.abs().amax(-1, keepdim=True)
    d = top / torch.full_like(top, 127.0)
    v = blocks * torch.where(d > 0, 1 / d, 0.0)
    q = torch.copysign((v.abs() + 0.5).floor(), v).to(torch.int8)  # ties away from zero
    parts = [d.to(torch.float16).view(torch.uint8), q.view(torch.uint8)]
    return torch.cat(parts, -1).flatten(-2)


def decode_cached(data: Tensor, name: str) -> Tensor:
    """Decode keys or values of a cache: uint8 (..., row_bytes) -> float32 (..., n)."""
    if name == "F32":
        return data.view(torch.float32)
    if name == "F16":
        return data.view(torch.float16).to(torch.float32)
    flat = data.reshape(-1, 34)
    return _q8_0(flat).reshape(*data.shape[:-1], data.shape[-1] // 34 * 32)


def _as(b: Tensor, kind: torch.dtype) -> Tensor:
    """The bytes, read as another type."""
    return b.contiguous().view(kind)


def _f16(b: Tensor) -> Tensor:
    return _as(b, torch.float16).to(torch.float32)


def _words(b: Tensor) -> Tensor:
    """(..., 2k) bytes -> (..., k) unsigned 16-bit words, in int32."""
    return _as(b, torch.int16).to(torch.int32) & 0xFFFF


def _nibbles(qs: Tensor) -> Tensor:
    return torch.cat([qs & 15, qs >> 4], -1)


def _bits(qh: Tensor, shifts: int, width: int) -> Tensor:
    by = torch.arange(0, shifts * width, width, dtype=torch.uint8, device=qh.device)[:, None]
    return (qh[:, None, :] >> by) & ((1 << width) - 1)


# All codebooks lie one after another; those of 4 bits come first.
_CODEBOOKS = (CODEBOOKS, CODEBOOKS_5, CODEBOOKS_6, E2M1)
_FIVE = CODEBOOKS.size
_SIX = _FIVE + CODEBOOKS_5.size
_E2M1 = _SIX + CODEBOOKS_6.size


def _codes(index: Tensor, at: int = 0) -> Tensor:
    """Entries of a type's codebooks, which start at `at`."""
    return codebooks(index.device)[index.to(torch.int32) + at]


@cache
def codebooks(device: torch.device) -> Tensor:
    """All codebooks, float32 (240,). Kept on the device: a graph cannot copy from the host."""
    return torch.from_numpy(np.concatenate([c.reshape(-1) for c in _CODEBOOKS])).to(device)


def _plain(kind: torch.dtype) -> Callable[[Tensor], Tensor]:
    return lambda b: _as(b, kind).to(torch.float32)


def _q4_0(b: Tensor) -> Tensor:
    return _f16(b[:, :2]) * (_nibbles(b[:, 2:]).to(torch.float32) - 8)


def _q4_1(b: Tensor) -> Tensor:
    return _f16(b[:, :2]) * _nibbles(b[:, 4:]).to(torch.float32) + _f16(b[:, 2:4])


def _fifth_bit(qh: Tensor) -> Tensor:
    """The fifth bit of each element, as 0 or 16: (N, 4) bytes -> (N, 32). Bit j is element j's."""
    by = torch.arange(8, dtype=torch.uint8, device=qh.device)
    return (((qh[:, :, None] >> by) & 1) << 4).reshape(-1, 32)


def _q5_0(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 6:]) | _fifth_bit(b[:, 2:6])
    return _f16(b[:, :2]) * (q.to(torch.float32) - 16)


def _q5_1(b: Tensor) -> Tensor:
    q = _nibbles(b[:, 8:]) | _fifth_bit(b[:, 4:8])
    return _f16(b[:, :2]) * q.to(torch.float32) + _f16(b[:, 2:4])


def _q6_0(b: Tensor) -> Tensor:
    high = _bits(b[:, 2:10], 4, 2)
    # not by a list of indices: they would be copied to the device each time
    high = torch.stack([high[:, 0], high[:, 2], high[:, 1], high[:, 3]], 1).reshape(-1, 32)
    q = _nibbles(b[:, 10:]) | high << 4
    return _f16(b[:, :2]) * (q.to(torch.float32) - 32)


def _q8_0(b: Tensor) -> Tensor:
    return _f16(b[:, :2]) * _as(b[:, 2:], torch.int8).to(torch.float32)


def _q2_k(b: Tensor) -> Tensor:
    d = _f16(b[:, 80:82]) * (b[:, :16] & 15).to(torch.float32)
    m = _f16(b[:, 82:]) * (b[:, :16] >> 4).to(torch.float32)
    q = _bits(b[:, 16:80].reshape(-1, 32), 4, 2).reshape(-1, 16, 16)
    return d[:, :, None] * q.to(torch.float32) - m[:, :, None]


def _q3_k(b: Tensor) -> Tensor:
    sc = _nibbles(b[:, 96:104]) | _bits(b[:, 104:108], 4, 2).reshape(-1, 16) << 4
    d = _f16(b[:, 108:]) * (sc.to(torch.float32) - 32)
    low = _bits(b[:, 32:96].reshape(-1, 32), 4, 2).reshape(-1, 8, 32)
    q = (low | _bits(b[:, :32], 8, 1) << 2).to(torch.float32) - 4
    return d[:, :, None] * q.reshape(-1, 16, 16)


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    lo, mid, hi = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    sc = torch.cat([lo & 63, (hi & 15) | (lo >> 6 << 4)], 1)
    m = torch.cat([mid & 63, (hi >> 4) | (mid >> 6 << 4)], 1)
    d = _f16(b[:, :2]) * sc.to(torch.float32)
    return d[:, :, None], (_f16(b[:, 2:4]) * m.to(torch.float32))[:, :, None]


def _q4_k(b: Tensor) -> Tensor:
    d, m = _k_scales(b)
    q = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return d * q.to(torch.float32) - m


def _five_bits(qs: Tensor, qh: Tensor) -> Tensor:
    return _nibbles(qs.reshape(-1, 4, 32)).reshape(-1, 8, 32) | _bits(qh, 8, 1) << 4


def _q5_k(b: Tensor) -> Tensor:
    d, m = _k_scales(b)
    return d * _five_bits(b[:, 48:], b[:, 16:48]).to(torch.float32) - m


def _q6_k(b: Tensor) -> Tensor:
    low = _nibbles(b[:, :128].reshape(-1, 64)).reshape(-1, 4, 32)
    high = _bits(b[:, 128:192].reshape(-1, 32), 4, 2)
    q = (low | high << 4).to(torch.float32) - 32
    d = _f16(b[:, 208:]) * _as(b[:, 192:208], torch.int8).to(torch.float32)
    return d[:, :, None] * q.reshape(-1, 16, 16)


def _iq4_nl(b: Tensor) -> Tensor:
    return _f16(b[:, :2]) * _codes(_nibbles(b[:, 2:]))


def _six_bit_scales(low: Tensor, high: Tensor) -> Tensor:
    four = torch.stack([low & 15, low >> 4], -1).flatten(1)
    by = torch.arange(0, 8, 2, dtype=torch.uint8, device=high.device)
    two = ((high[:, :, None] >> by) & 3).flatten(1)
    return (four | two << 4).to(torch.float32) - 32


def _iq4_xs(b: Tensor) -> Tensor:
    d = _f16(b[:, :2]) * _six_bit_scales(b[:, 4:8], b[:, 2:4])
    return d[:, :, None] * _codes(_nibbles(b[:, 8:].reshape(-1, 8, 16)))


def _selectors(extra: Tensor) -> Tensor:
    by = torch.arange(8, dtype=torch.uint8, device=extra.device)
    return ((extra[:, :, None] >> by) & 1).reshape(-1, 16, 1)


def _iq4_k(b: Tensor) -> Tensor:
    d = _f16(b[:, :2]) * _six_bit_scales(b[:, 8:16], b[:, 4:8])
    q = _nibbles(b[:, 16:].reshape(-1, 8, 16)).reshape(-1, 16, 16)
    return d[:, :, None] * _codes(q | _selectors(b[:, 2:4]) << 4)


def _iq5_k(b: Tensor) -> Tensor:
    d = _f16(b[:, :2]) * _six_bit_scales(b[:, 8:16], b[:, 4:8])
    q = _five_bits(b[:, 16:144], b[:, 144:]).reshape(-1, 16, 16)
    return d[:, :, None] * _codes(q | _selectors(b[:, 2:4]) << 5, _FIVE)


def _iq6_k(b: Tensor) -> Tensor:
    d = _f16(b[:, :2]) * _as(b[:, 4:20], torch.int8).to(torch.float32)
    low = _nibbles(b[:, 20:148].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = _bits(b[:, 148:].reshape(-1, 32), 4, 2).reshape(-1, 8, 32)
    q = (low | high << 4).reshape(-1, 16, 16)
    return d[:, :, None] * _codes(q | _selectors(b[:, 2:4]) << 6, _SIX)


def _mxfp4(b: Tensor) -> Tensor:
    e = b[:, :1].to(torch.int32)
    # 2^(e - 128); the two smallest are below float32's normal range
    bits = torch.where(e < 2, (e + 1) << 21, (e - 1) << 23)
    return bits.view(torch.float32) * _codes(_nibbles(b[:, 1:]), _E2M1)


def _scaled_codes(d: Tensor, s: Tensor, qs: Tensor) -> Tensor:
    dl = d * ((s & 254).to(torch.float32) - 127)
    return dl[:, :, None] * _codes(_nibbles(qs) | ((s & 1) << 4)[:, :, None])


def _iq4_ks(b: Tensor, d: Tensor) -> Tensor:
    return _scaled_codes(d, b[:, :8], b[:, 8:].reshape(-1, 8, 16))


def _iq4_kss(b: Tensor, d: Tensor) -> Tensor:
    """See `decoders.unpack_kss`."""
    words = _words(b).reshape(-1, 8, 8)
    bits = (words & 1) << torch.arange(8, device=b.device, dtype=torch.int32)
    v = words & 0xFFFE
    w = v ^ (v >> 1)
    qs = torch.stack([w & 255, w >> 8], -1).reshape(-1, 8, 16)
    return _scaled_codes(d, bits.sum(-1, dtype=torch.int32), qs)


def _iq5_ks(b: Tensor, d: Tensor) -> Tensor:
    s = b[:, :8]
    dl = d * ((s & 254).to(torch.float32) - 127)
    q = _five_bits(b[:, 8:136], b[:, 136:]) | ((s & 1) << 5)[:, :, None]
    return dl[:, :, None] * _codes(q, _FIVE)


_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "F32": _plain(torch.float32),
    "F16": _plain(torch.float16),
    "BF16": _plain(torch.bfloat16),
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q6_0": _q6_0,
    "Q8_0": _q8_0,
    "Q2_K": _q2_k,
    "Q3_K": _q3_k,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
    "IQ4_K": _iq4_k,
    "IQ5_K": _iq5_k,
    "IQ6_K": _iq6_k,
    "MXFP4": _mxfp4,
}
_ROW_SCALED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "IQ4_KS": _iq4_ks,
    "IQ4_KSS": _iq4_kss,
    "IQ5_KS": _iq5_ks,
}
TYPES = frozenset(_DECODERS) | frozenset(_ROW_SCALED)
