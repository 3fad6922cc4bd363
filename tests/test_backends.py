"""The CPU backend against the reference, and what must not change a result."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside import LLM, _native
from deskside.backends.native.program import CpuBackend
from deskside.backends.native.weights import load
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.lowering.buffers import plan_buffers, stride
from deskside.lowering.panels import layout, matrices
from deskside.lowering.steps import NativeOp, Stretch, dependencies, plan_steps, schedule
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from deskside.tape import Op, Value
from deskside.tape.cache import Batch, Cache, Segment
from tests.models import PRESETS, tiny

ISAS = [name for name, supported in _native.instruction_sets() if supported]
IDS = np.random.default_rng(0).integers(0, 2000, 90).tolist()


def relative(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("preset", PRESETS)
def test_cpu_equals_reference_on_float_weights(preset: str, isa: str) -> None:
    options: dict[str, Any] = {"ctk": "f32", "ctv": "f32"}
    expected = LLM(tiny(preset, "F32"), backend="reference", **options).logits(IDS)
    got = LLM(tiny(preset, "F32"), isa=isa, **options).logits(IDS)
    # Both sum in float32 in different orders: some 2^-24 * sqrt(256) a matrix, 30 matrices deep.
    assert relative(got, expected) < 1e-5


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
def test_cpu_equals_reference_with_the_same_cache_type(kv: str) -> None:
    path = tiny("tiny-dense", "F32")
    expected = LLM(path, backend="reference", ctk=kv, ctv=kv).logits(IDS)
    exact = LLM(path, backend="reference", ctk="f32", ctv="f32").logits(IDS)
    got = LLM(path, ctk=kv, ctv=kv).logits(IDS)
    # A value between two steps of the cache type may round either way, which costs less than
    # rounding all of them does.
    assert relative(expected, exact) > 0
    assert relative(got, expected) < relative(expected, exact) / 2


@pytest.mark.parametrize("preset", PRESETS)
def test_chunks_change_nothing_beyond_rounding(preset: str) -> None:
    llm = LLM(tiny(preset, "F32"), ctk="f32", ctv="f32")
    whole = llm.logits(IDS)
    for chunks in ([1] * 90, [63, 1, 26], [3, 60, 2, 25]):
        assert relative(llm.logits(IDS, chunks), whole) < 1e-5


def test_the_number_of_threads_changes_nothing() -> None:
    file = GGUF.open(tiny())
    tape = build_tape(file)
    results = []
    for threads in (1, 2, 5):
        backend = CpuBackend(file, tape, HostOptions(threads), max_tokens=90)
        results.append(backend.run(one_sequence(IDS), new_cache(tape.states)))
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_prefill_and_decode_have_threads_of_their_own() -> None:
    file = GGUF.open(tiny())
    tape = build_tape(file)
    used: list[int] = []

    def results(host: HostOptions) -> list[np.ndarray]:
        backend = CpuBackend(file, tape, host, max_tokens=90)
        program = backend.program
        backend.program = mock.Mock(wraps=program)
        cache = new_cache(tape.states, n_slots=2)
        found = [
            backend.run(one_sequence(IDS[:40]), cache),
            backend.run(one_sequence(IDS[40:41], pos=40), cache),
            backend.run(one_sequence(IDS[41:43], pos=41), cache),
            backend.run(one_sequence(IDS[43:44], pos=43), cache),
        ]
        used[:] = [call.args[-1] for call in backend.program.run.call_args_list]
        assert program.n_threads == max(host.n_threads, host.n_threads_batch)
        return found

    expected = results(HostOptions(3))
    assert used == [3, 3, 3, 3]
    for decode, prefill in ((1, 5), (5, 1), (2, 8)):
        found = results(HostOptions(decode, n_threads_batch=prefill))
        assert used == [prefill, decode, prefill, decode]
        for a, b in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, b)
    program = CpuBackend(file, tape, HostOptions(2), max_tokens=4).program
    one = np.zeros((1, 3), np.int32)
    for threads in (-1, 3):
        with pytest.raises(ValueError, match="bad number of threads"):
            program.run(
                one[0, :1], one + 1, one[0, :1], np.empty((1, 1), np.float32), False, 0, 0, threads
            )


def new_cache(states: tuple[object, ...], n_slots: int = 1, n_ctx: int = 2000) -> Cache:
    f32 = quant_type("F32")
    return Cache(states, n_slots=n_slots, n_ctx=n_ctx, k_type=f32, v_type=f32)  # type: ignore[arg-type]


def one_sequence(ids: list[int], pos: int = 0, slot: int = 0) -> Batch:
    tokens = np.array(ids, np.int32)
    return Batch(tokens, (Segment(slot, pos, len(ids)),), np.arange(len(ids), dtype=np.int32))


@pytest.mark.parametrize("preset", PRESETS)
def test_sequences_in_one_batch_do_not_touch_each_other(preset: str) -> None:
    file = GGUF.open(tiny(preset, "F32"))
    tape = build_tape(file)
    backend = CpuBackend(file, tape, HostOptions(2), max_tokens=64)
    pieces = [(IDS[:20], IDS[20:21]), (IDS[30:37], IDS[37:40]), (IDS[50:70], IDS[70:71])]

    alone = []
    for first, then in pieces:
        cache = new_cache(tape.states)
        backend.run(one_sequence(first), cache)
        alone.append(backend.run(one_sequence(then, pos=len(first)), cache))

    cache = new_cache(tape.states, n_slots=3)
    for step, starts in ((0, [0, 0, 0]), (1, [len(p[0]) for p in pieces])):
        ids = [piece[step] for piece in pieces]
        batch = Batch(
            np.concatenate(ids).astype(np.int32),
            tuple(Segment(s, starts[s], len(ids[s])) for s in range(3)),
            np.arange(sum(map(len, ids)), dtype=np.int32),
        )
        together = backend.run(batch, cache)
    np.testing.assert_allclose(together, np.concatenate(alone), rtol=1e-4, atol=1e-4)


def test_long_decode_attention_is_split_and_merged() -> None:
    """Beyond 512 positions a single token's attention runs in parts."""
    ids = np.random.default_rng(3).integers(0, 2000, 1300).tolist()
    path = tiny("tiny-dense", "F32")
    llm = LLM(path, ctk="f32", ctv="f32")
    whole = llm.logits(ids)[-1]
    step = llm.logits(ids, [512, 512, 275, 1])[-1]
    assert relative(step, whole) < 1e-5


def test_packed_weights_take_the_bytes_of_the_file() -> None:
    """And the program's own memory is work space, far below them."""
    file = GGUF.open(tiny("tiny-moe", "Q8_0"))
    steps = plan_steps(build_tape(file))
    placements, total = layout(matrices(steps))
    stored = sum(p.info.nbytes for p in placements)
    assert (
        stored
        <= total
        <= stored
        + 4096 * len(placements)
        + sum(p.info.row_bytes * 15 * p.groups for p in placements)
    )
    backend = CpuBackend(file, build_tape(file), HostOptions(), max_tokens=1)
    assert backend.nbytes < stored / 4


def test_weights_that_do_not_fit_with_the_cache_are_refused() -> None:
    file = GGUF.open(tiny())
    with pytest.raises(DesksideError, match=r"weights take .* cache and work memory .* lower -c"):
        CpuBackend(file, build_tape(file), HostOptions(), max_tokens=1, reserve=1 << 60)


def test_a_file_cut_off_after_it_was_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny("tiny-dense").read_bytes())
    file = GGUF.open(path)
    steps = plan_steps(build_tape(file))
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(DesksideError, match=r"cut\.gguf: tensor .* ends early"):
        load(steps, HostOptions(2))


def test_an_op_of_an_unknown_kind_is_an_error() -> None:
    tape = build_tape(GGUF.open(tiny()))
    unknown = Op(len(tape.ops), "swigIu", 0, (tape.logits,), (tape.logits,))
    with pytest.raises(KeyError, match="swigIu"):
        plan_steps(tape, [Stretch((unknown,))])


@settings(deadline=None)
@given(st.data())
def test_steps_keep_order_and_buffers_never_overlap(data: st.DataObject) -> None:
    """Random chains of row ops and task ops, some of which overwrite what they read."""
    values: list[Value] = []
    ops: list[NativeOp] = []
    for i in range(data.draw(st.integers(1, 30))):
        inputs = data.draw(st.lists(st.sampled_from(values), max_size=3)) if values else []
        where = data.draw(st.sampled_from(["rows", "tasks", "once"]))
        value = Value(i, data.draw(st.integers(0, 100)))
        out = data.draw(st.sampled_from([value, *inputs]))
        values += [value] if out is value else []
        ops.append(NativeOp(f"op {i}", where, tuple(inputs), (out,), Op(i, "op", 0, (), ())))
    steps = schedule(ops)
    at = {id(op): i for i, step in enumerate(steps) for op in step.ops}
    assert sorted(at) == sorted(map(id, ops))
    assert all(op.where == step.where for step in steps for op in step.ops)
    for i, waits in enumerate(dependencies(ops)):
        for earlier in waits:
            before, after = at[id(ops[earlier])], at[id(ops[i])]
            same_row = before == after and ops[i].where == "rows"
            if same_row:
                step = steps[after].ops
                assert step.index(ops[earlier]) < step.index(ops[i])
            else:
                assert before < after

    rows = data.draw(st.integers(1, 8))
    offsets, total = plan_buffers(steps, rows, Value(-1, 0))
    spans: dict[int, list[int]] = {}
    for i, made in enumerate(steps):
        for op in made.ops:
            for value in (*op.inputs, *op.outputs):
                spans.setdefault(value.id, []).append(i)
    for a in values:
        if a.id not in spans:
            continue
        end = offsets[a.id] + stride(a.width) * rows
        assert end <= total
        for b in values:
            if b.id <= a.id or b.id not in spans or not a.width or not b.width:
                continue
            first, second = spans[a.id], spans[b.id]
            if max(first[0], second[0]) <= min(first[-1], second[-1]):
                assert (
                    end <= offsets[b.id] or offsets[b.id] + stride(b.width) * rows <= offsets[a.id]
                )
