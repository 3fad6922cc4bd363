"""The encoders: against the `gguf` package, ik_llama.cpp's quantizers, and their own decoders."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from deskside.errors import DesksideError
from deskside.gguf.decoders import CODEBOOKS, unpack_kss
from deskside.gguf.encoders import encodable, quantize
from deskside.gguf.quants import BY_NAME, dequantize
from tests import ik_ggml

FP16_SCALED = (
    "Q6_0", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ4_K", "IQ5_K",
    "IQ6_K",
)  # fmt: skip
BLOCKY = (*FP16_SCALED, "IQ4_KS", "IQ4_KSS", "IQ5_KS", "MXFP4")


def gauss(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, n)) * 0.02).astype(np.float32)


def there_and_back(x: np.ndarray, name: str) -> np.ndarray:
    t = BY_NAME[name]
    return dequantize(quantize(x, t), t, x.shape[1])


def relative_rms(x: np.ndarray, y: np.ndarray) -> float:
    return float(np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)))


@pytest.mark.parametrize("name", ["F16", "BF16", "Q8_0"])
def test_equals_the_gguf_package_bit_for_bit(name: str) -> None:
    x = gauss(300, 512) * np.geomspace(1e-6, 1e3, 300, dtype=np.float32)[:, None]
    x[5] = 0
    expected = gguf.quants.quantize(x, gguf.GGMLQuantizationType[name])
    assert np.array_equal(quantize(x, BY_NAME[name]), expected.view(np.uint8).reshape(300, -1))


def test_bf16_rounds_ties_to_even() -> None:
    bits = np.array([[0x3F808000, 0x3F818000, 0x3F808001, 0xBF807FFF]], np.uint32)
    got = quantize(bits.view(np.float32), BY_NAME["BF16"]).view("<u2")
    assert got.tolist() == [[0x3F80, 0x3F82, 0x3F81, 0xBF80]]


def test_f32_is_stored_as_it_is() -> None:
    x = gauss(3, 7)
    assert np.array_equal(there_and_back(x, "F32"), x)


def grid_error(codes: int, block: int) -> float:
    """RMS error, in sigma, of a uniform grid over the full range of blocks of Gaussian values.

    A step s has the rounding error s / sqrt(12). The largest magnitude of 16 values is 2.0 sigma on
    average, of 32 it is 2.3 sigma.
    """
    return 2 * {16: 2.0, 32: 2.3}[block] / (codes - 1) / np.sqrt(12)


# IQ4_KSS moves the best placed of four weights in every second word. With residuals uniform in
# +-s/2 that is the largest of four, 0.4 s on average, and its square grows by s^2 (1 - 2 * 0.4):
# 0.025 s^2 per weight over all words, on top of s^2 / 12, a factor 1.14 in RMS. A third of the
# neighbouring codes have equal parity and need a longer move, hence 1.18.
# MXFP4 has one bit of mantissa: a value v lies between codes at most v / 2 apart.
BOUNDS = {
    "Q6_0": grid_error(64, 32),
    "Q2_K": grid_error(4, 16),
    "Q3_K": grid_error(8, 16),
    "Q4_K": grid_error(16, 32),
    "Q5_K": grid_error(32, 32),
    "Q6_K": grid_error(64, 16),
    "IQ4_NL": grid_error(16, 32),
    "IQ4_XS": grid_error(16, 32),
    "IQ4_K": grid_error(16, 16),
    "IQ5_K": grid_error(32, 16),
    "IQ6_K": grid_error(64, 16),
    "IQ4_KS": grid_error(16, 32),
    "IQ5_KS": grid_error(32, 32),
    "IQ4_KSS": 1.18 * grid_error(16, 32),
    "MXFP4": 1 / 2 / np.sqrt(12),
}


@pytest.mark.parametrize("name", BOUNDS)
def test_error_is_below_that_of_a_uniform_grid(name: str) -> None:
    """So the searches find more than the plain rounding to the type's grid does."""
    x = gauss(64, 2048)
    assert relative_rms(x, there_and_back(x, name)) < BOUNDS[name]


@pytest.mark.external
@pytest.mark.parametrize("name", BLOCKY)
def test_error_is_comparable_to_ik_llama_cpp(name: str) -> None:
    """Within 2 %: the searches differ in their candidates, not in what they minimise."""
    t, x = BY_NAME[name], gauss(32, 1024, seed=1)
    theirs = ik_ggml.encode(t.id, x, t.row_bytes(1024))
    reference = relative_rms(x, dequantize(theirs, t, 1024))
    assert relative_rms(x, there_and_back(x, name)) < 1.02 * reference


def test_iq4_nl_recovers_what_it_can_represent() -> None:
    rng = np.random.default_rng(0)
    index = rng.integers(0, 16, (40, 32))
    index[:, 3] = 0
    d = 2.0 ** rng.integers(-12, 3, (40, 1))
    x = (CODEBOOKS[0][index] * d).astype(np.float32)
    assert np.array_equal(there_and_back(x, "IQ4_NL"), x)


@pytest.mark.parametrize("name", ["IQ4_KS", "IQ4_KSS"])
def test_row_scaled_types_recover_what_they_can_represent(name: str) -> None:
    """Rows that the type holds exactly, with the extreme codes present in every block so that the
    scale is determined. The row scale is a fit in float32 sums of 1024 products: 1e-4 is ample."""
    t, rng = BY_NAME[name], np.random.default_rng(0)
    words = rng.integers(0, 65536, (30, 32, 8)).astype(np.uint16)
    words[:, :, 3] &= 1
    # v of the four indices 15, 0, 0, 15: w = 0xF00F, whose prefix XOR from the top is 0xA00A.
    words[:, :, 5] = (words[:, :, 5] & 1) | 0xA00A
    words[:, 7, :] |= 1
    scales, qs = unpack_kss(words)
    assert (scales[:, 7] == 255).all()
    header = rng.uniform(1e-4, 1e-3, (30, 1)).astype("<f4").view(np.uint8)
    if name == "IQ4_KSS":
        body = words.view(np.uint8).reshape(30, -1)
    else:
        parts = [scales.reshape(30, 4, 8), qs.reshape(30, 4, 128)]
        body = np.concatenate(parts, axis=2).reshape(30, -1)
    x = dequantize(np.hstack([header, body]), t, 1024)
    assert relative_rms(x, there_and_back(x, name)) < 1e-4


@pytest.mark.parametrize("name", encodable())
def test_zero_stays_zero(name: str) -> None:
    assert not there_and_back(np.zeros((3, 512), np.float32), name).any()


@pytest.mark.parametrize("name", FP16_SCALED)
def test_a_zero_block_among_others_stays_zero(name: str) -> None:
    x = gauss(2, 512)
    x[0, 256:] = 0
    x[1, 32:64] = 0
    y = there_and_back(x, name)
    assert not y[0, 256:].any()
    assert not y[1, 32:64].any()


@pytest.mark.parametrize("name", encodable())
@pytest.mark.parametrize("magnitude", [1e-45, 1e-38, 1e-20, 1e-8, 1e4])
def test_extreme_magnitudes_stay_bounded(name: str, magnitude: float) -> None:
    """Values may vanish below fp16's range, but never grow beyond the largest by a code step."""
    x = gauss(4, 512)
    x *= np.float32(magnitude) / np.abs(x).max()
    y = there_and_back(x, name)
    assert np.isfinite(y).all()
    assert np.abs(y).max() <= 1.25 * magnitude + 4e-45
    if magnitude == 1e4:
        assert relative_rms(x, y) < BOUNDS.get(name, 0.01)


@pytest.mark.parametrize("name", ["IQ4_KS", "IQ4_KSS", "BF16"])
@pytest.mark.parametrize("magnitude", [1e-20, 1e37])
def test_float32_scales_keep_the_whole_range(name: str, magnitude: float) -> None:
    x = gauss(4, 512)
    x /= np.abs(x).max()
    y = there_and_back(x * np.float32(magnitude), name) / np.float32(magnitude)
    assert relative_rms(x, y) < 0.12


@pytest.mark.parametrize("name", [*FP16_SCALED, "F16"])
def test_a_scale_beyond_fp16_is_an_error(name: str) -> None:
    with pytest.raises(DesksideError, match="fp16"):
        quantize(gauss(2, 512) * np.float32(1e12), BY_NAME[name])


def test_a_weight_beyond_bf16_is_an_error() -> None:
    largest = np.full((1, 4), np.finfo(np.float32).max)
    with pytest.raises(DesksideError, match="BF16"):
        quantize(largest, BY_NAME["BF16"])


@pytest.mark.parametrize("name", encodable())
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_weight_is_an_error_that_names_the_row(name: str, bad: float) -> None:
    x = gauss(700, 256)
    x[601, 17] = bad
    with pytest.raises(DesksideError, match="row 601"):
        quantize(x, BY_NAME[name])


def test_types_and_shapes_that_cannot_be_encoded() -> None:
    with pytest.raises(DesksideError, match=r"Q5_1.*IQ4_NL"):
        quantize(gauss(1, 256), BY_NAME["Q5_1"])
    with pytest.raises(DesksideError, match="256"):
        quantize(gauss(1, 96), BY_NAME["IQ4_KSS"])
    with pytest.raises(DesksideError, match="rows"):
        quantize(gauss(1, 96)[0], BY_NAME["Q8_0"])


@pytest.mark.parametrize("name", encodable())
def test_rows_are_independent(name: str) -> None:
    """Any cut into rows gives the same bytes, also from a view that is not contiguous."""
    x = gauss(600, 256)
    whole = quantize(x, BY_NAME[name])
    assert np.array_equal(quantize(x[100:350:2], BY_NAME[name]), whole[100:350:2])
    assert np.array_equal(quantize(np.asfortranarray(x), BY_NAME[name]), whole)


finite = st.floats(-3e4, 3e4, width=32)


@pytest.mark.parametrize("name", BLOCKY)
@settings(max_examples=40, deadline=None)
@given(x=hnp.arrays(np.float32, (1, 256), elements=finite))
def test_no_weight_strays_further_than_the_largest(name: str, x: np.ndarray) -> None:
    """Whatever the values: the result is finite, and no error exceeds 1.25 times the largest
    magnitude of the row (a moved or clipped code cannot do worse than lose its weight)."""
    y = there_and_back(x, name)
    assert np.isfinite(y).all()
    assert np.abs(y - x).max() <= 1.25 * np.abs(x).max() + 1e-3
