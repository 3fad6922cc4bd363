"""Quantised weights inside Triton kernels: one decoder a type, reading the file's own bytes.

A row of n weights is read as n/2 *lanes*, 16 to a *group*. A lane is two weights that share a byte
of the file (or, in the wider types, lie as far apart): those at `first` and at `first` + PAIR. The
order in which a sum runs over k is free, so a kernel never has to interleave the two: it reads its
activations at the same two places. Decoders take pointers to rows (uint8), groups (int32) and lanes
0..15 (int32), with shapes that broadcast, such as (N, 1, 1), (1, G, 1) and (1, 1, 16), and return
both weights as float32 (N, G, 16). Scales depend on row and group alone, so they are read and
unpacked once a group and then spread.

The layouts are those of `deskside.gguf.decoders`, the specification; the tests compare with it.
Block starts are at least 2-byte aligned, and 4-byte in the types that are read by words here.
"""

import triton
import triton.language as tl

# Distance of a lane's two weights. Types that are not listed have no kernels.
PAIR: dict[str, int] = {
    "F32": 16, "F16": 16, "BF16": 16, "Q8_0": 16, "Q4_0": 16, "IQ4_NL": 16, "IQ4_XS": 16,
    "IQ4_KS": 16, "IQ4_KSS": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 64,
}  # fmt: skip

# The codebook K0 + 128 as bytes of two 64-bit integers, entries 0-7 and 8-15 (as a signed number).
_K0_LOW = tl.constexpr(0x766A5D4F3F2D1801)
_K0_HIGH = tl.constexpr(0xF1D9C5B5A6998D81 - (1 << 64))


@triton.jit
def first(group, i, PAIR: tl.constexpr):
    """Index within the row of a lane's first weight."""
    GROUPS: tl.constexpr = PAIR // 16
    return group // GROUPS * (2 * PAIR) + group % GROUPS * 16 + i


@triton.jit
def decode(row, group, i, TYPE: tl.constexpr):
    """Both weights of each lane, float32."""
    if TYPE == "F32":
        return _plain(row.to(tl.pointer_type(tl.float32)), group, i)
    elif TYPE == "F16":
        return _plain(row.to(tl.pointer_type(tl.float16)), group, i)
    elif TYPE == "BF16":
        return _plain(row.to(tl.pointer_type(tl.bfloat16)), group, i)
    elif TYPE == "Q8_0":
        return _q8_0(row, group, i)
    elif TYPE == "Q4_0":
        return _q4_0(row, group, i)
    elif TYPE == "Q4_K":
        return _q4_k(row, group, i)
    elif TYPE == "Q5_K":
        return _q5_k(row, group, i)
    elif TYPE == "Q6_K":
        return _q6_k(row, group, i)
    elif TYPE == "IQ4_NL":
        return _iq4_nl(row, group, i)
    elif TYPE == "IQ4_XS":
        return _iq4_xs(row, group, i)
    elif TYPE == "IQ4_KS":
        return _iq4_ks(row, group, i)
    else:
        tl.static_assert(TYPE == "IQ4_KSS")
        return _iq4_kss(row, group, i)


@triton.jit
def _minus(q, bias: tl.constexpr):
    """q - bias as float32, for 0 <= q < 2^23: q is planted in the mantissa of 2^23.

    A logical operation and an addition at full rate, where an integer conversion runs at an eighth.
    """
    return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + bias)


@triton.jit
def _byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def _word(p):
    """A little-endian 32-bit word; its upper bits must be masked after a shift."""
    return tl.load(p.to(tl.pointer_type(tl.int32)))


@triton.jit
def _half(p):
    """An fp16 scale as float32."""
    return tl.load(p.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def _k0(q):
    """K0[q] for q in 0..15, by a shift of the packed codebook."""
    table = tl.where((q & 8) == 0, _K0_LOW, _K0_HIGH)
    return _minus((table >> ((q & 7) * 8).to(tl.int64)).to(tl.int32) & 255, 128)


@triton.jit
def _plain(row, group, i):
    k = first(group, i, 16)
    return tl.load(row + k).to(tl.float32), tl.load(row + k + 16).to(tl.float32)


@triton.jit
def _q8_0(row, group, i):
    block = row + group * 34
    q = (block + 2 + i).to(tl.pointer_type(tl.int8))
    d = _half(block)
    return d * tl.load(q).to(tl.float32), d * tl.load(q + 16).to(tl.float32)


@triton.jit
def _q4_0(row, group, i):
    block = row + group * 18
    q = _byte(block + 2 + i)
    d = _half(block)
    return d * _minus(q & 15, 8), d * _minus(q >> 4, 8)


@triton.jit
def _k_scales(block, group):
    """Header of Q4_K and Q5_K -> (d sc, dmin m) of the lane's first and second weight.

    Sub-block j holds 32 weights; the lane's are j = 2t and 2t + 1. The three words of 6-bit pairs
    have byte j & 3 of each for j and j + 4 (see `decoders._k_scales`).
    """
    d = _half(block)
    dmin = _half(block + 2)
    t = group % 8 // 2
    shift = (t & 1) * 16
    a = _word(block + 4) >> shift
    b = _word(block + 8) >> shift
    c = _word(block + 12) >> shift
    sc0, m0 = _k_scale(a, b, c, t)
    sc1, m1 = _k_scale(a >> 8, b >> 8, c >> 8, t)
    return d * sc0, dmin * m0, d * sc1, dmin * m1


@triton.jit
def _k_scale(a, b, c, t):
    sc = tl.where(t < 2, a & 63, (c & 15) | ((a >> 2) & 48))
    m = tl.where(t < 2, b & 63, ((c >> 4) & 15) | ((b >> 2) & 48))
    return _minus(sc, 0), _minus(m, 0)


@triton.jit
def _q4_k(row, group, i):
    block = row + group // 8 * 144
    d0, m0, d1, m1 = _k_scales(block, group)
    q = _byte(block + 16 + group % 8 * 16 + i)
    return d0 * _minus(q & 15, 0) - m0, d1 * _minus(q >> 4, 0) - m1


@triton.jit
def _q5_k(row, group, i):
    block = row + group // 8 * 176
    d0, m0, d1, m1 = _k_scales(block, group)
    q = _byte(block + 48 + group % 8 * 16 + i)
    h = _byte(block + 16 + group % 2 * 16 + i) >> (group % 8 // 2 * 2)
    first_q = (q & 15) | ((h & 1) << 4)
    second_q = (q >> 4) | ((h & 2) << 3)
    return d0 * _minus(first_q, 0) - m0, d1 * _minus(second_q, 0) - m1


@triton.jit
def _q6_k(row, group, i):
    block = row + group // 8 * 210
    half = group % 8 // 4
    low = _byte(block + group % 8 * 16 + i)
    high = _byte(block + 128 + half * 32 + group % 2 * 16 + i) >> (group % 4 // 2 * 2)
    d = _half(block + 208)
    # int8 scales, one for 16 weights; the second weight is 64 further on.
    sc = (block + 192 + half * 8 + group % 4).to(tl.pointer_type(tl.int8))
    q0 = (low & 15) | ((high & 3) << 4)
    q1 = (low >> 4) | (high & 48)
    d0 = d * tl.load(sc).to(tl.float32)
    d1 = d * tl.load(sc + 4).to(tl.float32)
    return d0 * _minus(q0, 32), d1 * _minus(q1, 32)


@triton.jit
def _iq4_nl(row, group, i):
    block = row + group * 18
    q = _byte(block + 2 + i)
    d = _half(block)
    return d * _k0(q & 15), d * _k0(q >> 4)


@triton.jit
def _iq4_xs(row, group, i):
    block = row + group // 8 * 136
    at = group % 8
    head = _word(block)  # fp16 d, then two high bits of each of eight scales
    d = (head & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = _word(block + 4) >> (at * 4)
    high = head >> (16 + at * 2)
    scale = d * _minus((low & 15) | ((high & 3) << 4), 32)
    q = _byte(block + 8 + group % 8 * 16 + i)
    return scale * _k0(q & 15), scale * _k0(q >> 4)


@triton.jit
def _row_scaled(row, s, q):
    """Weights of IQ4_KS and IQ4_KSS from a row's float32 header, a scale byte and indices."""
    scale = tl.load(row.to(tl.pointer_type(tl.float32))) * _minus(s & 254, 127)
    shift = _minus((s & 1) * 4, 0)  # the second codebook is the first plus 4
    return scale * (_k0(q & 15) + shift), scale * (_k0(q >> 4) + shift)


@triton.jit
def _iq4_ks(row, group, i):
    block = row + 4 + group // 8 * 136
    s = _byte(block + group % 8)
    return _row_scaled(row, s, _byte(block + 8 + group % 8 * 16 + i))


@triton.jit
def _iq4_kss(row, group, i):
    block = row + 4 + group * 16
    # Bit 0 of each of the eight 16-bit words: bits 0 and 16 of four 32-bit ones.
    s = _kss_scale(_word(block), 0) | _kss_scale(_word(block + 4), 2)
    s = s | _kss_scale(_word(block + 8), 4) | _kss_scale(_word(block + 12), 6)
    words = (block + tl.arange(0, 8) * 2).to(tl.pointer_type(tl.uint16))
    v = tl.load(words).to(tl.int32) & 0xFFFE
    w = v ^ (v >> 1)
    q = tl.join(w & 255, w >> 8)
    if len(w.shape) == 3:
        q = q.reshape(w.shape[0], w.shape[1], 16)
    else:
        q = q.reshape(w.shape[0], w.shape[1], w.shape[2], 16)
    return _row_scaled(row, s, q)


@triton.jit
def _kss_scale(word, at: tl.constexpr):
    return ((word & 1) | ((word >> 15) & 2)) << at
