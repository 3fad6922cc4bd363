"""The decoders against the `gguf` package, ik_llama.cpp, and scalar twins of the layouts."""

from __future__ import annotations

import struct
from collections.abc import Callable

import gguf
import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.gguf.decoders import K0, unpack_kss
from deskside.gguf.quants import (
    BY_NAME,
    TYPES,
    UNSUPPORTED,
    dequantize,
    non_finite_rows,
    quant_type,
)
from tests import ik_ggml

MAINLINE = [
    "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
    "IQ4_NL", "IQ4_XS", "MXFP4",
]  # fmt: skip
IK = ["Q6_0", "IQ4_K", "IQ5_K", "IQ6_K", "IQ4_KS", "IQ4_KSS", "IQ5_KS"]


def finite_rows(name: str, rows: int, n: int, seed: int = 0) -> np.ndarray:
    """Random bytes, except that every exponent of a float value or scale is below all ones."""
    t = BY_NAME[name]
    data = np.random.default_rng(seed).integers(0, 256, (rows, t.row_bytes(n)), np.uint8)
    if name in ("F16", "BF16"):
        data[:, 1::2] &= 0xBB
    if t.row_header:
        data[:, 3] &= 0xBF
    blocks = data[:, t.row_header :].reshape(rows, -1, t.block_bytes)
    for at in t.scales:
        blocks[:, :, at + 1] &= 0xBB
    if name == "MXFP4":
        blocks[:, :, 0] %= 253
    return data


def test_sizes_agree_with_the_gguf_package() -> None:
    for t in TYPES.values():
        if t.name not in IK:
            kind = gguf.GGMLQuantizationType(t.id)
            assert (kind.name, gguf.GGML_QUANT_SIZES[kind]) == (t.name, (t.block, t.block_bytes))


def test_no_type_is_both_supported_and_not() -> None:
    assert not TYPES.keys() & UNSUPPORTED.keys()


@pytest.mark.parametrize("name", MAINLINE)
def test_decoder_equals_gguf_bit_for_bit(name: str) -> None:
    data = finite_rows(name, 400, 1024)
    expected = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[name])
    got = dequantize(data, BY_NAME[name], 1024)
    assert np.array_equal(got.view(np.uint32), expected.reshape(400, 1024).view(np.uint32))


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_every_half_precision_pattern(name: str) -> None:
    patterns = np.arange(65536, dtype="<u2")
    got = dequantize(patterns.view(np.uint8)[None], BY_NAME[name], 65536)[0]
    if name == "F16":
        expected = np.array([struct.unpack("<e", struct.pack("<H", p))[0] for p in patterns])
    else:
        expected = np.array([struct.unpack("<f", struct.pack("<HH", 0, p))[0] for p in patterns])
    assert np.array_equal(got, expected.astype(np.float32), equal_nan=True)


def test_float_and_integer_tensors_are_cast() -> None:
    for name, dtype in (("F32", "<f4"), ("F64", "<f8"), ("I8", "<i1"), ("I32", "<i4")):
        x = np.array([[1, -2, 100], [0, 7, -128]], dtype)
        raw = x.view(np.uint8).reshape(2, -1)
        assert np.array_equal(dequantize(raw, BY_NAME[name], 3), x.astype(np.float32))


def kss_word(word: int) -> tuple[int, list[int]]:
    """docs/MODEL.md for one word: its scale bit, and the indices of 2k, 2k+16, 2k+1, 2k+17."""
    v = word & 0xFFFE
    w = v ^ (v >> 1)
    return word & 1, [w & 15, w >> 4 & 15, w >> 8 & 15, w >> 12]


def kss_row(row: bytes, n: int) -> list[float]:
    """A row of IQ4_KSS, one weight at a time, in float32 steps d * scale, then * code."""
    (d,) = struct.unpack_from("<f", row)
    out = np.zeros(n, np.float32)
    for block in range(n // 32):
        scale, index = 0, {}
        for k in range(8):
            (word,) = struct.unpack_from("<H", row, 4 + 16 * block + 2 * k)
            bit, nibbles = kss_word(word)
            scale |= bit << k
            for element, q in zip((2 * k, 2 * k + 16, 2 * k + 1, 2 * k + 17), nibbles, strict=True):
                index[element] = q
        dl = np.float32(d) * np.float32((scale & 254) - 127)
        for element, q in index.items():
            out[32 * block + element] = dl * np.float32(K0[q] + 4 * (scale & 1))
    return list(out)


def ks_row(row: bytes, n: int) -> list[float]:
    (d,) = struct.unpack_from("<f", row)
    out = np.zeros(n, np.float32)
    for block in range(n // 32):
        base = 4 + 136 * (block // 8)
        scale = row[base + block % 8]
        dl = np.float32(d) * np.float32((scale & 254) - 127)
        for j in range(16):
            byte = row[base + 8 + 16 * (block % 8) + j]
            for element, q in ((j, byte & 15), (j + 16, byte >> 4)):
                out[32 * block + element] = dl * np.float32(K0[q] + 4 * (scale & 1))
    return list(out)


def test_iq4_kss_worked_example() -> None:
    assert kss_word(0x1235) == (1, [14, 2, 11, 1])
    scale, qs = unpack_kss(np.array([0x1235] + 7 * [0], np.uint16))
    assert scale == 1
    assert [qs[0] & 15, qs[0] >> 4, qs[1] & 15, qs[1] >> 4] == [14, 2, 11, 1]


def test_all_65536_iq4_kss_words() -> None:
    words = np.arange(65536, dtype=np.uint16)
    scales, qs = unpack_kss(words.reshape(-1, 8))
    pairs = qs.reshape(-1, 2)
    got_bits = np.unpackbits(scales, bitorder="little")
    nibbles = np.stack([pairs[:, 0] & 15, pairs[:, 0] >> 4, pairs[:, 1] & 15, pairs[:, 1] >> 4], 1)
    for word, bit, got in zip(words.tolist(), got_bits.tolist(), nibbles.tolist(), strict=True):
        assert (bit, got) == kss_word(word)


@pytest.mark.parametrize(("name", "twin"), [("IQ4_KS", ks_row), ("IQ4_KSS", kss_row)])
def test_row_scaled_types_equal_their_scalar_twin(
    name: str, twin: Callable[[bytes, int], list[float]]
) -> None:
    data = finite_rows(name, 6, 1024)
    with np.errstate(over="ignore"):
        expected = np.array([twin(row.tobytes(), 1024) for row in data], np.float32)
    assert np.array_equal(dequantize(data, BY_NAME[name], 1024), expected)


@pytest.mark.external
@pytest.mark.parametrize("name", [name for name in IK if name != "IQ6_K"])
def test_ik_types_equal_ik_llama_cpp_bit_for_bit(name: str) -> None:
    data = finite_rows(name, 50, 1024)
    expected = ik_ggml.decode(name.lower(), data, 1024)
    got = dequantize(data, BY_NAME[name], 1024)
    assert np.array_equal(got.view(np.uint32), expected.view(np.uint32))


@pytest.mark.external
def test_iq6_k_rounds_the_cubic_of_iks_row_decoder() -> None:
    """With d = 1 and scales of 1 its row decoder returns the cubic. Its products do not: below."""
    data = finite_rows("IQ6_K", 20, 1024)
    blocks = data.reshape(-1, 212)
    blocks[:, :2] = np.array([1], np.float16).view(np.uint8)
    blocks[:, 4:20] = 1
    cubic = ik_ggml.decode("iq6_k", data, 1024)
    assert np.array_equal(dequantize(data, BY_NAME["IQ6_K"], 1024), np.rint(cubic))


@pytest.mark.external
def test_iq6_k_equals_what_iks_products_multiply_with() -> None:
    """An activation of 127 among zeros has the scale 1, so it gives a weight times 127. Products
    may round once more than the decoder, by an ulp."""
    t, n = BY_NAME["IQ6_K"], 256
    data = finite_rows("IQ6_K", 16, n)
    got = [ik_ggml.product(t.id, data, row) for row in 127 * np.eye(n, dtype=np.float32)]
    np.testing.assert_allclose(np.stack(got, 1), 127 * dequantize(data, t, n), rtol=2**-22)


def test_row_bytes() -> None:
    kss = BY_NAME["IQ4_KSS"]
    assert (kss.row_bytes(4096), kss.row_bytes(1024)) == (2052, 516)
    assert BY_NAME["IQ4_KS"].row_bytes(512) == 4 + 2 * 136
    for n in (0, -256, 100, 255):
        with pytest.raises(DesksideError, match=r"IQ4_KSS.*256"):
            kss.row_bytes(n)


def test_quant_type_by_name() -> None:
    assert quant_type("iq4_kss") is BY_NAME["IQ4_KSS"]
    with pytest.raises(DesksideError, match=r"'Q9'.*IQ4_NL"):
        quant_type("Q9")


def test_dequantize_refuses_a_wrong_shape() -> None:
    with pytest.raises(DesksideError, match="Q8_0"):
        dequantize(np.zeros((2, 33), np.uint8), BY_NAME["Q8_0"], 32)
    with pytest.raises(DesksideError, match="Q8_0"):
        dequantize(np.zeros((2, 34), np.int8), BY_NAME["Q8_0"], 32)


@pytest.mark.parametrize("name", [*MAINLINE, *IK, "F32", "F64"])
def test_non_finite_rows_finds_scales_and_only_those(name: str) -> None:
    t = BY_NAME[name]
    clean = np.full((5, t.row_bytes(512)), 0xFF, np.uint8)
    places = [at + t.row_header + t.block_bytes for at in t.scales]
    for at in t.scales:
        clean[:, t.row_header :].reshape(5, -1, t.block_bytes)[:, :, at : at + 2] = 0x3B
    infinity = b"\x00\x7c"
    if t.row_header:
        clean[:, :4] = 0x3B
        places, infinity = [0], b"\x00\x00\x80\x7f"
    if name == "MXFP4":
        clean[:, ::17] = 252
        places, infinity = [17], b"\xfd"
    if t.block == 1:
        clean[:] = 0x3B
        places = [7 * t.block_bytes]
        infinity = {
            "F16": b"\x00\xfc",
            "BF16": b"\x80\xff",
            "F32": b"\x00\x00\x80\xff",
            "F64": struct.pack("<d", float("nan")),
        }[name]
    assert non_finite_rows(clean, t).size == 0
    for at in places:
        broken = clean.copy()
        broken[[1, 4], at : at + len(infinity)] = np.frombuffer(infinity, np.uint8)
        assert non_finite_rows(broken, t).tolist() == [1, 4]
