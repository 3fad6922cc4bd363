"""Gated delta net, attention and the KV cache's encoding against NumPy in float64, for every
instruction set: each as a small native program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from deskside import _native
from deskside.gguf.encoders import quantize
from deskside.gguf.quants import BY_NAME, dequantize

ISAS = [name for name, supported in _native.instruction_sets() if supported]
F32 = BY_NAME["F32"]


Place = tuple[int, int, int]  # start, width, stride in the arena


class Runner:
    """Feeds rows of its inputs to one op and reads the output; the state lives on between calls.

    add(program, places of the inputs, place of the output) adds the op to the program.
    """

    def __init__(
        self,
        inputs: Sequence[np.ndarray],
        width: int,
        state: tuple[Any, ...],
        isa: str,
        add: Callable[[_native.Program, list[Place], Place], None],
    ) -> None:
        n = len(inputs[0])
        sizes = [*(x.shape[1] for x in inputs), width]
        starts = np.concatenate([[0], np.cumsum([n * s for s in sizes])]).tolist()
        places = [(start, size, size) for start, size in zip(starts, sizes, strict=False)]
        self.program = _native.Program(2, n, starts[-1], isa)
        self.program.begin("rows")
        for x, place in zip(inputs, places, strict=False):
            table = np.ascontiguousarray(x, np.float32)
            self.program.embed(table.view(np.uint8), F32.id, x.shape[1], place)
        add(self.program, places[:-1], places[-1])
        self.program.begin("tasks")
        identity = np.eye(width, dtype=np.float32).view(np.uint8)
        panel = _native.panel_bytes(F32.id, width)
        arena = _native.Arena(-(-width // 16) * panel)
        weights = arena.from_array(identity, F32.id, width, 1, 0, panel, 1)
        part = (weights, (0, width, width), True, None, None)
        self.program.linear(places[-1], (0, 0, 0), False, [part])
        self.program.finish()
        self.program.set_states([state])
        self.width = width

    def run(self, first: int, n: int) -> np.ndarray:
        """Rows first .. first + n - 1 of the inputs, at those positions."""
        out = np.empty((n, self.width), np.float32)
        tokens = np.arange(first, first + n, dtype=np.int32)
        segments = np.array([(0, first, n)], np.int32)
        self.program.run(tokens, segments, np.arange(n, dtype=np.int32), out)
        return out

    def run_in(self, cuts: Sequence[int]) -> np.ndarray:
        starts = np.concatenate([[0], np.cumsum(cuts)]).tolist()
        return np.concatenate([self.run(a, b) for a, b in zip(starts, cuts, strict=False)])


# ---- gated delta net ----------------------------------------------------------------------------

K_HEADS, V_HEADS = 2, 4


class Delta:
    """Random inputs of the gated delta rule, and what it makes of them."""

    def __init__(self, dim: int, n: int, decays: str, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        heads = rng.standard_normal((n, 2 * K_HEADS + V_HEADS, dim))
        heads[:, : 2 * K_HEADS] /= np.linalg.norm(heads[:, : 2 * K_HEADS], axis=-1, keepdims=True)
        uniform = rng.uniform(0, 1, (n, V_HEADS))
        values = {
            "any": uniform,
            "slow": 1 - 1e-3 * uniform,
            # Products of such decays underflow, ratios of them would overflow.
            "forgetful": np.where(uniform < 0.3, 0, np.where(uniform < 0.6, 1e-30, uniform)),
        }
        self.dim, self.n = dim, n
        self.qkv = heads.reshape(n, -1).astype(np.float32)
        self.decay = values[decays].astype(np.float32)
        self.beta = rng.uniform(0, 1, (n, V_HEADS)).astype(np.float32)
        self.start = rng.standard_normal((1, V_HEADS, dim, dim)).astype(np.float32)

    def runner(self, isa: str) -> tuple[Runner, np.ndarray]:
        state = self.start.copy()

        def add(program: _native.Program, places: list[Place], out: Place) -> None:
            program.begin("tasks")
            program.gated_delta(*places, out, K_HEADS, V_HEADS, self.dim, 0)

        inputs = [self.qkv, self.decay, self.beta]
        return Runner(inputs, V_HEADS * self.dim, (state,), isa, add), state

    def expected(self) -> tuple[np.ndarray, np.ndarray]:
        heads = self.qkv.reshape(self.n, -1, self.dim).astype(np.float64)
        q, k, v = np.split(heads, [K_HEADS, 2 * K_HEADS], axis=1)
        q, k = (np.tile(x, (1, V_HEADS // K_HEADS, 1)) for x in (q, k))
        s = self.start[0].astype(np.float64)
        out = np.empty((self.n, V_HEADS, self.dim))
        for t in range(self.n):
            s = s * self.decay[t][:, None, None]
            delta = self.beta[t][:, None] * (v[t] - np.einsum("hkv,hk->hv", s, k[t]))
            s = s + k[t][:, :, None] * delta[:, None, :]
            out[t] = np.einsum("hkv,hk->hv", s, q[t])
        return out.reshape(self.n, -1), s


def relative(got: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(got - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("decays", ["any", "slow", "forgetful"])
@pytest.mark.parametrize("dim", [7, 12, 20, 64, 128])
def test_gated_delta(dim: int, decays: str, isa: str) -> None:
    for n in (*range(1, 14), 60):
        case = Delta(dim, n, decays, seed=n)
        runner, state = case.runner(isa)
        out, end = case.expected()
        # Sums of dim + n terms in float32: some 2^-24 sqrt(128 + 60).
        assert relative(runner.run(0, n), out) < 2e-6
        assert relative(state[0], end) < 2e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dim", [12, 128])
def test_gated_delta_does_not_depend_on_how_a_sequence_is_cut(dim: int, isa: str) -> None:
    case = Delta(dim, 101, "slow")
    runner, whole_state = case.runner(isa)
    whole = runner.run(0, 101)
    for cuts in ([1] * 101, [5, 1, 48, 47], [100, 1], [6] * 16 + [5]):
        runner, state = case.runner(isa)
        assert relative(runner.run_in(cuts), whole) < 1e-5
        assert relative(state, whole_state) < 1e-5


@pytest.mark.parametrize("isa", ISAS)
def test_gated_delta_keeps_nan_and_infinity(isa: str) -> None:
    for bad in (np.nan, np.inf):
        case = Delta(20, 15, "slow")
        case.qkv[8, 2 * K_HEADS * 20] = bad  # a value of head 0
        runner, _ = case.runner(isa)
        finite = np.isfinite(runner.run(0, 15))
        assert finite[:8].all() and not finite[8:].any()


# ---- attention ----------------------------------------------------------------------------------


class Attention:
    """Random queries, keys and values, and softmax attention over the cache as it was stored."""

    def __init__(self, heads: int, kv_heads: int, dim: int, kv: tuple[str, str], n: int) -> None:
        rng = np.random.default_rng(dim + heads)
        self.heads, self.kv_heads, self.dim, self.n = heads, kv_heads, dim, n
        self.types = tuple(BY_NAME[t] for t in kv)
        self.scale = 3 / dim**0.5
        widths = (heads * dim, kv_heads * dim, kv_heads * dim)
        self.inputs = [rng.standard_normal((n, w)).astype(np.float32) for w in widths]

    def runner(self, isa: str) -> tuple[Runner, list[np.ndarray]]:
        # What lies behind the sequence's end must not be used: it is NaN.
        shapes = [(1, self.kv_heads, self.n + 5, t.row_bytes(self.dim)) for t in self.types]
        cache = [np.full(shape, 0xFF, np.uint8) for shape in shapes]

        def add(program: _native.Program, places: list[Place], out: Place) -> None:
            q, k, v = places
            program.store_kv(k, v, self.kv_heads, self.dim, 0)
            program.begin("tasks")
            program.attention(q, out, self.heads, self.kv_heads, self.dim, self.scale, 0)
            program.begin("tasks")
            program.merge_attention(out, self.heads, self.dim)

        state = (*cache, *(t.id for t in self.types))
        return Runner(self.inputs, self.heads * self.dim, state, isa, add), cache

    def expected(self, cache: list[np.ndarray]) -> np.ndarray:
        keys, values = (
            dequantize(rows[0].reshape(-1, rows.shape[-1]), t, self.dim)
            .astype(np.float64)
            .reshape(self.kv_heads, -1, self.dim)[:, : self.n]
            for rows, t in zip(cache, self.types, strict=True)
        )
        q = self.inputs[0].reshape(self.n, self.heads, self.dim).astype(np.float64)
        out = np.empty_like(q)
        future = np.triu(np.full((self.n, self.n), True), 1)
        for h in range(self.heads):
            kv = h // (self.heads // self.kv_heads)
            scores = self.scale * q[:, h] @ keys[kv].T
            scores[future] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            out[:, h] = (p / p.sum(-1, keepdims=True)) @ values[kv]
        return out.reshape(self.n, -1)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", [("F32", "F32"), ("F16", "F16"), ("Q8_0", "Q8_0"), ("F16", "Q8_0")])
@pytest.mark.parametrize(
    "heads", [(1, 1), (2, 1), (6, 2), (5, 1), (8, 1), (16, 1), (40, 1), (3, 3)]
)
def test_attention(heads: tuple[int, int], kv: tuple[str, str], isa: str) -> None:
    for dim in (32, 96, 256):
        if heads[0] * dim > 4096:
            continue
        case = Attention(*heads, dim, kv, 150)
        # Prefill, then more of it behind a position inside a block, then decode.
        for cuts in ([150], [3, 61, 83, 1, 1, 1]):
            runner, cache = case.runner(isa)
            out = runner.run_in(cuts)
            assert relative(out, case.expected(cache)) < 3e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", ["F32", "F16"])
@pytest.mark.parametrize("dim", [1, 7, 12, 20, 33])
def test_attention_of_odd_widths(dim: int, kv: str, isa: str) -> None:
    for heads in (1, 3, 9):
        case = Attention(heads, 1, dim, (kv, kv), 70)
        runner, cache = case.runner(isa)
        assert relative(runner.run_in([66, 1, 3]), case.expected(cache)) < 3e-6


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", ["F32", "F16", "Q8_0"])
def test_long_attention_is_split_and_merged(kv: str, isa: str) -> None:
    case = Attention(8, 1, 64, (kv, kv), 1100)
    runner, cache = case.runner(isa)
    out = runner.run_in([512, 511, 1, 8, 68])
    assert relative(out, case.expected(cache)) < 3e-6


@pytest.mark.parametrize("isa", ISAS)
def test_a_later_token_changes_no_earlier_one(isa: str) -> None:
    case = Attention(8, 1, 64, ("F16", "F16"), 90)
    one = case.runner(isa)[0].run(0, 90)
    for x in case.inputs:
        x[70:] *= -3
    two = case.runner(isa)[0].run(0, 90)
    np.testing.assert_array_equal(one[:70], two[:70])
    assert (one[70:] != two[70:]).any()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kv", ["F32", "F16", "Q8_0"])
@pytest.mark.parametrize("heads", [1, 3, 8, 32])
def test_attention_keeps_nan_and_infinity(heads: int, kv: str, isa: str) -> None:
    bads = [(0, np.nan), (1, np.nan), (2, np.nan), (2, np.inf)]
    if kv == "Q8_0":
        bads.append((1, np.inf))  # in 8 bits it is NaN, else it may be a score of -inf
    for which, bad in bads:
        case = Attention(heads, 1, 64, (kv, kv), 75)
        case.inputs[which][70, 5] = bad
        finite = np.isfinite(case.runner(isa)[0].run_in([70, 1, 1, 3]))
        assert finite[:70].all() and not finite[70].any()
        if which:
            assert not finite[70:].any()


def quantized_to_even(x: np.ndarray) -> np.ndarray:
    """q8_0 as the cache rounds it: ties to even, unlike the encoder of files."""
    blocks = x.reshape(len(x), -1, 32)
    d = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    q = np.rint(blocks * np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0))
    parts = (d.astype("<f2").view(np.uint8), q.astype(np.int8).view(np.uint8))
    return np.concatenate(parts, -1).reshape(len(x), -1)


@pytest.mark.parametrize("isa", ISAS)
def test_keys_and_values_are_stored_as_their_types_say(isa: str) -> None:
    for kv in ("F32", "F16", "Q8_0"):
        case = Attention(1, 1, 96, (kv, kv), 60)
        rng = np.random.default_rng(3)
        for x in case.inputs[1:]:
            x *= 10.0 ** rng.uniform(-6, 4, (len(x), 1)).astype(np.float32)
            x[3] = 0
            x[4] = np.arange(96) / 2 - 24  # many ties
            x[4, 31::32] = 127
        runner, cache = case.runner(isa)
        runner.run(0, 60)
        for x, rows in zip(case.inputs[1:], cache, strict=True):
            stored = quantized_to_even(x) if kv == "Q8_0" else quantize(x, BY_NAME[kv])
            np.testing.assert_array_equal(rows[0, 0, :60], stored)
