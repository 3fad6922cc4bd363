"""The quant types: one table row and one NumPy decoder each. The decoders are the specification.

A row of `n` weights is an optional row header, then `n / block` blocks of `block_bytes` bytes. Rows
follow each other without padding. Layouts are those of ggml and, for IQ4_KS and IQ4_KSS, of
ik_llama.cpp. All integers and floats are little endian.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class QuantType:
    """How a row of weights is stored. id: the type id in GGUF. Sizes are in bytes.

    block: weights per block. scales: offsets of the fp16 scales (d, dmin or m) within a block.
    """

    id: int
    name: str
    block: int
    block_bytes: int
    row_header: int = 0
    scales: tuple[int, ...] = ()

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` weights; `n` must be a multiple of the block."""
        if n <= 0 or n % self.block:
            raise DesksideError(
                f"a row of {n} weights cannot be stored as {self.name}: "
                f"the length must be a positive multiple of {self.block}"
            )
        return self.row_header + n // self.block * self.block_bytes


# Weights of these types are multiplied with float32 activations, all others with 8-bit ones.
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
TYPES: dict[int, QuantType] = {
    t.id: t
    for t in (
        QuantType(0, "F32", 1, 4),
        QuantType(1, "F16", 1, 2),
        QuantType(2, "Q4_0", 32, 18, scales=(0,)),
        QuantType(3, "Q4_1", 32, 20, scales=(0, 2)),
        QuantType(6, "Q5_0", 32, 22, scales=(0,)),
        QuantType(7, "Q5_1", 32, 24, scales=(0, 2)),
        QuantType(8, "Q8_0", 32, 34, scales=(0,)),
        QuantType(12, "Q4_K", 256, 144, scales=(0, 2)),
        QuantType(13, "Q5_K", 256, 176, scales=(0, 2)),
        QuantType(14, "Q6_K", 256, 210, scales=(208,)),
        QuantType(20, "IQ4_NL", 32, 18, scales=(0,)),
        QuantType(23, "IQ4_XS", 256, 136, scales=(0,)),
        QuantType(24, "I8", 1, 1),
        QuantType(25, "I16", 1, 2),
        QuantType(26, "I32", 1, 4),
        QuantType(27, "I64", 1, 8),
        QuantType(28, "F64", 1, 8),
        QuantType(30, "BF16", 1, 2),
        QuantType(144, "IQ4_KS", 256, 136, row_header=4),
        QuantType(146, "IQ4_KSS", 256, 128, row_header=4),
    )
}
BY_NAME: dict[str, QuantType] = {t.name: t for t in TYPES.values()}

# Types that files may hold but deskside does not read: for the error message.
UNSUPPORTED: dict[int, str] = {
    9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
    40: "NVFP4", 133: "Q6_0", 137: "IQ2_K", 138: "IQ3_K", 139: "IQ4_K", 140: "IQ5_K",
    141: "IQ6_K", 145: "IQ2_KS", 152: "IQ5_KS", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL",
    202: "Q4_0_R8", 208: "Q8_0_R8", 212: "Q4_K_R4", 213: "Q5_K_R4", 214: "Q6_K_R4",
    220: "IQ4_NL_R4", 223: "IQ4_XS_R8", 230: "BF16_R16", 344: "IQ4_KS_R4", 353: "MXFP4_R8",
    397: "Q8_K_R16", 398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip

# The non-linear 4-bit codebooks. Row 0 is K0 (IQ4_NL, IQ4_XS); row 1 is K1 = K0 + 4, which IQ4_KS
# and IQ4_KSS select with the low bit of a block's scale byte.
K0 = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
CODEBOOKS: Floats = np.array([K0, [k + 4 for k in K0]], np.float32)


def quant_type(name: str) -> QuantType:
    """The type called `name`, upper or lower case. DesksideError lists the known names."""
    found = BY_NAME.get(name.strip().upper())
    if found is None:
        raise DesksideError(f"unknown quant type {name!r}; known types: {', '.join(BY_NAME)}")
    return found


def dequantize(data: Bytes, t: QuantType, n: int) -> Floats:
    """Decode rows of `n` weights: uint8 (rows, t.row_bytes(n)) -> float32 (rows, n).

    DesksideError if `n` or the shape of `data` does not fit the type.
    """
    row_bytes = t.row_bytes(n)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != row_bytes:
        raise DesksideError(
            f"rows of {n} weights in {t.name} are uint8 (rows, {row_bytes}), "
            f"not {data.dtype} {data.shape}"
        )
    rows = data.shape[0]
    blocks = np.ascontiguousarray(data[:, t.row_header :]).reshape(-1, t.block_bytes)
    # A damaged file may hold infinite scales. `GGUF.check_values` reports them; no warning here.
    with np.errstate(invalid="ignore", over="ignore"):
        if t.row_header:
            d = np.ascontiguousarray(data[:, : t.row_header]).view("<f4")
            per_block = np.repeat(d, n // t.block, axis=0)
            return _ROW_SCALED[t.name](blocks, per_block).reshape(rows, n)
        return _DECODERS[t.name](blocks).reshape(rows, n)


def non_finite_rows(data: Bytes, t: QuantType) -> NDArray[np.intp]:
    """Indices of the rows of uint8 (rows, row_bytes) with a NaN or Inf value, scale or header."""
    rows = data.shape[0]
    bad = np.zeros(rows, np.bool_)
    if t.name in _EXPONENT:
        dtype, mask = _EXPONENT[t.name]
        bad |= ((np.ascontiguousarray(data).view(dtype) & mask) == mask).any(axis=1)
    if t.row_header:
        dtype, mask = _EXPONENT["F32"]
        header = np.ascontiguousarray(data[:, :4]).view(dtype)
        bad |= ((header & mask) == mask)[:, 0]
    dtype, mask = _EXPONENT["F16"]
    blocks = data[:, t.row_header :].reshape(rows, -1, t.block_bytes)
    for at in t.scales:
        scale = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(dtype)
        bad |= ((scale & mask) == mask).any(axis=(1, 2))
    return np.flatnonzero(bad)


# Storage integer and exponent mask of the float types. An exponent of all ones is NaN or Inf.
_EXPONENT: dict[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}


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


def _q8_0(b: Bytes) -> Floats:
    """fp16 d; int8 q[32]. y = d q."""
    return _f16(b[:, :2]) * b[:, 2:].view(np.int8).astype(np.float32)


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


def _q4_k(b: Bytes) -> Floats:
    """Header of `_k_scales`, qs: 32 bytes per 64 weights, low nibbles first.

    y = d sc q - dmin m.
    """
    d, m = _k_scales(b)
    q = _nibbles(b[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    return d * q.astype(np.float32) - m


def _q5_k(b: Bytes) -> Floats:
    """As Q4_K with qh[32] before qs: bit s of qh[l] is the fifth bit of weight l of sub-block s."""
    d, m = _k_scales(b)
    q = _nibbles(b[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    q |= _bits(b[:, 16:48], 8, 1) << 4
    return d * q.astype(np.float32) - m


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


def _iq4_xs(b: Bytes) -> Floats:
    """fp16 d, u16 scales_h, u8 scales_l[4], qs[128]: 8 blocks of 32. y = d (ls - 32) K0[q].

    The 6-bit ls of block i: low nibble number i of scales_l, and bits 2i, 2i+1 of scales_h.
    """
    low = np.stack([b[:, 4:8] & 15, b[:, 4:8] >> 4], axis=-1).reshape(-1, 8)
    high = (b[:, 2:4].copy().view("<u2") >> np.arange(0, 16, 2, dtype=np.uint16)) & 3
    ls: Floats = (low | high << 4).astype(np.float32) - 32
    d = _f16(b[:, :2]) * ls
    codes: Floats = np.take(CODEBOOKS[0], _nibbles(b[:, 8:].reshape(-1, 8, 16)))
    return d[:, :, None] * codes


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


_DECODERS: dict[str, Callable[[Bytes], Floats]] = {
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
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
    "IQ4_NL": _iq4_nl,
    "IQ4_XS": _iq4_xs,
}
_ROW_SCALED: dict[str, Callable[[Bytes, Floats], Floats]] = {"IQ4_KS": _iq4_ks, "IQ4_KSS": _iq4_kss}
