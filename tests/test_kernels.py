"""Native kernels against NumPy, for every instruction set that this machine runs."""

from __future__ import annotations

import os
import platform

import numpy as np
import pytest

from deskside import _native
from deskside.backends.native.program import KERNEL_TYPES
from deskside.gguf.quants import BY_NAME, QuantType, dequantize
from deskside.lowering.buffers import stride

ISAS = [name for name, supported in _native.instruction_sets() if supported]
QUANTISED = sorted(KERNEL_TYPES - {"F32", "F16", "BF16"})


def random_blocks(t: QuantType, rows: int, n: int, rng: np.random.Generator) -> np.ndarray:
    """Random bytes whose scales are finite: fp16 and fp32 fields get small random values."""
    data = rng.integers(0, 256, (rows, t.row_bytes(n)), np.uint8)
    if t.name in ("F32", "F16", "BF16"):
        x = rng.standard_normal((rows, n)).astype(np.float32)
        if t.name == "BF16":
            return (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        return (x if t.name == "F32" else x.astype(np.float16)).view(np.uint8)
    blocks = data[:, t.row_header :].reshape(rows, -1, t.block_bytes)
    for at in t.scales:
        d = rng.uniform(-1e-2, 1e-2, blocks.shape[:2]).astype("<f2")
        blocks[:, :, at : at + 2] = d[..., None].view(np.uint8)
    if t.name == "MXFP4":  # the exponent of its scale
        blocks[:, :, 0] = rng.integers(118, 124, blocks.shape[:2])
    if t.row_header:
        data[:, :4] = rng.uniform(1e-5, 1e-4, (rows, 1)).astype("<f4").view(np.uint8)
    return data


def rounded(x: np.ndarray) -> np.ndarray:
    """Activations as quantised weights meet them: 8 bits, d = max|x| / 127 per block of 32."""
    blocks = x.reshape(-1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    q = np.rint(blocks * (np.float32(1) / np.where(d > 0, d, 1)))
    return (q * d).astype(np.float64).reshape(x.shape)


def packed(w: np.ndarray, t: QuantType, n: int, groups: int = 1) -> _native.Weights:
    panel = _native.panel_bytes(t.id, n)
    arena = _native.Arena(groups * -(-len(w) // (16 * groups)) * panel)
    return arena.from_array(w, t.id, n, groups, 0, panel, 2)


def matmul(w: np.ndarray, t: QuantType, x: np.ndarray, isa: str, threads: int = 2) -> np.ndarray:
    """x W^T by a program of two ops: the rows of x are embedded, W is the head."""
    m, n = x.shape
    record = _native.record_bytes(n) // 4
    weights = packed(w, t, n)
    floats, records = (0, n, n), (-(-m * n // 16) * 16, record, stride(record))
    program = _native.Program(threads, m, records[0] + m * stride(record), isa)
    program.begin("rows")
    program.embed(x.view(np.uint8), BY_NAME["F32"].id, n, floats)
    if t.name in QUANTISED:
        program.quantize(floats, records)
    program.begin("tasks")
    program.linear(floats, records, False, [(weights, (0, len(w), len(w)), True, None, None)])
    program.finish()
    out = np.empty((m, len(w)), np.float32)
    tokens = np.arange(m, dtype=np.int32)
    segments = np.array([(0, 0, m)], np.int32)
    program.run(tokens, segments, tokens, out)
    return out


@pytest.mark.parametrize("name", sorted(KERNEL_TYPES))
@pytest.mark.parametrize("rows", [16, 37])
def test_unpacked_weights_are_the_files_bytes(name: str, rows: int) -> None:
    """Every bit of three matrices, whose last panel may lack rows, interleaved with others."""
    t, n, rng = BY_NAME[name], 512, np.random.default_rng(4)
    w = rng.integers(0, 256, (3 * rows, t.row_bytes(n)), np.uint8)
    other = rng.integers(0, 256, w.shape, np.uint8)
    panel = _native.panel_bytes(t.id, n)
    arena = _native.Arena(2 * 3 * -(-rows // 16) * panel)
    first = arena.from_array(w, t.id, n, 3, 0, 2 * panel, 1)
    second = arena.from_array(other, t.id, n, 3, panel, 2 * panel, 1)
    for weights, expected in ((first, w), (second, other)):
        for e in (2, 0, 1):
            to = np.full((rows, t.row_bytes(n)), 7, np.uint8)
            weights.unpack(e, to)
            np.testing.assert_array_equal(to, expected[e * rows : (e + 1) * rows])
    for e, shape in ((3, to.shape), (-1, to.shape), (0, (rows + 1, to.shape[1])), (0, (rows, 8))):
        with pytest.raises(ValueError, match="unpack"):
            first.unpack(e, np.zeros(shape, np.uint8))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", sorted(KERNEL_TYPES))
@pytest.mark.parametrize(("rows", "m"), [(7, 1), (64, 2), (5, 3), (9, 4), (131, 5), (6, 38)])
def test_matmul(name: str, isa: str, rows: int, m: int) -> None:
    rng = np.random.default_rng(rows * 100 + m)
    t = BY_NAME[name]
    n = 512 if t.block == 256 else 32 * 9
    w = random_blocks(t, rows, n, rng)
    x = (rng.standard_normal((m, n)) * rng.uniform(0.01, 30, (m, 1))).astype(np.float32)
    x[0, :32] = 0
    values = dequantize(w, t, n).astype(np.float64)
    seen = rounded(x) if name in QUANTISED else x.astype(np.float64)
    got = matmul(w, t, x, isa)
    # The kernel sums n float32 terms: rounding grows with sum |w x| by at most n / 8 additions a
    # lane, each 2^-24, plus the roundings of the scales' product.
    bound = (n / 8 + 8) * 2.0**-24 * (np.abs(seen) @ np.abs(values).T) + 1e-30
    # A value that falls between two 8-bit steps may round either way by the last place of its
    # scale: one step of one activation in a row.
    if name in QUANTISED:
        step = np.abs(x).max(1, keepdims=True) / 127
        bound = bound + 0.002 * step * np.abs(values).max()
    assert np.all(np.abs(got - seen @ values.T) <= bound)


@pytest.mark.parametrize("name", sorted(KERNEL_TYPES))
@pytest.mark.parametrize("isa", ISAS)
def test_embedding_rows_are_dequantised_exactly(name: str, isa: str) -> None:
    rng = np.random.default_rng(1)
    t = BY_NAME[name]
    n = 256 if t.block == 256 else 96
    table = random_blocks(t, 11, n, rng)
    program = _native.Program(1, 4, 4 * n, isa)
    program.begin("rows")
    program.embed(table, t.id, n, (0, n, n))
    program.begin("tasks")
    identity = packed(np.eye(n, dtype=np.float32).view(np.uint8), BY_NAME["F32"], n)
    program.linear((0, n, n), (0, 0, 0), False, [(identity, (0, n, n), True, None, None)])
    program.finish()
    out = np.empty((4, n), np.float32)
    ids = np.array([10, 0, 3, 3], np.int32)
    program.run(ids, np.array([(0, 0, 4)], np.int32), np.arange(4, dtype=np.int32), out)
    expected = dequantize(table, t, n)[ids]
    # Multiplying out q * d - m may be fused into one rounding: half a place of the product.
    np.testing.assert_allclose(out, expected, rtol=2**-22, atol=2**-22 * np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_activations_do_not_overflow(isa: str) -> None:
    """All weights -128 and all activations at the end of their range: the worst pair sums."""
    t = BY_NAME["Q8_0"]
    n = 1024
    w = np.zeros((3, n // 32, 34), np.uint8)
    w[..., :2] = np.array([1.0], "<f2").view(np.uint8)
    w[..., 2:] = np.array([-128], np.int8).view(np.uint8)
    x = np.full((6, n), 127.0, np.float32)
    x[1] = -127
    got = matmul(w.reshape(3, -1), t, x, isa)
    np.testing.assert_array_equal(np.abs(got), np.full((6, 3), 128 * 127 * n, np.float32))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["Q8_0", "Q4_K", "F32"])
def test_nan_and_infinity_are_not_rounded_away(name: str, bad: float, isa: str) -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((6, 256)).astype(np.float32)
    x[2, 100] = bad
    got = matmul(random_blocks(BY_NAME[name], 5, 256, rng), BY_NAME[name], x, isa)
    finite = np.isfinite(got)
    assert not finite[2].any() and finite[[0, 1, 3, 4, 5]].all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["Q8_0", "Q6_K", "Q4_K", "IQ4_NL", "F32"])
@pytest.mark.parametrize("m", [1, 9, 14, 40])
def test_threads_and_other_rows_change_nothing(name: str, m: int, isa: str) -> None:
    rng = np.random.default_rng(5)
    w = random_blocks(BY_NAME[name], 301, 256, rng)
    x = rng.standard_normal((m, 256)).astype(np.float32)
    one, four = (matmul(w, BY_NAME[name], x, isa, threads) for threads in (1, 4))
    np.testing.assert_array_equal(one, four)
    np.testing.assert_array_equal(one[:1], matmul(w, BY_NAME[name], x[:1], isa))


@pytest.mark.parametrize("n", [2176, 15264])
def test_rows_whose_records_fill_whole_pages(n: int) -> None:
    """The plan keeps rows of whole pages apart by padding, which records do not have."""
    assert _native.record_bytes(n) % 4096 == 0
    rng = np.random.default_rng(7)
    t = BY_NAME["Q8_0"]
    w = random_blocks(t, 20, n, rng)
    # Whole numbers up to 127 in each block: 8 bits hold them, so no rounding can part the two.
    x = rng.integers(-127, 128, (9, n)).astype(np.float32)
    x[:, ::32] = 127
    expected = x.astype(np.float64) @ dequantize(w, t, n).astype(np.float64).T
    got = matmul(w, t, x, "")
    assert np.abs(got - expected).max() <= 1e-4 * np.abs(expected).max()


@pytest.mark.skipif(
    not {"avx512", "avx512_emulated"} <= set(ISAS), reason="AVX-512 or its emulation is missing"
)
@pytest.mark.parametrize("name", sorted(KERNEL_TYPES))
def test_emulated_avx512_gives_the_same_bits(name: str) -> None:
    """What is emulated and tested anywhere is what AVX-512 machines run: the same operations in the
    same order. The products of floats are fused with the same sums in both, as long as one compiler
    made both."""
    rng = np.random.default_rng(7)
    t = BY_NAME[name]
    n = 512 if t.block == 256 else 32 * 5
    w = random_blocks(t, 53, n, rng)  # a panel alone, a pair, and rows that are not there
    for m in range(1, 41):
        x = (rng.standard_normal((m, n)) * rng.uniform(0.01, 30, (m, 1))).astype(np.float32)
        native, emulated = (matmul(w, t, x, isa) for isa in ("avx512", "avx512_emulated"))
        np.testing.assert_array_equal(native.view(np.uint32), emulated.view(np.uint32))


def test_an_emulated_instruction_set_is_never_chosen_by_default() -> None:
    """The last one that is supported is chosen: emulated ones stand before all others."""
    names = [name for name, _ in _native.instruction_sets()]
    assert not _native.choose().endswith("_emulated")
    assert names == sorted(names, key=lambda name: not name.endswith("_emulated"))
    assert _native.choose() == [name for name in names if name in ISAS][-1]


@pytest.mark.skipif(
    os.environ.get("CI") != "true" or platform.machine() != "x86_64", reason="not CI on x86-64"
)
def test_ci_tests_emulated_avx512() -> None:
    assert "avx512_emulated" in ISAS


def test_an_instruction_set_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match="avx9000 is not compiled in"):
        _native.choose("avx9000")


def test_bad_calls_are_refused() -> None:
    table = np.zeros((4, 128), np.uint8)
    program = _native.Program(1, 2, 64)
    with pytest.raises(ValueError, match="begin"):
        program.embed(table, 0, 32, (0, 32, 32))
    program.begin("rows")
    program.embed(table, 0, 32, (0, 32, 32))
    program.begin("tasks")
    weights = packed(table, BY_NAME["F32"], 32)
    program.linear((0, 32, 32), (0, 0, 0), False, [(weights, (0, 4, 4), True, None, None)])
    program.finish()
    out = np.empty((1, 4), np.float32)
    row = np.zeros(1, np.int32)
    segment = np.array([(0, 0, 1)], np.int32)
    with pytest.raises(ValueError, match="token id"):
        program.run(np.array([4], np.int32), segment, row, out)
    with pytest.raises(ValueError, match="output row"):
        program.run(row, segment, np.array([1], np.int32), out)
    with pytest.raises(ValueError, match="add up"):
        program.run(row, np.array([(0, 0, 2)], np.int32), row, out)
    with pytest.raises(ValueError, match="number of tokens"):
        program.run(np.zeros(3, np.int32), np.array([(0, 0, 3)], np.int32), row, out)
    with pytest.raises(ValueError, match="type without a kernel"):
        program.embed(table, 99, 32, (0, 32, 32))
    with pytest.raises(ValueError, match="wrong length"):
        program.embed(table, 0, 33, (0, 33, 33))
