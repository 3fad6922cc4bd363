"""The cache's contract: what a checkpoint keeps continues with the same bits."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from deskside.backends.native.program import CpuBackend
from deskside.backends.reference import ReferenceBackend
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from deskside.tape.cache import Cache
from tests.models import PRESETS, tiny
from tests.placements import IDS, batch

CUTS = (1, 13, 40)  # tokens of the sequence when it is kept
Made = tuple[Any, Cache]


def on_cpu(preset: str, kv: str, backend: Any = CpuBackend) -> Made:
    file = GGUF.open(tiny(preset))
    tape = build_tape(file)
    options = {"host": HostOptions(), "max_tokens": 40} if backend is CpuBackend else {}
    kind = quant_type(kv)
    cache = Cache(tape.states, n_slots=3, n_ctx=128, k_type=kind, v_type=kind)
    return backend(file, tape, **options), cache


def on_devices(preset: str, kv: str) -> Made:
    """Layers by turns on two emulated devices and the CPU."""
    torch_devices = import_module("tests.torch_devices")
    file = GGUF.open(tiny(preset))
    tape = build_tape(file)
    homes = ("emu0", "cpu", "emu1")
    placement = {
        name: homes[int(name.split(".")[1]) % 3] if name.startswith("blk.") else "cpu"
        for name in tape.weights()
    }
    backend = torch_devices.PlacedBackend(
        file, tape, placement, torch_devices.parse_devices("emu0:1GiB,emu1:1GiB"),
        HostOptions(), max_tokens=40,
    )  # fmt: skip
    kind = quant_type(kv)
    return backend, backend.new_cache(n_slots=3, n_ctx=128, k_type=kind, v_type=kind)


def feed(made: Made, slot: int, start: int, end: int, piece: int = 7) -> None:
    """Tokens in pieces that do not fit the cut."""
    backend, cache = made
    for at in range(start, end, piece):
        backend.run(batch((slot, at, IDS[at : min(at + piece, end)]), outputs=[]), cache)


def rest(made: Made, slot: int, n: int) -> np.ndarray:
    """Logits of what follows: a piece of a prompt, then single tokens."""
    backend, cache = made
    steps = [(slot, n, IDS[n : n + 5]), *((slot, n + 5 + i, [IDS[n + 5 + i]]) for i in range(3))]
    return np.concatenate([backend.run(batch(step), cache).copy() for step in steps])


MAKERS: dict[str, Callable[[str, str], Made]] = {"cpu": on_cpu, "devices": on_devices}
WHERE = ["cpu", pytest.param("devices", marks=pytest.mark.external)]


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("where", WHERE)
def test_a_restored_sequence_continues_with_the_same_bits(where: str, preset: str, kv: str) -> None:
    made = MAKERS[where](preset, kv)
    cache = made[1]
    for n in CUTS if where == "cpu" else CUTS[1:2]:  # torch takes seconds where that takes none
        cache.clear(0)
        feed(made, 0, 0, n)
        whole = cache.snapshot(0, n)
        late = cache.snapshot(0, n, start=n)  # without keys and values
        cache.copy(0, 2)
        expected = rest(made, 0, n)
        assert np.array_equal(rest(made, 2, n), expected)  # a copy
        cache.restore(0, late)  # where they still are
        assert np.array_equal(rest(made, 0, n), expected)
        feed(made, 1, 0, 50)  # another sequence was there
        cache.restore(1, whole)
        assert cache.lengths[1] == n and np.array_equal(rest(made, 1, n), expected)


def test_the_reference_has_the_same_contract() -> None:
    made = on_cpu("tiny-moe", "f16", ReferenceBackend)
    feed(made, 0, 0, 13)
    kept = made[1].snapshot(0, 13)
    expected = rest(made, 0, 13)
    made[1].restore(1, kept)
    assert np.array_equal(rest(made, 1, 13), expected)


def test_parts_that_follow_each_other_make_a_whole() -> None:
    """What a store on disk does: keys and values once, in pieces."""
    made = on_cpu("tiny-moe", "q8_0")
    cache = made[1]
    feed(made, 0, 0, 20)
    first = cache.snapshot(0, 20)
    feed(made, 0, 20, 33)
    second = cache.snapshot(0, 33, start=20)
    expected = rest(made, 0, 33)
    cache.restore(2, first)
    cache.restore(2, second)
    assert np.array_equal(rest(made, 2, 33), expected)
    assert second.nbytes < first.nbytes + 13 * first.nbytes


@pytest.mark.parametrize("preset", PRESETS)
def test_only_keys_and_values_can_be_cut_back(preset: str) -> None:
    made = on_cpu(preset, "f16")
    cache = made[1]
    feed(made, 0, 0, 20)
    assert cache.truncate(0, 20) and not cache.truncate(0, 21)
    assert cache.recurrent == preset.endswith(("moe", "dense")) - (preset == "tiny-qwen3moe")
    assert cache.truncate(0, 9) is not cache.recurrent
    assert cache.lengths[0] == (20 if cache.recurrent else 9)
    if cache.recurrent:
        with pytest.raises(ValueError, match="no state of 9"):
            cache.snapshot(0, 9)
    else:
        got = rest(made, 0, 9)
        feed(made, 1, 0, 9, 9)
        # Other pieces, so equal to rounding only: sums over positions are split elsewhere.
        np.testing.assert_allclose(got, rest(made, 1, 9), rtol=0.05, atol=0.05)
    assert cache.truncate(0, 0) and cache.lengths[0] == 0


def test_bytes_are_those_of_keys_values_and_recurrent_state() -> None:
    cache = on_cpu("tiny-moe", "q8_0")[1]
    made = on_cpu("tiny-moe", "q8_0")
    feed(made, 0, 0, 32)
    one, none = made[1].snapshot(0, 32), made[1].snapshot(0, 32, start=32)
    assert none.nbytes == cache.recurrent_bytes
    assert (one.nbytes - none.nbytes) * 128 * 3 + 32 * 3 * none.nbytes == 32 * cache.nbytes
