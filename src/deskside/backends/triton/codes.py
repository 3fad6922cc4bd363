"""Integers to floats, loads, and codebooks: the parts that decoders of weights are made of."""

import triton
import triton.language as tl

# Codebooks + 128 as bytes of 64-bit integers, eight entries in each (as a signed number).
_K0_LOW = tl.constexpr(0x766A5D4F3F2D1801)
_K0_HIGH = tl.constexpr(0xF1D9C5B5A6998D81 - (1 << 64))
_E2M1_LOW = tl.constexpr(0x8C88868483828180 - (1 << 64))
_E2M1_HIGH = tl.constexpr(0x74787A7C7D7E7F80)
_K5_0 = tl.constexpr(0x473F362D24190E02)
_K5_1 = tl.constexpr(0x7A746E68625C554E)
_K5_2 = tl.constexpr(0xABA49D97918B857F - (1 << 64))
_K5_3 = tl.constexpr(0xF9EDE1D7CDC4BBB3 - (1 << 64))


@triton.jit
def minus(q, bias: tl.constexpr):
    """q - bias as float32, for 0 <= q < 2^23: writes q into the mantissa of 2^23.

    The two operations run at full rate; an integer conversion runs at an eighth of it.
    """
    return (q.to(tl.int32) | 0x4B000000).to(tl.float32, bitcast=True) - (8388608 + bias)


@triton.jit
def byte(p):
    return tl.load(p).to(tl.int32)


@triton.jit
def word(p):
    """A little-endian 32-bit word. After a right shift, mask the upper bits: they copy the sign."""
    return tl.load(p.to(tl.pointer_type(tl.int32)))


@triton.jit
def half(p):
    """An fp16 scale as float32."""
    return tl.load(p.to(tl.pointer_type(tl.float16))).to(tl.float32)


@triton.jit
def entry(table, q):
    """Entry q & 7 of eight in a 64-bit integer."""
    return minus((table >> ((q & 7) * 8).to(tl.int64)).to(tl.int32) & 255, 128)


@triton.jit
def k0(q):
    """K0[q] for q in 0..15, by a shift of the packed codebook."""
    return entry(tl.where((q & 8) == 0, _K0_LOW, _K0_HIGH), q)


@triton.jit
def e2m1(q):
    """MXFP4's 4-bit floats, doubled, q in 0..15."""
    return entry(tl.where((q & 8) == 0, _E2M1_LOW, _E2M1_HIGH), q)


@triton.jit
def k5(q):
    """The first 5-bit codebook, q in 0..31."""
    low = tl.where((q & 8) == 0, _K5_0, _K5_1)
    high = tl.where((q & 8) == 0, _K5_2, _K5_3)
    return entry(tl.where((q & 16) == 0, low, high), q)


@triton.jit
def k6(q):
    """The first 6-bit codebook, q in 0..63: a cubic, rounded by a float32 that has no fraction.

    No value of it is within 0.004 of a half, and float32 is off by 3e-5 at most.
    """
    x = minus(q, 0)
    cubic = x * (x * (x * 0.0011972 - 0.11218) + 6.2568) - 127
    return (cubic + 12582912) - 12582912
