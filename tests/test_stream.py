"""Experts that pass through a device: the same results, within its budget, whatever happens."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.lowering.scratch import expert_bytes
from deskside.models import build_tape
from tests.models import tiny
from tests.offload import (
    EXPERT,
    N_EXPERT,
    NAMES,
    TABLE,
    TOP_K,
    assert_same,
    needed,
    placed,
    plain,
    record_routes,
    relative,
    results,
)
from tests.placements import IDS, batch, cache_options, drawn
from tests.torch_devices import ExpertCache, Layout, Source, StreamOptions, stream_module

pytestmark = pytest.mark.external

ALWAYS = StreamOptions("emu0", 1, 3 * EXPERT)  # from 17 tokens on: fewer pairs are not sorted


@settings(deadline=None, max_examples=3)
@given(st.data())
def test_any_placement_and_any_slots_give_the_same_bits_on_torch(data: st.DataObject) -> None:
    device = st.sampled_from(["cpu", "cpu", "emu0", "emu1"])
    whole = {layer: data.draw(device) for layer in range(4)}  # a layer's experts stay together
    placement = {
        name: whole[int(name.split(".")[1])] if "_exps" in name else data.draw(device)
        for name in NAMES
    }
    stream = StreamOptions(
        data.draw(st.sampled_from(["emu0", "EMU1", "emu2"])),
        data.draw(st.integers(1, 30)),
        EXPERT * data.draw(st.integers(1, N_EXPERT)),
        data.draw(st.integers(2, 4)),
        data.draw(st.integers(0, 5)),
    )
    backend = placed(native=False, placement=placement, stream=stream)
    assert_same(results(backend), plain())
    if "cpu" in whole.values() and stream.host_below == 0 and stream.min_tokens <= 23:
        assert backend.expert_metrics.streamed > 0


@pytest.mark.parametrize("host_below", [0, 3])
def test_beside_the_native_program_float_models_agree(host_below: int) -> None:
    """Sums go in another order: the bound of test_placed."""
    size = EXPERT * 8  # float32
    stream = StreamOptions("emu0", 1, size, host_below=host_below)
    got, expected = results(placed("F32", stream=stream), "f32"), plain("F32", "f32", True)
    assert relative(got, expected) < 1e-5
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))


@pytest.mark.parametrize("seed", range(2))
def test_any_placement_beside_the_native_program_agrees(seed: int) -> None:
    """All that is not experts lies anywhere; cache and slots are on one device or on two."""
    placement = drawn(NAMES, 300 + seed)
    placement |= {name: "cpu" for name in NAMES if "_exps" in name and "blk.2" not in name}
    stream = StreamOptions("emu0", 1, 8 * EXPERT, host_below=3 * seed)
    cache = ExpertCache(f"emu{seed}", 400 * EXPERT, max_promotions=40)
    backend = placed("F32", placement=placement, stream=stream, expert_cache=cache)
    got, expected = results(backend, "f32"), plain("F32", "f32", True)
    assert backend.expert_metrics.hits > 0 and backend.expert_metrics.streamed > 0
    assert relative(got, expected) < 1e-5
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a.argmax(-1), b.argmax(-1))


def test_only_chosen_experts_are_copied_and_what_is_resident_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cache = ExpertCache("emu0", 40 * EXPERT + TABLE, max_promotions=20)
    backend = placed(native=False, stream=ALWAYS, expert_cache=cache)
    own = backend.new_cache(**cache_options("f16"))
    backend.run(batch((0, 0, IDS[:3])), own)
    there = backend.offload.residents._slot_of >= 0
    assert there.any()
    routes = record_routes(monkeypatch)
    backend.run(batch((0, 3, IDS[3:33])), own)
    chosen = np.zeros_like(there)
    for layer, ids in enumerate(routes):
        chosen[layer, np.unique(ids)] = True
    metrics = backend.expert_metrics
    assert metrics.streamed == (chosen & ~there).sum()
    assert metrics.streamed_bytes == metrics.streamed * EXPERT
    assert metrics.spared == (chosen & there).sum()


@pytest.mark.parametrize("sure", [8, 1])
@pytest.mark.parametrize("slots", [2, 3])
def test_the_next_layers_experts_come_ahead(
    sure: int, slots: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """11 pairs an expert: what comes ahead is right; 2: mostly not, and it is fetched again."""
    monkeypatch.setattr(stream_module, "SURE", sure)
    tokens = IDS if sure == 8 else IDS[:18]
    cache = ExpertCache("emu0", 20 * EXPERT + TABLE)
    stream = StreamOptions("emu0", 1, 3 * EXPERT, slots)
    offloading = placed(native=False, stream=stream, expert_cache=cache, max_tokens=90)
    alone = placed(native=False, max_tokens=90)
    steps = [batch((0, 0, tokens[:3])), batch((1, 0, tokens)), batch((2, 0, tokens))]
    got: list[np.ndarray] = []
    expected: list[np.ndarray] = []
    routes: list[np.ndarray] = []
    for backend, results_ in ((offloading, got), (alone, expected)):
        own = backend.new_cache(**cache_options("f16"))
        for step in steps:
            routes = (
                record_routes(monkeypatch) if step is steps[1] and backend is offloading else routes
            )
            results_.append(backend.run(step, own))
    assert_same(got, expected)
    chosen = 2 * sum(len(np.unique(ids)) for ids in routes[:4])
    metrics = offloading.expert_metrics
    wasted = metrics.streamed + metrics.spared - chosen
    assert wasted == 0 if sure == 8 else 0 < wasted <= 2 * 3 * slots * 3


def test_experts_with_few_tokens_stay_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = StreamOptions("emu0", 1, EXPERT, host_below=4)
    backend = placed(native=False, stream=stream)
    routes = record_routes(monkeypatch)
    backend.run(batch((0, 0, IDS[:40])), backend.new_cache(**cache_options("f16")))
    counts = [np.bincount(ids.reshape(-1)) for ids in routes]
    assert backend.expert_metrics.streamed == sum(int((c >= 4).sum()) for c in counts)
    assert any((c == 3).any() for c in counts)


def test_small_batches_and_layers_on_devices_do_not_stream() -> None:
    backend = placed(native=False, stream=ALWAYS)
    cache = backend.new_cache(**cache_options("f16"))
    backend.run(batch((0, 0, IDS[: 64 // TOP_K])), cache)
    assert backend.expert_metrics.streamed == 0
    backend.run(batch((1, 0, IDS[: 64 // TOP_K + 1])), cache)
    assert backend.expert_metrics.streamed > 0
    idle = placed(native=False, stream=ALWAYS, placement=dict.fromkeys(NAMES, "emu0"))
    never = placed(native=False, stream=StreamOptions("emu0", 41, EXPERT))
    assert len(idle.routes) == len(never.routes) == 1
    assert idle.offload.nbytes("emu0") == never.offload.nbytes("emu0") == 0


def test_profile_has_the_sections_of_the_way_that_is_taken() -> None:
    backend = placed(stream=ALWAYS)
    cache = backend.new_cache(**cache_options("f16"))
    for n in (3, 20):
        _, micros = backend.profile(batch((0, 0, IDS[:n])), cache)
        assert len(micros) == len(backend.route(n).sections)
        cache.clear(0)
    assert backend.traffic(20).hops < backend.traffic(3).hops


# ---- budgets ------------------------------------------------------------------------------------


@pytest.mark.parametrize("host_below", [0, 3])
def test_a_device_never_holds_more_than_was_reckoned(host_below: int) -> None:
    stream = StreamOptions("emu0", 1, 2 * EXPERT, 3, host_below)
    backend = placed(stream=stream, native=bool(host_below))
    limit = needed(backend)
    gc.collect()
    meter = backend.devices["emu0"].meter
    meter.peak = meter.live
    results(backend)
    assert backend.weight_bytes()["emu0"] + 6 * EXPERT < meter.peak <= limit


@pytest.mark.parametrize("by", ["stream", "cache"])
def test_a_batch_whose_tokens_all_choose_the_same_experts_fits_too(by: str) -> None:
    stream, cache = StreamOptions("emu1", 1, EXPERT), ExpertCache("emu1", 20 * EXPERT)
    options = {"stream": stream} if by == "stream" else {"expert_cache": cache}
    backend = placed(max_tokens=600, **options)
    own = backend.new_cache(**{**cache_options("f16"), "n_ctx": 640, "n_slots": 1})
    gc.collect()
    device = backend.devices["emu1"]
    device.meter.peak = device.meter.live
    for pos in (0, 600):
        backend.run(batch((0, pos, [7] * (600 if pos == 0 else 1)), outputs=[]), own)
    limit = backend._work(device) + backend.offload.nbytes("emu1")
    assert 600 * 4 * 4 * 256 < device.meter.peak <= limit


def test_what_was_reckoned_is_enough_and_a_byte_less_is_refused() -> None:
    limit = needed(placed(native=False, stream=ALWAYS))
    assert_same(results(placed(native=False, stream=ALWAYS, size=limit)), plain())
    with pytest.raises(DesksideError, match=r"emu0: work memory .* \(1 bytes\) short"):
        placed(native=False, stream=ALWAYS, size=limit - 1).new_cache(**cache_options("f16"))
    with pytest.raises(DesksideError, match=r"staging slots and expert cache of .* short") as error:
        placed(stream=StreamOptions("emu0", 1, 1 << 28), size="300MiB")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"slot_bytes": EXPERT - 1}, "too small for an expert"),
        ({"slots": 1}, "2 or more slots"),
        ({"min_tokens": 0}, "at least 1"),
        ({"host_below": -1}, "at least 0"),
        ({"device": "emu7"}, "no device emu7; the devices are emu0, emu1, emu2"),
        ({"device": "cpu"}, "no device cpu"),
    ],
)
def test_bad_options_are_one_line(options: dict[str, object], part: str) -> None:
    with pytest.raises(DesksideError, match=part) as error:
        values = {"device": "emu0", "min_tokens": 1, "slot_bytes": EXPERT} | options
        placed(stream=StreamOptions(**values))
    assert "\n" not in str(error.value)


# ---- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 7, 30])
def test_a_device_lost_while_experts_pass_empties_the_sequence(after: int) -> None:
    """A layer is an op and some ten groups: the loss is between two of them, or before an op."""
    stream = StreamOptions("emu1", 1, 3 * EXPERT)
    backend = placed(native=False, stream=stream)
    cache = backend.new_cache(**cache_options("f16"))
    backend.run(batch((0, 0, IDS[:5])), cache)
    recurrent = [held for held in cache.device_states.values() if held._recurrent]
    assert all(held.arrays[0].any() for held in recurrent)
    device = backend.devices["emu1"]
    device.ops_until_loss = after
    with pytest.raises(DesksideError, match="emu1 was lost while") as error:
        backend.run(batch((0, 5, IDS[5:30])), cache)
    assert "\n" not in str(error.value)
    assert not any(held.arrays[0].any() for held in recurrent)
    with pytest.raises(DesksideError, match="emu1 was lost while"):
        backend.run(batch((0, 0, IDS[:20])), cache)
    backend.run(batch((0, 0, IDS[:5])), cache)  # small batches do without it
    device.lost, device.ops_until_loss = False, None  # it is back
    assert_same(results(backend), plain())


def test_a_file_that_cannot_be_read_any_more_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = placed(native=False, stream=ALWAYS)
    cache = backend.new_cache(**cache_options("f16"))
    whole, calls = Source.read, []

    def broken(self: Source, info: TensorInfo, expert: int, to: np.ndarray) -> None:
        calls.append(expert)
        if len(calls) == 25:
            raise DesksideError("model.gguf: tensor x ends early")
        whole(self, info, expert, to)

    monkeypatch.setattr(Source, "read", broken)
    with pytest.raises(DesksideError, match="tensor x ends early"):
        backend.run(batch((0, 0, IDS[:20])), cache)
    assert_same(results(backend), plain())


def test_experts_are_read_as_they_lie_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "short.gguf"
    path.write_bytes(tiny("tiny-moe").read_bytes())
    file = GGUF.open(path)
    op = next(op for op in build_tape(file).ops if op.kind == "experts")
    assert Layout.of(op).nbytes == expert_bytes(op)  # as planned
    for info, _, n in Layout.of(op).parts:
        to = np.zeros(n, np.uint8)
        Source().read(info, 5, to)
        np.testing.assert_array_equal(to, file.raw(info.name).reshape(N_EXPERT, n)[5])
    last = max(w.offset for w in op.weights)
    with path.open("r+b") as f:
        f.truncate(last + 10)
    info = next(w for w in op.weights if w.offset == last)
    with pytest.raises(DesksideError, match=r"short\.gguf: tensor blk.* ends early") as error:
        Source().read(info, 0, to)
    assert "\n" not in str(error.value)
    path.unlink()
    with pytest.raises(DesksideError, match=r"short\.gguf: tensor .* No such file"):
        Source().read(info, 0, to)


@pytest.mark.parametrize("types", ["", "BF16"])
def test_the_cpus_packed_weights_are_a_source_too(types: str) -> None:
    backend = placed(types, stream=StreamOptions("emu0", 1, 8 * EXPERT))
    file = GGUF.open(tiny("tiny-moe", types))
    source = backend.offload.streamer._copier._source
    for op in backend.offload.ops[:2]:
        for info, _, n in backend.offload.layouts[op.layer].parts:
            assert info.name in source.packed
            to = np.zeros(n, np.uint8)
            source.read(info, 3, to)
            np.testing.assert_array_equal(to, file.raw(info.name).reshape(N_EXPERT, n)[3])
