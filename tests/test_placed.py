"""Any placement gives what one device gives; devices keep to their budgets and may be lost."""

from __future__ import annotations

import gc
from functools import cache as cached
from typing import Any

import numpy as np
import pytest

from deskside import LLM, SamplingParams
from deskside.backends.native.program import CpuBackend
from deskside.backends.reference import ReferenceBackend
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from deskside.tape.cache import Cache
from tests.models import PRESETS, tiny
from tests.placements import IDS, batch, cache_options, cpu_moe, drawn, named, session
from tests.torch_devices import FakeDevice, PlacedBackend, parse_devices, placed_module

pytestmark = pytest.mark.external

# `cpu_moe` of placements.py in the words of the command line.
RULES = ["_exps|token_embd=CPU", ".=emu0"]
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
DEVICES = "emu0:1GiB,emu1:1GiB,emu2:1GiB"
NAMES = {preset: list(build_tape(GGUF.open(tiny(preset))).weights()) for preset in PRESETS}


def placed(
    preset: str,
    types: str,
    placement: dict[str, str],
    *,
    native: bool = True,
    devices: str = DEVICES,
    max_tokens: int = 40,
) -> PlacedBackend:
    file = GGUF.open(tiny(preset, types))
    return PlacedBackend(
        file,
        build_tape(file),
        placement,
        parse_devices(devices),
        HostOptions(2),
        max_tokens=max_tokens,
        native=native,
    )


def results(backend: PlacedBackend, kv: str) -> list[np.ndarray]:
    return session(backend, backend.new_cache(**cache_options(kv)))


@cached
def on_one_device(preset: str, types: str, kv: str) -> list[np.ndarray]:
    placement = dict.fromkeys(NAMES[preset], "emu0")
    return results(placed(preset, types, placement, native=False), kv)


@cached
def on_the_cpu(preset: str, types: str, kv: str, reference: bool = False) -> list[np.ndarray]:
    file = GGUF.open(tiny(preset, types))
    tape = build_tape(file)
    backend = (
        ReferenceBackend(file, tape)
        if reference
        else CpuBackend(file, tape, HostOptions(2), max_tokens=40)
    )
    return session(backend, Cache(tape.states, **cache_options(kv)))


def relative(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    x, y = np.concatenate(a), np.concatenate(b)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


@pytest.mark.parametrize("name", named("tiny-moe"))
def test_placements_give_the_same_bits_on_torch(name: str) -> None:
    got = results(placed("tiny-moe", "", named("tiny-moe")[name], native=False), "q8_0")
    for a, b in zip(got, on_one_device("tiny-moe", "", "q8_0"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("preset", PRESETS)
def test_random_placements_give_the_same_bits_on_torch(preset: str, seed: int) -> None:
    got = results(placed(preset, "", drawn(NAMES[preset], seed), native=False), "f16")
    for a, b in zip(got, on_one_device(preset, "", "f16"), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("name", named("tiny-moe"))
def test_placements_equal_the_cpu_on_float_weights(name: str) -> None:
    """Native sections and torch add up in different orders: the bound of test_backends."""
    got = results(placed("tiny-moe", "F32", named("tiny-moe")[name]), "f32")
    assert relative(got, on_the_cpu("tiny-moe", "F32", "f32")) < 1e-5


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("preset", PRESETS)
def test_random_placements_equal_the_cpu_on_float_weights(preset: str, seed: int) -> None:
    placement = drawn(NAMES[preset], 100 + seed)
    got = results(placed(preset, "F32", placement), "f32")
    expected = on_the_cpu(preset, "F32", "f32")
    assert relative(got, expected) < 1e-5
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("preset", PRESETS)
def test_quantised_placements_are_as_near_to_the_reference_as_the_cpu(
    preset: str, seed: int
) -> None:
    """A value near the border of two 8-bit steps may round either way, which then moves others:
    so placements may differ by what rounding costs, and a token where two were closer than that."""
    got = results(placed(preset, "", drawn(NAMES[preset], 200 + seed)), "f16")
    cpu = on_the_cpu(preset, "", "f16")
    exact = on_the_cpu(preset, "", "f16", reference=True)
    bound = relative(cpu, exact)
    assert relative(got, exact) < 1.5 * bound
    assert relative(got, cpu) < 1.5 * bound
    for a, b in zip(np.concatenate(got), np.concatenate(cpu), strict=True):
        error = np.abs(a - b).max()
        assert b[a.argmax()] >= b.max() - 2 * error


@pytest.mark.parametrize("types", ["Q8_0", "Q4_K", "IQ4_KSS"])
def test_where_no_value_rounds_the_other_way_devices_and_cpu_agree(types: str) -> None:
    """Half of the single tokens at least: there rounding to 8 bits is the same on both sides."""
    backend = placed("tiny-dense", types, drawn(NAMES["tiny-dense"], 3))
    file = GGUF.open(tiny("tiny-dense", types))
    tape = build_tape(file)
    cpu = CpuBackend(file, tape, HostOptions(2), max_tokens=1)
    own = backend.new_cache(**cache_options("f32"))
    other = Cache(tape.states, **cache_options("f32"))
    errors = []
    for token in IDS[:11]:
        own.clear(0)
        other.clear(0)
        step = batch((0, 0, [token]))
        errors.append(relative([backend.run(step, own)], [cpu.run(step, other)]))
    assert np.median(errors) < 1e-5


def test_generation_on_devices_gives_the_tokens_of_the_cpu() -> None:
    options: dict[str, Any] = {"ctk": "f32", "ctv": "f32", "ubatch": 32}
    expected = LLM(tiny("tiny-moe", "F32"), **options).generate(IDS, GREEDY).tokens
    llm = LLM(tiny("tiny-moe", "F32"), override_tensor=RULES, devices=DEVICES, **options)
    assert llm.generate(IDS, GREEDY).tokens == expected
    assert llm.generate(IDS, GREEDY).tokens == expected  # after a reset


def test_the_order_of_native_and_device_sections_changes_nothing() -> None:
    """`profile` runs one section after another, `run` overlaps them."""
    backend = placed("tiny-moe", "", cpu_moe(NAMES["tiny-moe"]))
    step = batch((0, 0, IDS[:20]))
    together = backend.run(step, backend.new_cache(**cache_options("f16")))
    apart, micros = backend.profile(step, backend.new_cache(**cache_options("f16")))
    np.testing.assert_array_equal(together, apart)
    assert len(micros) == len(backend.sections) and min(micros) > 0


def test_cpu_moe_hops_once_out_and_once_back_per_layer() -> None:
    backend = placed("tiny-moe", "", cpu_moe(NAMES["tiny-moe"]))
    traffic = backend.traffic()
    n_layers, width, top_k = 4, 256, 4
    # Out go the normed input, the experts' numbers and weights; back comes their sum; and the
    # embedding once.
    assert traffic.hops == 1 + 2 * n_layers
    assert traffic.nbytes == 4 * (width + n_layers * (2 * width + 2 * top_k))


# ---- budgets ------------------------------------------------------------------------------------


def needed(backend: PlacedBackend, name: str, kv: str = "f16") -> int:
    """Weights, states and work memory of a device."""
    cache = backend.new_cache(**cache_options(kv))
    homes = backend.state_homes()
    states = sum(held.nbytes for i, held in cache.device_states.items() if homes[i] == name)
    work = backend._work(backend.devices[name])
    return backend.weight_bytes()[name] + states + work


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("types", ["", "F32"])
def test_a_device_never_holds_more_than_was_reckoned(preset: str, types: str) -> None:
    for placement in (dict.fromkeys(NAMES[preset], "emu0"), cpu_moe(NAMES[preset])):
        backend = placed(preset, types, placement)
        limit = needed(backend, "emu0")
        gc.collect()
        meter = backend.devices["emu0"].meter
        meter.peak = meter.live
        results(backend, "f16")
        assert backend.weight_bytes()["emu0"] < meter.peak <= limit


def test_what_was_reckoned_is_enough_and_a_byte_less_is_refused() -> None:
    placement = cpu_moe(NAMES["tiny-moe"])
    limit = needed(placed("tiny-moe", "", placement), "emu0")
    expected = results(placed("tiny-moe", "", placement), "f16")
    exact = placed("tiny-moe", "", placement, devices=f"emu0:{limit}")
    for a, b in zip(results(exact, "f16"), expected, strict=True):
        np.testing.assert_array_equal(a, b)
    less = placed("tiny-moe", "", placement, devices=f"emu0:{limit - 1}")
    with pytest.raises(DesksideError, match=r"emu0: work memory .* \(1 bytes\) short"):
        less.new_cache(**cache_options("f16"))


def test_weights_that_do_not_fit_are_refused_before_any_is_read() -> None:
    placement = cpu_moe(NAMES["tiny-moe"])
    with pytest.raises(DesksideError, match=r"emu0: weights and work memory .* short") as caught:
        placed("tiny-moe", "", placement, devices="emu0:100KiB")
    assert "\n" not in str(caught.value)
    with pytest.raises(DesksideError, match=r"emu0 lacks .* bytes .*; enough would be: -ub \d+"):
        LLM(tiny(), override_tensor=RULES, devices="emu0:46MiB", ctx=8192)


def test_a_failed_load_frees_what_it_took() -> None:
    devices = parse_devices("emu0:1GiB")
    file = GGUF.open(tiny())
    tape = build_tape(file)
    placement = cpu_moe(tape.weights())
    with pytest.raises(DesksideError, match="--isa mmx"):
        PlacedBackend(file, tape, placement, devices, HostOptions(isa="mmx"), max_tokens=1)
    gc.collect()
    assert devices[0].meter.peak > 1 << 20 and devices[0].meter.live == 0


def test_a_step_beyond_the_budget_is_one_line_and_leaves_a_model_that_works() -> None:
    llm = LLM(tiny(), override_tensor=RULES, devices="emu0:1GiB", ctx=256)
    expected = llm.generate(IDS, GREEDY).tokens
    meter = llm.backend.devices["emu0"].meter  # type: ignore[attr-defined]
    gc.collect()
    meter.budget = meter.live + 10_000
    with pytest.raises(DesksideError, match=r"emu0 has no room while receiving values: .* short"):
        llm.logits(IDS)
    meter.budget = 1 << 30
    assert llm.generate(IDS, GREEDY).tokens == expected


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 1, 40])
def test_a_device_lost_mid_run_ends_with_one_line_and_an_empty_sequence(
    after: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(placed_module, "EmulatedDevice", FakeDevice)
    rules = [r"^blk\.2\.(?!.*_exps)=emu1", *RULES]
    llm = LLM(tiny(), override_tensor=rules, devices="emu0:1GiB,emu1:1GiB", ctx=256)
    expected = llm.generate(IDS, GREEDY).tokens
    llm.reset()
    stream = llm.stream(IDS, GREEDY)
    next(stream)
    device = llm.backend.devices["emu1"]  # type: ignore[attr-defined]
    device.ops_until_loss = after
    with pytest.raises(DesksideError, match="device emu1 was lost while") as caught:
        list(stream)
    assert "\n" not in str(caught.value)
    for held in llm.cache.device_states.values():
        if held._recurrent and held._device is not device:  # type: ignore[attr-defined]
            assert not held.arrays[0].any()  # type: ignore[attr-defined]
    for state, arrays in zip(llm.cache.states, llm.cache.arrays, strict=True):
        assert not (arrays and hasattr(state, "v_heads") and arrays[0].any())
    with pytest.raises(DesksideError, match="device emu1 was lost while"):
        llm.generate(IDS, GREEDY)
    device.lost, device.ops_until_loss = False, None  # it is back
    llm.reset()
    assert llm.generate(IDS, GREEDY).tokens == expected


@pytest.mark.parametrize(
    ("devices", "part"),
    [
        ("emu0", "emu0:96GiB"),
        ("emu0:0", "more than 0"),
        ("emu0:lots", "is no size"),
        ("emu0:-1GiB", "is no size"),
        ("emu0:1GiB,EMU0:2GiB", "emu0 twice"),
        ("cuda99", "cuda99:96GiB"),
        ("emu0:1GiB,cuda99:9GiB", "torch sees 0 CUDA devices"),
        ("vulkan0", "expected cudaN"),
        ("", "there is no device emu0"),
        ("none", "there is no device emu0"),
    ],
)
def test_bad_devices_are_named(devices: str, part: str) -> None:
    rules = ["token_embd=CPU", "blk.0=emu0", ".=cuda99" if "cuda" in devices else ".=emu0"]
    with pytest.raises(DesksideError, match=part):
        LLM(tiny(), override_tensor=rules, devices=devices)


def test_a_placement_must_name_every_tensor_and_only_known_devices() -> None:
    placement = dict.fromkeys(NAMES["tiny-moe"], "cpu")
    with pytest.raises(
        DesksideError, match=r"output_norm\.weight on gpu; the devices are cpu, emu0"
    ):
        placed("tiny-moe", "", placement | {"output_norm.weight": "gpu"}, devices="emu0:1MiB")
    del placement["blk.1.ssm_a"]
    with pytest.raises(DesksideError, match=r"no device for tensor blk\.1\.ssm_a"):
        placed("tiny-moe", "", placement)


def test_a_cache_of_another_kind_is_refused() -> None:
    backend = placed("tiny-moe", "", cpu_moe(NAMES["tiny-moe"]))
    with pytest.raises(ValueError, match="new_cache"):
        backend.run(batch((0, 0, IDS[:3])), Cache(backend.tape.states, **cache_options("f16")))
