"""The NumPy decoders: the blocks of each quant type, byte by byte. They are the specification.

A decoder takes uint8 (N, block_bytes) and returns float32 (N, block). Where rows have a scale
(`ROW_SCALED`), it takes that too, float32 (N, 1). Layouts are those of ggml and, for IQ4_K, IQ5_K,
IQ6_K, IQ4_KS, IQ4_KSS, IQ5_KS and Q6_0, of ik_llama.cpp. All numbers are little endian.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

# The non-linear codebooks of 4, 5 and 6 bits. In row 1 every entry is larger by 4, 2 or 1. ik's
# types select it with a bit of each scale; IQ4_NL and IQ4_XS have row 0 alone.
K0 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_K5 = (
    -126, -114, -103, -92, -83, -74, -65, -57, -50, -43, -36, -30, -24, -18, -12, -6,
    -1, 5, 11, 17, 23, 29, 36, 43, 51, 59, 68, 77, 87, 97, 109, 121,
)  # fmt: skip
# The whole numbers next to ik's cubic -127 + 6.2568 q - 0.11218 q^2 + 0.0011972 q^3. Its products
# and its encoder use these; its row decoder alone has the cubic itself.
_K6 = (
    -127, -121, -115, -109, -104, -98, -93, -88, -84, -79, -74, -70, -66, -62, -58, -54,
    -51, -47, -44, -40, -37, -34, -31, -28, -25, -22, -19, -16, -13, -11, -8, -5,
    -2, 0, 3, 6, 9, 12, 14, 17, 20, 23, 27, 30, 33, 36, 40, 44,
    47, 51, 55, 59, 63, 68, 72, 77, 82, 87, 92, 98, 103, 109, 115, 121,
)  # fmt: skip
CODEBOOKS: Floats = np.array([K0, [k + 4 for k in K0]], np.float32)
CODEBOOKS_5: Floats = np.array([_K5, [k + 2 for k in _K5]], np.float32)
CODEBOOKS_6: Floats = np.array([_K6, [k + 1 for k in _K6]], np.float32)
# The values of MXFP4's 4-bit floats (sign, two bits of exponent, one of mantissa), doubled.
E2M1: Floats = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def _f16(b: Bytes) -> Floats:
    """(N, 2k) bytes -> (N, k) float32."""
    return np.ascontiguousarray(b).view("<f2").astype(np.float32)


def _nibbles(qs: Bytes) -> Bytes:
    """(..., k) bytes -> (..., 2k): all low nibbles, then all high nibbles."""
    return np.concatenate([qs & 15, qs >> 4], axis=-1)


def _bits(qh: Bytes, shifts: int, width: int) -> Bytes:
    """(N, k) bytes -> (N, shifts, k): the `width`-bit fields of each byte, lowest first."""
    by = np.arange(0, shifts * width, width, dtype=np.uint8)[:, None]
    return np.asarray((qh[:, None, :] >> by) & ((1 << width) - 1), np.uint8)


def _plain(dtype: str) -> Callable[[Bytes], Floats]:
    return lambda b: b.view(dtype).astype(np.float32)


def _bf16(b: Bytes) -> Floats:
    """The upper 16 bits of a float32."""
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _q4_0(b: Bytes) -> Floats:
    """fp16 d; qs[16], low nibbles first. y = d (q - 8)."""
    return _f16(b[:, :2]) * (_nibbles(b[:, 2:]).astype(np.float32) - 8)


def _q4_1(b: Bytes) -> Floats:
    """fp16 d, m; qs[16]. y = d q + m."""
    return _f16(b[:, :2]) * _nibbles(b[:, 4:]).astype(np.float32) + _f16(b[:, 2:4])


def _fifth_bit(qh: Bytes) -> Bytes:
    """(N, 4) bytes, bit j of the 32-bit word belongs to element j -> (N, 32) of 0 or 16."""
    bits: Bytes = np.unpackbits(qh, axis=-1, bitorder="little")
    return bits * np.uint8(16)


def _q5_0(b: Bytes) -> Floats:
    """fp16 d; qh[4]: the fifth bits; qs[16]. y = d (q - 16)."""
    q = _nibbles(b[:, 6:]) | _fifth_bit(b[:, 2:6])
    return _f16(b[:, :2]) * (q.astype(np.float32) - 16)


def _q5_1(b: Bytes) -> Floats:
    """fp16 d, m; qh[4]; qs[16]. y = d q + m."""
    q = _nibbles(b[:, 8:]) | _fifth_bit(b[:, 4:8])
    return _f16(b[:, :2]) * q.astype(np.float32) + _f16(b[:, 2:4])


def _q6_0(b: Bytes) -> Floats:
    """fp16 d; qh[8]; qs[16], low nibbles first. y = d (q - 32).

    Byte l of qh has the high two bits of weights l, 16 + l, 8 + l, 24 + l, from its lowest bits.
    """
    high = _bits(b[:, 2:10], 4, 2)[:, [0, 2, 1, 3]].reshape(-1, 32)
    q = _nibbles(b[:, 10:]) | high << 4
    return _f16(b[:, :2]) * (q.astype(np.float32) - 32)


def _q8_0(b: Bytes) -> Floats:
    """fp16 d; int8 q[32]. y = d q."""
    return _f16(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


def _q2_k(b: Bytes) -> Floats:
    """scales[16] (one per 16 weights), qs[64], fp16 d, dmin. y = d sc q - dmin m.

    sc: the low nibble of a scale; m: the high one. Each half of 128 weights has 32 bytes of qs:
    bits 0-1, 2-3, 4-5, 6-7 are the half's four groups of 32.
    """
    d = _f16(b[:, 80:82]) * (b[:, :16] & 15).astype(np.float32)
    m = _f16(b[:, 82:]) * (b[:, :16] >> 4).astype(np.float32)
    q = _bits(b[:, 16:80].reshape(-1, 32), 4, 2).reshape(-1, 16, 16)
    return d[:, :, None] * q.astype(np.float32) - m[:, :, None]


def _q3_k(b: Bytes) -> Floats:
    """hmask[32], qs[64], scales[12], fp16 d. y = d (sc - 32) (q - 4).

    Low two bits of q: qs as in Q2_K. High bit of weight l of the s-th 32: bit s of hmask[l]. The
    6-bit sc of sub-block g (16 weights): low nibble of scales[g] for g < 8, high nibble of
    scales[g - 8] from there; above it bits 2 (g // 4), 2 (g // 4) + 1 of scales[8 + g % 4].
    """
    sc = _nibbles(b[:, 96:104]) | _bits(b[:, 104:108], 4, 2).reshape(-1, 16) << 4
    d = _f16(b[:, 108:]) * (sc.astype(np.float32) - 32)
    low = _bits(b[:, 32:96].reshape(-1, 32), 4, 2).reshape(-1, 8, 32)
    q = (low | _bits(b[:, :32], 8, 1) << 2).astype(np.float32) - 4
    return d[:, :, None] * q.reshape(-1, 16, 16)


def _k_scales(b: Bytes) -> tuple[Floats, Floats]:
    """Header of Q4_K and Q5_K -> (d sc, dmin m), each (N, 8, 1): one pair per 32 weights.

    fp16 d, dmin, then 12 bytes p of 6-bit pairs. Sub-blocks j < 4: sc = p[j] & 63,
    m = p[j+4] & 63; j >= 4: sc = p[j+4] & 15 | p[j-4] >> 6 << 4, m = p[j+4] >> 4 | p[j] >> 6 << 4.
    """
    lo, mid, hi = b[:, 4:8], b[:, 8:12], b[:, 12:16]
    sc = np.concatenate([lo & 63, (hi & 15) | (lo >> 6 << 4)], axis=1)
    m = np.concatenate([mid & 63, (hi >> 4) | (mid >> 6 << 4)], axis=1)
    d = _f16(b[:, :2]) * sc.astype(np.float32)
    dmin = _f16(b[:, 2:4]) * m.astype(np.float32)
    return d[:, :, None], dmin[:, :, None]


def _five_bits(qs: Bytes, qh: Bytes) -> Bytes:
    """qs (N, 128), qh (N, 32) -> (N, 8, 32): 32 bytes of qs per 64 weights, low nibbles
    first; bit s of qh[l] is the fifth bit of weight l of the s-th 32."""
    low = _nibbles(qs.reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return np.asarray(low | _bits(qh, 8, 1) << 4, np.uint8)


def _q4_k(b: Bytes) -> Floats:
    """Header of `_k_scales`, qs: 32 bytes per 64 weights, low nibbles first.

    y = d sc q - dmin m.
    """
    d, m = _k_scales(b)
    q = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return d * q.astype(np.float32) - m


def _q5_k(b: Bytes) -> Floats:
    """As Q4_K with qh[32] before qs; q: `_five_bits`."""
    d, m = _k_scales(b)
    return d * _five_bits(b[:, 48:], b[:, 16:48]).astype(np.float32) - m


def _q6_k(b: Bytes) -> Floats:
    """ql[128], qh[64], int8 sc[16] (one per 16 weights), fp16 d. y = d sc (q - 32).

    Each half of 128 weights has 64 bytes of ql and 32 of qh. Its four groups of 32 weights use:

    low 4 bits   ql[0:32] low, ql[32:64] low, ql[0:32] high, ql[32:64] high nibbles
    high 2 bits  bits 0-1, 2-3, 4-5, 6-7 of qh
    """
    low = _nibbles(b[:, :128].reshape(-1, 64)).reshape(-1, 4, 32)
    high = _bits(b[:, 128:192].reshape(-1, 32), 4, 2)
    q = (low | high << 4).astype(np.float32) - 32
    d = _f16(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return d[:, :, None] * q.reshape(-1, 16, 16)


def _iq4_nl(b: Bytes) -> Floats:
    """fp16 d; qs[16]. y = d K0[q]."""
    codes: Floats = np.take(CODEBOOKS[0], _nibbles(b[:, 2:]))
    return _f16(b[:, :2]) * codes


def _six_bit_scales(low: Bytes, high: Bytes) -> Floats:
    """(N, k/2) and (N, k/4) bytes -> (N, k) whole scales -32..31.

    Scale i: nibble i of `low`, and above it bits 2i, 2i+1 of `high`; minus 32.
    """
    four = np.stack([low & 15, low >> 4], axis=-1).reshape(len(low), -1)
    two = ((high[:, :, None] >> np.arange(0, 8, 2, dtype=np.uint8)) & 3).reshape(len(high), -1)
    scales: Floats = (four | two << 4).astype(np.float32) - 32
    return scales


def _iq4_xs(b: Bytes) -> Floats:
    """fp16 d, scales_h[2], scales_l[4], qs[128]: 8 blocks of 32. y = d s K0[q].

    s: `_six_bit_scales`.
    """
    d = _f16(b[:, :2]) * _six_bit_scales(b[:, 4:8], b[:, 2:4])
    codes: Floats = np.take(CODEBOOKS[0], _nibbles(b[:, 8:].reshape(-1, 8, 16)))
    return d[:, :, None] * codes


def _selectors(extra: Bytes) -> Bytes:
    """(N, 2) bytes -> (N, 16, 1): bit g of the 16-bit word, the codebook of sub-block g."""
    bits: Bytes = np.unpackbits(extra, axis=-1, bitorder="little")
    return bits[:, :, None]


def _iq4_k(b: Bytes) -> Floats:
    """fp16 d, u16 extra, scales_h[4], scales_l[8], qs[128]: 16 sub-blocks of 16.

    y = d s C[q]; s: `_six_bit_scales`; C: codebook 1 where bit g of extra is set, else 0. Each 32
    weights have 16 bytes of qs: low nibbles are the first sub-block, high nibbles the second.
    """
    d = _f16(b[:, :2]) * _six_bit_scales(b[:, 8:16], b[:, 4:8])
    q = _nibbles(b[:, 16:].reshape(-1, 8, 16)).reshape(-1, 16, 16)
    codes: Floats = np.take(CODEBOOKS, q | _selectors(b[:, 2:4]) << 4)
    return d[:, :, None] * codes


def _iq5_k(b: Bytes) -> Floats:
    """fp16 d, u16 extra, scales_h[4], scales_l[8], qs[128], qh[32]: 16 sub-blocks of 16.

    As IQ4_K with the 5-bit codebooks; q: `_five_bits`.
    """
    d = _f16(b[:, :2]) * _six_bit_scales(b[:, 8:16], b[:, 4:8])
    q = _five_bits(b[:, 16:144], b[:, 144:]).reshape(-1, 16, 16)
    codes: Floats = np.take(CODEBOOKS_5, q | _selectors(b[:, 2:4]) << 5)
    return d[:, :, None] * codes


def _iq6_k(b: Bytes) -> Floats:
    """fp16 d, u16 extra, int8 sc[16] (one per 16 weights), qs[128], qh[64]. y = d sc C[q].

    C: 6-bit codebook 1 where bit g of extra is set, else 0. qs: 32 bytes per 64 weights, low
    nibbles first. Weight l of the s-th 32 has bits 2 (s % 4), 2 (s % 4) + 1 of qh[32 (s // 4) + l]
    above its nibble.
    """
    d = _f16(b[:, :2]) * b[:, 4:20].view(np.int8).astype(np.float32)
    low = _nibbles(b[:, 20:148].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    high = _bits(b[:, 148:].reshape(-1, 32), 4, 2).reshape(-1, 8, 32)
    q = (low | high << 4).reshape(-1, 16, 16)
    # 128 entries: one index reaches both codebooks.
    codes: Floats = np.take(CODEBOOKS_6, q | _selectors(b[:, 2:4]) << 6)
    return d[:, :, None] * codes


def _mxfp4(b: Bytes) -> Floats:
    """u8 e; qs[16], nibbles as IQ4_NL. y = 2^(e - 128) E2M1[q], e = 0 included.

    The scale is half of the power of two that e says (E8M0 of the OCP microscaling formats), since
    E2M1 holds doubled values.
    """
    codes: Floats = np.take(E2M1, _nibbles(b[:, 1:]))
    d = np.ldexp(np.float32(1), b[:, :1].astype(np.int32) - 128).astype(np.float32)
    return d * codes


def _scaled_codes(d: Floats, s: Bytes, qs: Bytes) -> Floats:
    """Row scale (N, 1), scale bytes (N, 8), packed indices (N, 8, 16) -> (N, 8, 32).

    The block scale is d ((s & 254) - 127), an odd multiple of d in -127..127.
    """
    dl: Floats = d * ((s & 254).astype(np.float32) - 127)
    codes: Floats = np.take(CODEBOOKS, _nibbles(qs) | (s & 1)[:, :, None] << 4)
    return dl[:, :, None] * codes


def _iq4_ks(b: Bytes, d: Floats) -> Floats:
    """u8 scales[8], qs[128]."""
    return _scaled_codes(d, b[:, :8], b[:, 8:].reshape(-1, 8, 16))


def _iq5_ks(b: Bytes, d: Floats) -> Floats:
    """u8 scales[8], qs[128], qh[32]. Block scales and codebooks as IQ4_KS; q: `_five_bits`."""
    s = b[:, :8]
    dl: Floats = d * ((s & 254).astype(np.float32) - 127)
    q = _five_bits(b[:, 8:136], b[:, 136:]) | (s & 1)[:, :, None] << 5
    codes: Floats = np.take(CODEBOOKS_5, q)
    return dl[:, :, None] * codes


def unpack_kss(words: NDArray[np.uint16]) -> tuple[Bytes, Bytes]:
    """(..., 8) words of a 32-block -> scale bytes (...), packed indices (..., 16).

    Bit 0 of word k is bit k of the scale byte. v is the word with bit 0 cleared, and
    w = v ^ v >> 1. The bytes of w are the index bytes of an IQ4_NL block. (v is the prefix XOR of w
    from the top; w has an even number of set bits, so v's bit 0 is always 0.)
    """
    s = np.packbits((words & 1).astype(np.uint8), axis=-1, bitorder="little")[..., 0]
    v = words & 0xFFFE
    return s, (v ^ (v >> 1)).astype("<u2").view(np.uint8)


def _iq4_kss(b: Bytes, d: Floats) -> Floats:
    """64 words, 8 per block of 32: see `unpack_kss`."""
    s, qs = unpack_kss(b.view("<u2").reshape(-1, 8, 8))
    return _scaled_codes(d, s, qs)


DECODERS: dict[str, Callable[[Bytes], Floats]] = {
    "F32": _plain("<f4"),
    "F64": _plain("<f8"),
    "F16": _plain("<f2"),
    "BF16": _bf16,
    "I8": _plain("<i1"),
    "I16": _plain("<i2"),
    "I32": _plain("<i4"),
    "I64": _plain("<i8"),
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
ROW_SCALED: dict[str, Callable[[Bytes, Floats], Floats]] = {
    "IQ4_KS": _iq4_ks,
    "IQ4_KSS": _iq4_kss,
    "IQ5_KS": _iq5_ks,
}
