"""The cost of an op: worked out by hand, and the sum of which everything else is a view."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.convert.synth import outline
from deskside.gguf import TensorInfo
from deskside.gguf.quants import quant_type
from deskside.gguf.roles import Role, role
from deskside.models import build_tape
from deskside.tape import Tape, TapeBuilder
from deskside.tape.cost import MATRICES, BatchShape, Experts, Work, state_bytes, work
from tests.models import PRESETS

ALL = (*PRESETS, "qwen3.5-35b-a3b")


@cache
def tape_of(preset: str) -> Tape:
    return build_tape(outline(preset).gguf())


def tensor(kind: str, *shape: int) -> TensorInfo:
    return TensorInfo(f"{kind}{shape}", quant_type(kind), shape, Path("none"), 0)


def by_hand() -> Tape:
    """One op of each kind with a state, experts 1 of 4, and a head; 32 wide."""
    t = TapeBuilder()
    x = t.embed(tensor("F32", 32, 10))
    q = t.linear(x, tensor("Q8_0", 32, 64))
    k, v = (t.linear(x, tensor("F16", 32, 32)) for _ in range(2))
    t.attention(q, k, v, heads=2, kv_heads=1, head_dim=32)
    qkv = t.conv_silu(t.linear(x, tensor("Q8_0", 32, 128)), tensor("F32", 4, 128))
    a, vector = t.linear(x, tensor("F32", 32, 2)), tensor("F32", 2)
    t.gated_delta(qkv, a, a, vector, vector, k_heads=1, v_heads=2, head_dim=32, eps=1e-6)
    ids, weights = t.route(t.linear(x, tensor("F32", 32, 4)), 1)
    matrix = tensor("Q8_0", 32, 32, 4)
    x = t.add(x, t.experts(x, ids, weights, matrix, matrix, matrix))
    return t.finish(t.linear(t.take_rows(x), tensor("Q8_0", 32, 10)), 64)


def test_every_kind_by_hand() -> None:
    """Two sequences of three tokens behind ten; f16 keys, q8_0 values."""
    tape = by_hand()
    shape = BatchShape(3, 10, 2)
    found = [work(op, tape.states, shape, quant_type("f16"), quant_type("q8_0")) for op in tape.ops]
    position = 32 * 2 + 34  # bytes of a key and of a value
    quarter = 1 - 0.75**6  # of the experts that six tokens miss or not
    assert [tuple(one) for one in found if one.sort != "rows"] == [
        ("dense", 64 * 34, 0, 6 * 32 * 64),
        ("router", 32 * 64, 0, 6 * 32 * 32),
        ("router", 32 * 64, 0, 6 * 32 * 32),
        # on average 11 positions are seen, the 12 before the last token are read
        ("attention", 0, 2 * 12 * position, 6 * 11 * 2 * 64),
        ("dense", 128 * 34, 0, 6 * 32 * 128),
        ("delta", 4 * 128 * 4, 2 * 2 * 3 * 128 * 4, 6 * 128 * 4),
        ("router", 32 * 2 * 4, 0, 6 * 32 * 2),
        ("delta", 2 * 2 * 4, 2 * 2 * 2 * 32 * 32 * 4, 6 * 3 * 2 * 32 * 32),
        ("router", 32 * 4 * 4, 0, 6 * 32 * 4),
        ("experts", pytest.approx(3 * 4 * 32 * 34 * quarter), 0, 6 * 3 * 32 * 32),
        ("head", 10 * 34, 0, 2 * 32 * 10),
    ]
    rows = [one for one in found if one.sort == "rows"]
    # embedding: a row a token; top_k of ids and of weights; what is added; rows taken
    assert [(one.nbytes, one.macs) for one in rows] == [
        (6 * 128, 6 * 32), (0, 6 * 2), (0, 6 * 32), (0, 2 * 32)
    ]  # fmt: skip


@pytest.mark.parametrize("preset", ALL)
@settings(max_examples=20, deadline=None)
@given(
    st.integers(1, 40), st.integers(0, 8000), st.integers(1, 9), st.sampled_from(["f16", "q8_0"])
)
def test_totals_are_the_sum_over_ops(preset: str, n: int, depth: int, n_seq: int, kv: str) -> None:
    tape, kind = tape_of(preset), quant_type(kv)
    total = Work.of(tape)
    decode = BatchShape(1, depth, n_seq)
    found = [work(op, tape.states, decode, kind, kind) for op in tape.ops]
    want = total.decode(depth, kv, n_seq)
    assert sum(one.nbytes for one in found) == pytest.approx(n_seq * want["bytes"], rel=1e-12)
    assert sum(one.macs for one in found if one.sort in MATRICES) == n_seq * want["macs"]
    prefill = BatchShape(n, depth)
    found = [work(op, tape.states, prefill, kind, kind) for op in tape.ops]
    assert sum(one.weights for one in found) == pytest.approx(total.weight_bytes(n), rel=1e-12)
    assert sum(one.state for one in found) == state_bytes(tape.states, prefill, kind, kind)
    macs = sum(one.macs for one in found if one.sort in MATRICES)
    assert macs == pytest.approx(n * total.prefill(n)["macs"], rel=1e-12)


def test_experts_of_an_op_are_those_of_the_totals() -> None:
    tape = tape_of("tiny-moe")
    assert Work.of(tape).experts == tuple(Experts.of(op) for op in tape.ops if op.kind == "experts")


@pytest.mark.parametrize("preset", ALL)
def test_every_tensor_has_a_role_that_fits_its_op(preset: str) -> None:
    tape = tape_of(preset)
    for op in tape.ops:
        roles = {role(w.name) for w in op.weights}
        assert Role.OTHER not in roles
        assert (Role.EXPERTS in roles) == (op.kind == "experts")
        if op.kind == "embed":
            assert roles == {Role.EMBEDDING}
        if op.kind in ("rms_norm", "rope"):
            assert roles <= {Role.NORM, Role.FFN_NORM}
        if op.kind in ("conv_silu", "gated_delta", "gated_norm"):
            assert roles == {Role.DELTA}
    assert role("blk.7.ffn_gate_exps") is role("ffn_gate_exps.weight") is Role.EXPERTS
    assert role("blk.7.nextn.enorm.weight") is Role.OTHER
