"""Decodes quantised weights inside Triton kernels: one decoder per type, for the file's own bytes.

A row of n weights has n / 2 *lanes*, and 16 lanes are a *group*. A lane is two weights, at index
`first` and at `first` + PAIR. In most small types, the two share a byte of the file. A sum may
run over k in any order, so kernels need not interleave the two. They read the activations at the
same two indices.

A decoder takes pointers to rows (uint8), groups (int32) and lanes 0..15 (int32). Their shapes
broadcast, such as (N, 1, 1), (1, G, 1) and (1, 1, 16). It returns both weights, float32 (N, G, 16).
Scales depend on row and group alone, so they are unpacked once per group and broadcast.

`deskside.gguf.decoders` specifies the layouts; tests compare with it. Blocks start on borders of 2
bytes, or of 4 in the types that are read in 32-bit words here.
"""

import triton
import triton.language as tl

from deskside.backends.triton.codes import byte, e2m1, half, k0, k5, k6, minus, word

# Distance of a lane's two weights. Types not listed have no kernel.
PAIR: dict[str, int] = {
    "F32": 16, "F16": 16, "BF16": 16, "Q8_0": 16, "Q6_0": 16, "Q4_0": 16, "MXFP4": 16, "IQ4_NL": 16,
    "IQ4_XS": 16, "IQ4_K": 16, "IQ4_KS": 16, "IQ4_KSS": 16, "Q2_K": 32, "Q3_K": 32, "Q4_K": 32,
    "Q5_K": 32, "IQ5_K": 32, "IQ5_KS": 32, "IQ6_K": 32, "Q6_K": 64,
}  # fmt: skip


@triton.jit
def first(group, i, PAIR: tl.constexpr):
    """The index within the row of a lane's first weight."""
    GROUPS: tl.constexpr = PAIR // 16
    return group // GROUPS * (2 * PAIR) + group % GROUPS * 16 + i


@triton.jit
def decode(row, group, i, TYPE: tl.constexpr):
    """Both weights of each lane: float32, of the shape that row, group and i broadcast to."""
    if TYPE == "F32":
        return _plain(row.to(tl.pointer_type(tl.float32)), group, i)
    elif TYPE == "F16":
        return _plain(row.to(tl.pointer_type(tl.float16)), group, i)
    elif TYPE == "BF16":
        return _plain(row.to(tl.pointer_type(tl.bfloat16)), group, i)
    elif TYPE == "Q8_0":
        return _q8_0(row, group, i)
    elif TYPE == "Q6_0":
        return _q6_0(row, group, i)
    elif TYPE == "Q4_0":
        return _q4_0(row, group, i)
    elif TYPE == "MXFP4":
        return _mxfp4(row, group, i)
    elif TYPE == "Q2_K":
        return _q2_k(row, group, i)
    elif TYPE == "Q3_K":
        return _q3_k(row, group, i)
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
    elif TYPE == "IQ4_K":
        return _iq4_k(row, group, i)
    elif TYPE == "IQ5_K":
        return _iq5_k(row, group, i)
    elif TYPE == "IQ6_K":
        return _iq6_k(row, group, i)
    elif TYPE == "IQ5_KS":
        return _iq5_ks(row, group, i)
    elif TYPE == "IQ4_KS":
        return _iq4_ks(row, group, i)
    else:
        tl.static_assert(TYPE == "IQ4_KSS")
        return _iq4_kss(row, group, i)


@triton.jit
def _plain(row, group, i):
    k = first(group, i, 16)
    return tl.load(row + k).to(tl.float32), tl.load(row + k + 16).to(tl.float32)


@triton.jit
def _q8_0(row, group, i):
    block = row + group * 34
    q = (block + 2 + i).to(tl.pointer_type(tl.int8))
    d = half(block)
    return d * tl.load(q).to(tl.float32), d * tl.load(q + 16).to(tl.float32)


@triton.jit
def _q6_0(row, group, i):
    block = row + group * 26
    q = byte(block + 10 + i)
    h = byte(block + 2 + i % 8) >> (i // 8 * 4)
    d = half(block)
    return d * minus((q & 15) | ((h & 3) << 4), 32), d * minus((q >> 4) | ((h & 12) << 2), 32)


@triton.jit
def _mxfp4(row, group, i):
    block = row + group * 17
    q = byte(block + 1 + i)
    e = byte(block)
    bits = tl.where(e < 2, (e + 1) << 21, (e - 1) << 23)
    d = bits.to(tl.float32, bitcast=True)
    return d * e2m1(q & 15), d * e2m1(q >> 4)


@triton.jit
def _q2_k(row, group, i):
    block = row + group // 8 * 84
    t = group % 8 // 2  # the 64 weights of the lane; its sub-blocks are 4t + group % 2 and 2 more
    q = byte(block + 16 + t // 2 * 32 + group % 2 * 16 + i) >> (t % 2 * 4)
    s0 = byte(block + t * 4 + group % 2)
    s1 = byte(block + t * 4 + group % 2 + 2)
    d = half(block + 80)
    dmin = half(block + 82)
    a = d * minus(s0 & 15, 0) * minus(q & 3, 0) - dmin * minus(s0 >> 4, 0)
    b = d * minus(s1 & 15, 0) * minus((q >> 2) & 3, 0) - dmin * minus(s1 >> 4, 0)
    return a, b


@triton.jit
def _q3_k(row, group, i):
    block = row + group // 8 * 110
    t = group % 8 // 2
    at = group % 2 * 16 + i
    q = byte(block + 32 + t // 2 * 32 + at) >> (t % 2 * 4)
    h = byte(block + at) >> (t * 2)
    d = half(block + 108)
    d0 = d * _q3_scale(block + 96, t, group % 2)
    d1 = d * _q3_scale(block + 96, t, group % 2 + 2)
    return d0 * minus((q & 3) | ((h & 1) << 2), 4), d1 * minus(((q >> 2) & 3) | ((h & 2) << 1), 4)


@triton.jit
def _q3_scale(scales, t, j):
    """Scale of sub-block 4t + j."""
    low = byte(scales + t % 2 * 4 + j) >> (t // 2 * 4)
    high = byte(scales + 8 + j) >> (t * 2)
    return minus((low & 15) | ((high & 3) << 4), 32)


@triton.jit
def _q4_0(row, group, i):
    block = row + group * 18
    q = byte(block + 2 + i)
    d = half(block)
    return d * minus(q & 15, 8), d * minus(q >> 4, 8)


@triton.jit
def _k_scales(block, group):
    """Header of Q4_K and Q5_K -> (d sc, dmin m) of the lane's first and second weight.

    A sub-block has 32 weights, and the lane's two are in sub-blocks 2t and 2t + 1. The scales are
    packed in three words. Byte j & 3 of each word belongs to sub-blocks j and j + 4 (see
    `gguf.decoders._k_scales`).
    """
    d = half(block)
    dmin = half(block + 2)
    t = group % 8 // 2
    shift = (t & 1) * 16
    a = word(block + 4) >> shift
    b = word(block + 8) >> shift
    c = word(block + 12) >> shift
    sc0, m0 = _k_scale(a, b, c, t)
    sc1, m1 = _k_scale(a >> 8, b >> 8, c >> 8, t)
    return d * sc0, dmin * m0, d * sc1, dmin * m1


@triton.jit
def _k_scale(a, b, c, t):
    sc = tl.where(t < 2, a & 63, (c & 15) | ((a >> 2) & 48))
    m = tl.where(t < 2, b & 63, ((c >> 4) & 15) | ((b >> 2) & 48))
    return minus(sc, 0), minus(m, 0)


@triton.jit
def _q4_k(row, group, i):
    block = row + group // 8 * 144
    d0, m0, d1, m1 = _k_scales(block, group)
    q = byte(block + 16 + group % 8 * 16 + i)
    return d0 * minus(q & 15, 0) - m0, d1 * minus(q >> 4, 0) - m1


@triton.jit
def _five_bits(qs, qh, group, i):
    """Codes of the lane, see `decoders._five_bits`."""
    q = byte(qs + group % 8 * 16 + i)
    h = byte(qh + group % 2 * 16 + i) >> (group % 8 // 2 * 2)
    return (q & 15) | ((h & 1) << 4), (q >> 4) | ((h & 2) << 3)


@triton.jit
def _q5_k(row, group, i):
    block = row + group // 8 * 176
    d0, m0, d1, m1 = _k_scales(block, group)
    q0, q1 = _five_bits(block + 48, block + 16, group, i)
    return d0 * minus(q0, 0) - m0, d1 * minus(q1, 0) - m1


@triton.jit
def _q6_k(row, group, i):
    block = row + group // 8 * 210
    part = group % 8 // 4
    low = byte(block + group % 8 * 16 + i)
    high = byte(block + 128 + part * 32 + group % 2 * 16 + i) >> (group % 4 // 2 * 2)
    d = half(block + 208)
    # int8 scales, one per 16 weights; the second weight is 64 weights later
    sc = (block + 192 + part * 8 + group % 4).to(tl.pointer_type(tl.int8))
    q0 = (low & 15) | ((high & 3) << 4)
    q1 = (low >> 4) | (high & 48)
    d0 = d * tl.load(sc).to(tl.float32)
    d1 = d * tl.load(sc + 4).to(tl.float32)
    return d0 * minus(q0, 32), d1 * minus(q1, 32)


@triton.jit
def _iq4_nl(row, group, i):
    block = row + group * 18
    q = byte(block + 2 + i)
    d = half(block)
    return d * k0(q & 15), d * k0(q >> 4)


@triton.jit
def _iq4_xs(row, group, i):
    block = row + group // 8 * 136
    at = group % 8
    head = word(block)  # fp16 d, then two high bits of each of eight scales
    d = (head & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    low = word(block + 4) >> (at * 4)
    high = head >> (16 + at * 2)
    scale = d * minus((low & 15) | ((high & 3) << 4), 32)
    q = byte(block + 8 + group % 8 * 16 + i)
    return scale * k0(q & 15), scale * k0(q >> 4)


@triton.jit
def _iq4_k(row, group, i):
    block = row + group // 8 * 144
    at = group % 8
    head = word(block)  # fp16 d, then the codebook of each of 16 sub-blocks
    d = (head & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    books = head >> (16 + at * 2)
    low = byte(block + 8 + at)
    high = word(block + 4) >> (at * 4)
    d0 = d * minus((low & 15) | ((high & 3) << 4), 32)
    d1 = d * minus((low >> 4) | ((high & 12) << 2), 32)
    q = byte(block + 16 + at * 16 + i)
    c0 = k0(q & 15) + minus((books & 1) * 4, 0)
    c1 = k0(q >> 4) + minus((books & 2) * 2, 0)
    return d0 * c0, d1 * c1


@triton.jit
def _iq5_k(row, group, i):
    block = row + group // 8 * 176
    t = group % 8 // 2
    j = group % 2  # sub-blocks 4t + j and 4t + j + 2
    head = word(block)
    d = (head & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    books = head >> (16 + t * 4 + j)
    low = word(block + 8 + t // 2 * 4) >> (t % 2 * 16 + j * 4)
    high = byte(block + 4 + t) >> (j * 2)
    d0 = d * minus((low & 15) | ((high & 3) << 4), 32)
    d1 = d * minus(((low >> 8) & 15) | (high & 48), 32)
    q0, q1 = _five_bits(block + 16, block + 144, group, i)
    c0 = k5(q0) + minus((books & 1) * 2, 0)
    c1 = k5(q1) + minus((books & 4) // 2, 0)
    return d0 * c0, d1 * c1


@triton.jit
def _iq6_k(row, group, i):
    block = row + group // 8 * 212
    t = group % 8 // 2
    g = t * 4 + group % 2  # the lane's first sub-block; its second is 2 further on
    head = word(block)
    d = (head & 0xFFFF).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    books = head >> (16 + g)
    sc = (block + 4 + g).to(tl.pointer_type(tl.int8))
    d0 = d * tl.load(sc).to(tl.float32)
    d1 = d * tl.load(sc + 2).to(tl.float32)
    q = byte(block + 20 + group % 8 * 16 + i)
    h = byte(block + 148 + t // 2 * 32 + group % 2 * 16 + i) >> (t % 2 * 4)
    c0 = k6((q & 15) | ((h & 3) << 4)) + minus(books & 1, 0)
    c1 = k6((q >> 4) | ((h & 12) << 2)) + minus((books >> 2) & 1, 0)
    return d0 * c0, d1 * c1


@triton.jit
def _iq5_ks(row, group, i):
    block = row + 4 + group // 8 * 168
    s0 = byte(block + group % 8 // 2 * 2)
    s1 = byte(block + group % 8 // 2 * 2 + 1)
    d = tl.load(row.to(tl.pointer_type(tl.float32)))
    q0, q1 = _five_bits(block + 8, block + 136, group, i)
    c0 = k5(q0) + minus((s0 & 1) * 2, 0)
    c1 = k5(q1) + minus((s1 & 1) * 2, 0)
    return d * minus(s0 & 254, 127) * c0, d * minus(s1 & 254, 127) * c1


@triton.jit
def _row_scaled(row, s, q):
    """Weights of IQ4_KS and IQ4_KSS from a row's float32 header, a scale byte and indices."""
    scale = tl.load(row.to(tl.pointer_type(tl.float32))) * minus(s & 254, 127)
    shift = minus((s & 1) * 4, 0)  # the second codebook is the first plus 4
    return scale * (k0(q & 15) + shift), scale * (k0(q >> 4) + shift)


@triton.jit
def _iq4_ks(row, group, i):
    block = row + 4 + group // 8 * 136
    s = byte(block + group % 8)
    return _row_scaled(row, s, byte(block + 8 + group % 8 * 16 + i))


@triton.jit
def _iq4_kss(row, group, i):
    block = row + 4 + group * 16
    # Bit 0 of each of the eight 16-bit words: bits 0 and 16 of four 32-bit ones.
    s = _kss_scale(word(block), 0) | _kss_scale(word(block + 4), 2)
    s = s | _kss_scale(word(block + 8), 4) | _kss_scale(word(block + 12), 6)
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
