"""Single experts in a device's memory: the same results whatever it holds, counts that add up."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside import _native
from deskside.backends.native.program import CpuBackend
from deskside.backends.reference import ReferenceBackend
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.lowering.steps import Stretch
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from deskside.tape.cache import Cache
from tests.models import tiny
from tests.offload import (
    EXPERT,
    N_EXPERT,
    NAMES,
    TABLE,
    assert_same,
    needed,
    placed,
    plain,
    record_routes,
    relative,
    results,
    results_of,
)
from tests.placements import IDS, batch, cache_options
from tests.torch_devices import ExpertCache, StreamOptions

pytestmark = pytest.mark.external

ISAS = [name for name, supported in _native.instruction_sets() if supported]


def room(experts: int, **options: Any) -> ExpertCache:
    return ExpertCache(options.pop("device", "emu0"), experts * EXPERT + TABLE, **options)


def decode(backend: Any, tokens: list[int], start: int = 0) -> None:
    cache = backend.new_cache(**cache_options("f16"))
    for i, token in enumerate(tokens, start):
        backend.run(batch((0, i, [token])), cache)


@settings(deadline=None, max_examples=3)
@given(st.data())
def test_any_contents_give_the_same_bits_on_torch(data: st.DataObject) -> None:
    device = st.sampled_from(["cpu", "cpu", "emu0", "emu1"])
    whole = {layer: data.draw(device) for layer in range(4)}
    rest = data.draw(device)
    placement = {
        name: whole[int(name.split(".")[1])] if "_exps" in name else rest for name in NAMES
    }
    cache = room(
        data.draw(st.integers(1, 140)),
        device=data.draw(st.sampled_from(["emu0", "EMU1", "emu2"])),
        policy=data.draw(st.sampled_from(["lfu", "lru"])),
        max_promotions=data.draw(st.integers(0, 50)),
        half_life=data.draw(st.sampled_from([0.5, 8.0, 512.0])),
    )
    backend = placed(native=False, placement=placement, expert_cache=cache)
    assert_same(results(backend), plain())
    metrics = backend.expert_metrics
    assert metrics.resident <= metrics.slots
    if "cpu" in whole.values() and cache.max_promotions > 0:
        assert metrics.promotions > 0


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("policy", ["lfu", "lru"])
def test_beside_the_native_program_float_models_agree(policy: str, isa: str) -> None:
    """Sums go in another order: the bound of test_placed."""
    cache = ExpertCache("emu0", 64 * 8 * EXPERT, policy, max_promotions=20)
    backend = placed("F32", expert_cache=cache, host=HostOptions(2, isa))
    got, expected = results(backend, "f32"), plain("F32", "f32", True)
    assert backend.expert_metrics.hits > 0
    assert relative(got, expected) < 1e-5
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("types", ["F32", "Q8_0"])
def test_the_native_experts_leave_out_what_is_no_experts_number(types: str, isa: str) -> None:
    """-1 is another device's; nothing else may be read as one either."""
    file = GGUF.open(tiny("tiny-moe", types))
    tape = build_tape(file)
    op = next(op for op in tape.ops if op.kind == "experts")
    stretch = Stretch((op,), op.inputs, op.outputs)
    cpu = CpuBackend(file, tape, HostOptions(2, isa), max_tokens=40, stretches=[stretch])
    cache = Cache(tape.states, **cache_options("f16"))
    rng = np.random.default_rng(1)
    x, ids, p = op.inputs

    def run(numbers: np.ndarray, shares: np.ndarray) -> np.ndarray:
        n = len(numbers)
        cpu.values(x, n)[:] = np.random.default_rng(2).standard_normal((n, x.width))
        cpu.values(ids, n)[:] = numbers
        cpu.values(p, n)[:] = shares
        step = batch((0, 0, IDS[:n]), outputs=[])
        cpu.run_stretch(0, step, cache, np.empty((0, tape.n_vocab), np.float32))
        return cpu.values(op.outputs[0], n).copy()

    for n in (1, 40):
        numbers = np.stack([rng.permutation(N_EXPERT)[: ids.width] for _ in range(n)])
        shares = rng.random((n, p.width)).astype(np.float32)
        out = rng.random(numbers.shape) < 0.4
        out[0] = [True, False, False, True]
        bad = rng.choice([-1, -7, N_EXPERT, 1e9, -1e30, np.nan, np.inf], numbers.shape)
        got = run(np.where(out, bad, numbers), shares)
        # An expert whose share is 0 adds 0: the same sum.
        np.testing.assert_array_equal(got, run(numbers, np.where(out, 0, shares)))
        assert not run(np.full(numbers.shape, -1), shares).any()


@pytest.mark.parametrize("seed", range(2))
def test_quantised_models_are_as_near_to_the_reference_as_the_cpu(seed: int) -> None:
    """A value near the border of two 8-bit steps may round either way: see test_placed."""
    file = GGUF.open(tiny("tiny-moe"))
    reference = ReferenceBackend(file, build_tape(file))
    exact = results_of(reference, Cache(reference.tape.states, **cache_options("f16")))
    bound = relative(plain("", "f16", True), exact)
    stream = StreamOptions("emu0", 1, 4 * EXPERT, host_below=3 * seed)
    backend = placed(expert_cache=room(50, max_promotions=30), stream=stream)
    assert relative(results(backend), exact) < 1.5 * bound


def test_promotions_beside_the_next_steps_change_no_bit() -> None:
    """As on CUDA: what arrives late is used late, and an eviction is seen at once."""
    backend = placed(native=False, expert_cache=room(12, max_promotions=6, half_life=2.0))
    residents = backend.offload.residents
    residents.background = True
    assert_same(results(backend), plain())
    residents.drain()
    residents.begin_step()
    metrics = backend.expert_metrics
    assert metrics.promotions - metrics.evictions == metrics.resident == 12
    assert_same(results(backend), plain())
    assert backend.expert_metrics.hits > 0 and backend.expert_metrics.evictions > 0


# ---- counts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["lfu", "lru"])
def test_hits_and_misses_are_those_of_a_recount(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = placed(native=False, expert_cache=room(30, policy=policy, max_promotions=5))
    cache = backend.new_cache(**cache_options("f16"))
    residents = backend.offload.residents
    routes = record_routes(monkeypatch)
    hits = misses = 0
    steps = [batch((0, 0, IDS[:20])), batch((0, 20, IDS[:1]), (1, 0, IDS[5:12]))]
    steps += [batch((0, 21 + i, IDS[i : i + 1]), (1, 7 + i, IDS[2:3])) for i in range(6)]
    for step in steps:
        there = residents._slot_of >= 0
        before = backend.expert_metrics
        routes.clear()
        backend.run(step, cache)
        for layer, ids in enumerate(routes):
            hits += int(there[layer, ids].sum())
            misses += int((~there[layer, ids]).sum())
        metrics = backend.expert_metrics
        assert (metrics.hits, metrics.misses) == (hits, misses)
        assert metrics.promotions - before.promotions <= 5
        assert metrics.promotions - metrics.evictions == metrics.resident <= 30
        assert metrics.promoted_bytes == metrics.promotions * EXPERT
        slots = residents._slot_of[residents._slot_of >= 0]
        assert len(set(slots.tolist())) == len(slots) == metrics.resident
    assert hits > 0 and metrics.hit_rate == hits / (hits + misses)


def test_a_text_that_repeats_itself_hits_in_the_end() -> None:
    backend = placed(native=False, expert_cache=room(48, max_promotions=16))
    cache = backend.new_cache(**cache_options("f16"))
    for _ in range(2):
        cache.clear(0)
        before = backend.expert_metrics
        for i in range(3):
            backend.run(batch((0, i, [IDS[i]])), cache)
    after = backend.expert_metrics
    assert after.misses == before.misses and after.promotions == before.promotions
    assert backend.expert_metrics.hits - before.hits == 3 * 4 * 4


def test_two_equals_do_not_take_turns() -> None:
    """Two tokens whose experts do not all fit: lfu settles, for a newcomer must be hotter."""
    backend = placed(native=False, expert_cache=room(18, max_promotions=4))
    cache = backend.new_cache(**cache_options("f16"))

    def turns(n: int) -> int:
        before = backend.expert_metrics.evictions
        for i in range(n):
            cache.clear(0)
            backend.run(batch((0, 0, [IDS[i % 2]])), cache)
        return int(backend.expert_metrics.evictions - before)

    turns(12)
    hits = backend.expert_metrics.hits
    assert turns(6) == 0
    assert backend.expert_metrics.hits > hits


def test_without_promotions_nothing_comes_in() -> None:
    backend = placed(native=False, expert_cache=room(40, max_promotions=0))
    decode(backend, IDS[:3])
    metrics = backend.expert_metrics
    assert metrics.resident == metrics.hits == metrics.promotions == 0 and metrics.misses == 48


def test_a_profile_fills_the_cache_before_the_first_token() -> None:
    first = placed(native=False, expert_cache=room(60, max_promotions=60))
    decode(first, IDS[:3])
    usage = first.expert_usage()
    # Each token chose four experts of every layer, and counts half after 512 tokens.
    decay = 0.5 ** (1 / 512)
    for shares in usage.values():
        assert len(shares) == N_EXPERT
        assert sum(shares) == pytest.approx(4 * (1 - decay**3))
    second = placed(native=False, expert_cache=room(60, profile=usage))
    assert second.expert_metrics.resident == first.expert_metrics.resident
    assert second.expert_metrics.promotions == 0
    decode(second, IDS[:3])
    assert second.expert_metrics.hit_rate == 1
    for policy in ("lfu", "lru"):
        some = placed(native=False, expert_cache=room(9, profile=usage, policy=policy))
        assert some.expert_metrics.resident == 9
    assert_same(results(some), plain())
    with pytest.raises(DesksideError, match="the profile has 2 experts for layer 1"):
        placed(expert_cache=room(9, profile={1: [0.5, 0.5]}))


# ---- budgets and errors -------------------------------------------------------------------------


@pytest.mark.parametrize("native", [False, True])
def test_a_device_never_holds_more_than_was_reckoned(native: bool) -> None:
    backend = placed(native=native, expert_cache=room(50, max_promotions=50))
    limit = needed(backend)
    assert backend.offload.nbytes("emu0") == 50 * EXPERT + TABLE
    gc.collect()
    meter = backend.devices["emu0"].meter
    meter.peak = meter.live
    results(backend)
    assert backend.weight_bytes()["emu0"] + 50 * EXPERT < meter.peak <= limit
    with pytest.raises(DesksideError, match=r"emu0: work memory .* \(1 bytes\) short"):
        placed(native=native, expert_cache=room(50), size=limit - 1).new_cache(
            **cache_options("f16")
        )


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"nbytes": EXPERT + TABLE - 1}, "too little for an expert of"),
        ({"nbytes": 0}, "too little for an expert of"),
        ({"policy": "fifo"}, "unknown policy 'fifo'; choose one of lfu, lru"),
        ({"max_promotions": -1}, "max_promotions of at least 0"),
        ({"half_life": 0.0}, "a half_life above 0"),
        ({"margin": 0.5}, "margin of at least 1"),
        ({"device": "cuda3"}, "there is no device cuda3; the devices are emu0"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], part: str) -> None:
    with pytest.raises(DesksideError, match=part) as error:
        values = {"device": "emu0", "nbytes": 1 << 20} | options
        placed(expert_cache=ExpertCache(**values))
    assert "\n" not in str(error.value)


def test_where_the_host_has_no_experts_a_cache_takes_no_memory() -> None:
    backend = placed(placement=dict.fromkeys(NAMES, "emu0"), expert_cache=room(9))
    assert backend.offload.nbytes("emu0") == 0 and backend.expert_metrics.slots == 0
    assert backend.expert_usage() == {}


@pytest.mark.parametrize("after", [0, 9, 13])
def test_a_device_lost_at_any_time_leaves_a_cache_that_is_right(after: int) -> None:
    """A step on emu1 is three ops a layer, then its promotions."""
    options = room(10, device="emu1", max_promotions=6, half_life=2.0)
    backend = placed(native=False, expert_cache=options)
    cache = backend.new_cache(**cache_options("f16"))
    for i in range(3):
        backend.run(batch((0, i, [IDS[i]])), cache)
    device = backend.devices["emu1"]
    device.ops_until_loss = after
    what = "promoting expert" if after >= 12 else "computing expert"
    with pytest.raises(DesksideError, match=f"emu1 was lost while {what}") as error:
        backend.run(batch((0, 3, [IDS[40]])), cache)
    assert "\n" not in str(error.value)
    assert not any(h.arrays[0].any() for h in cache.device_states.values() if h._recurrent)
    with pytest.raises(DesksideError, match="emu1 was lost while"):
        backend.run(batch((0, 0, IDS[:1])), cache)
    device.lost, device.ops_until_loss = False, None  # it is back
    assert_same(results(backend), plain())
    metrics = backend.expert_metrics
    assert metrics.promotions - metrics.evictions == metrics.resident
