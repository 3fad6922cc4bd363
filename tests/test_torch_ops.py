"""What torch computes on a device, against its specification in NumPy."""

from __future__ import annotations

import gc
from importlib import import_module

import numpy as np
import pytest

from deskside.backends.native.program import KERNEL_TYPES, CpuBackend
from deskside.gguf import GGUF
from deskside.gguf.decoders import DECODERS, ROW_SCALED
from deskside.gguf.encoders import quantize
from deskside.gguf.quants import dequantize, quant_type
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from deskside.tape.cache import Cache
from tests.models import tiny
from tests.placements import cache_options, session
from tests.torch_devices import PlacedBackend, emulated, parse_devices, torch_ops, torch_quants

torch = import_module("torch")

pytestmark = pytest.mark.external


SPECIFIED = {*DECODERS, *ROW_SCALED} - {"F64", "I8", "I16", "I32", "I64"}


@pytest.mark.parametrize("name", sorted(SPECIFIED))
def test_every_type_decodes_to_the_bits_of_the_specification(name: str) -> None:
    t = quant_type(name)
    n = 512
    data = np.random.default_rng(t.id).integers(0, 256, (64, t.row_bytes(n)), np.uint8)
    got = torch_quants.dequantize(torch.from_numpy(data), t, n).numpy()
    np.testing.assert_array_equal(got, dequantize(data, t, n))


def test_all_types_of_weights_are_decoded() -> None:
    assert torch_quants.TYPES == SPECIFIED
    assert KERNEL_TYPES <= SPECIFIED


@pytest.mark.parametrize("name", ["F32", "F16", "Q8_0"])
def test_cached_rows_are_the_bytes_that_the_cache_defines(name: str) -> None:
    t = quant_type(name)
    x = np.random.default_rng(1).standard_normal((3, 5, 64)).astype(np.float32)
    x[0, 0, :32] = 0
    x[1, 1, :3] = (127, 0.5, -1.5)  # halves: away from zero
    got = torch_quants.encode_cached(torch.from_numpy(x), name)
    expected = quantize(x.reshape(15, 64), t)
    np.testing.assert_array_equal(got.numpy().reshape(15, -1), expected)
    decoded = torch_quants.decode_cached(got, name).numpy()
    np.testing.assert_array_equal(decoded.reshape(15, 64), dequantize(expected, t, 64))


def test_rounding_to_8_bits() -> None:
    x = np.random.default_rng(2).standard_normal((4, 96)).astype(np.float32)
    x[0, :32] = 1e-31
    got = torch_quants.round_to_8_bits(torch.from_numpy(x)).numpy()
    assert not got[0, :32].any()
    blocks = x.reshape(-1, 32)[1:]
    d = np.abs(blocks).max(1, keepdims=True) / np.float32(127)
    np.testing.assert_allclose(got.reshape(-1, 32)[1:], np.round(blocks / d) * d, rtol=1e-6)
    x[2, 5] = np.nan
    assert np.isnan(torch_quants.round_to_8_bits(torch.from_numpy(x)).numpy()[2, :32]).all()


@pytest.mark.parametrize("strong", [False, True])
def test_a_block_of_the_delta_rule_is_its_tokens_one_by_one(strong: bool) -> None:
    heads, n, dim = 3, 64, 16
    g = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(heads, n, dim, generator=g, dtype=torch.float64) for _ in range(3))
    k = k / k.norm(dim=-1, keepdim=True)
    # Strong decay: products over the block underflow, which must not give 0 / 0.
    decay = -torch.rand(heads, n, generator=g, dtype=torch.float64) * (80 if strong else 0.1)
    beta = torch.rand(heads, n, generator=g, dtype=torch.float64)
    s0 = torch.randn(heads, dim, dim, generator=g, dtype=torch.float64)
    out, s = torch_ops.delta_block(q, k, v, decay, beta, s0)
    state = s0.clone()
    for t in range(n):
        state = state * decay[:, t, None, None].exp()
        d = beta[:, t, None] * (v[:, t] - torch.einsum("hkv,hk->hv", state, k[:, t]))
        state = state + k[:, t, :, None] * d[:, None, :]
        expected = torch.einsum("hkv,hk->hv", state, q[:, t])
        torch.testing.assert_close(out[:, t], expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(s, state, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-llama"])
def test_pieces_change_nothing_beyond_rounding(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices, gathered experts, attention and the delta rule, all in the smallest pieces."""
    monkeypatch.setattr(torch_ops, "PIECE", 40_000)
    monkeypatch.setattr(torch_ops, "DELTA_BLOCK", 7)
    file = GGUF.open(tiny(preset, "F32"))
    tape = build_tape(file)
    cpu = CpuBackend(file, tape, HostOptions(2), max_tokens=40)
    expected = session(cpu, Cache(tape.states, **cache_options("f32")))
    placement = dict.fromkeys(tape.weights(), "emu0")
    devices = parse_devices("emu0:1GiB")
    backend = PlacedBackend(file, tape, placement, devices, HostOptions(), max_tokens=40)
    got = session(backend, backend.new_cache(**cache_options("f32")))
    a, b = np.concatenate(got), np.concatenate(expected)
    assert np.linalg.norm(a - b) / np.linalg.norm(b) < 1e-5


def test_a_meter_counts_what_lives() -> None:
    meter = emulated.Meter(10_000)
    with meter:
        a = torch.zeros(500)
        view = a[10:20]
        b = a + 1
    assert meter.live == meter.peak == 4000
    del a
    gc.collect()
    assert meter.live == 4000  # the view keeps it
    del view, b
    gc.collect()
    assert (meter.live, meter.peak) == (0, 4000)
    with pytest.raises(emulated.OutOfBudget), meter:
        torch.zeros(2501)
