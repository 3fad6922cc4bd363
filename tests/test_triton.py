"""The Triton kernels' values, in Triton's interpreter, against quants.py and reference.py.

With TRITON_INTERPRET=0 in the environment the same tests run compiled, on the first CUDA device.

Tolerances are bounds, not observations. A sum of n products in float32, in any order, is off by at
most n 2^-24 of the sum of their magnitudes. Rounding both factors to float16 first adds 2^-10
of it, and 2^-25 for factors that end below float16's normal range (scaled x is at most 1).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from deskside.backends import reference
from deskside.errors import DesksideError
from deskside.gguf.quants import BY_NAME, dequantize
from deskside.tape import Op
from deskside.tape.cache import Batch, Segment
from tests.oracles import need

need.packages("torch", "triton")

import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from deskside.backends.triton import launch as tk  # noqa: E402
from deskside.backends.triton.decode import PAIR, decode, first  # noqa: E402

pytestmark = pytest.mark.external

EPS = 2.0**-24
DEVICE = "cuda" if os.environ.get("TRITON_INTERPRET") == "0" else "cpu"
# Beyond float32: what tensor cores round away of both factors, where the interpreter does not.
TENSOR_CORES = {"F32": 2.0**-20, "BF16": 2.0**-10} if DEVICE == "cuda" else {}


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


def random_rows(name: str, shape: tuple[int, ...], n: int, rng: np.random.Generator) -> np.ndarray:
    """Any bytes, but scales that make weights of magnitude 1 or so: uint8 (*shape, row bytes)."""
    t = BY_NAME[name]
    size = 1e-4 if t.block == 256 else 1e-2  # superblocks have further scales within
    rows = int(np.prod(shape))
    if t.block == 1:
        x = rng.standard_normal((rows, n)).astype(np.float32)
        if name == "BF16":
            x = (x.view(np.uint32) >> 16).astype("<u2")
        elif name == "F16":
            x = x.astype("<f2")
        data = x.view(np.uint8)
        return data.reshape(*shape, -1)
    data = rng.integers(0, 256, (rows, t.row_bytes(n)), np.uint8)
    if t.row_header:
        header = rng.uniform(-size, size, (rows, 1)).astype("<f4")
        data[:, :4] = header.view(np.uint8)
    blocks = data[:, t.row_header :].reshape(rows, -1, t.block_bytes)
    for at in t.scales:
        scales = rng.uniform(-size, size, (*blocks.shape[:2], 1)).astype("<f2")
        blocks[:, :, at : at + 2] = scales.view(np.uint8)
    if name == "MXFP4":
        blocks[:, :, 0] = rng.integers(118, 126, blocks.shape[:2])
    data[:, t.row_header :] = blocks.reshape(rows, -1)
    return data.reshape(*shape, -1)


def weights(data: np.ndarray, name: str, n: int) -> np.ndarray:
    """float64 (..., n), the file's bytes as quants.py reads them."""
    flat = dequantize(data.reshape(-1, data.shape[-1]), BY_NAME[name], n)
    return flat.reshape(*data.shape[:-1], n).astype(np.float64)


def gpu(x: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(x)).to(DEVICE)


def host(x: torch.Tensor) -> np.ndarray:
    return x.cpu().numpy()


def bound(x: np.ndarray, w: np.ndarray, name: str, rows: int) -> np.ndarray:
    """How far x w^T may be from exact: see above; +8 for the few roundings of a decoded weight."""
    magnitude = np.abs(x) @ np.abs(w).T
    allowed = (x.shape[1] + 8) * EPS * magnitude
    if rows > tk.FEW_ROWS:
        allowed += TENSOR_CORES.get(name, 0) * magnitude
    if rows > tk.FEW_ROWS and name not in tk.PRECISION:
        top = 2 * np.abs(x).max(1, keepdims=True)  # the power of 2 that a row is divided by
        allowed += 2.0**-10 * magnitude
        allowed += 2.0**-25 * (np.abs(w).sum(1) * top + np.abs(x).sum(1, keepdims=True))
    return allowed


@triton.jit
def decode_rows(  # type: ignore[no-untyped-def]
    w_ptr, out_ptr, TYPE: tl.constexpr, PAIR: tl.constexpr, N_IN: tl.constexpr,
    ROW_BYTES: tl.constexpr, GROUPS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)[None, :, None]
    i = tl.arange(0, 16)[None, None, :]
    a, b = decode(w_ptr + row * ROW_BYTES + tl.zeros((1, 1, 1), tl.int32), group, i, TYPE)
    out = out_ptr + row * N_IN + first(group, i, PAIR)
    tl.store(out, a)
    tl.store(out + PAIR, b)


@pytest.mark.parametrize("name", PAIR)
def test_decoders_are_the_specification(name: str, rng: np.random.Generator) -> None:
    """Bit for bit, on random bytes in every field: 6 rows of 3 superblocks."""
    rows, n = 6, 768
    data = random_rows(name, (rows,), n, rng)
    out = torch.full((rows, n), torch.nan, device=DEVICE)
    decode_rows[rows, 3](gpu(data), out, **tk.weight_constants(name, n), GROUPS=8)
    wanted = dequantize(data, BY_NAME[name], n)
    # Compiled, a product and a difference may be one operation with one rounding.
    allowed = 0 if DEVICE == "cpu" else 2 * EPS * np.abs(wanted).max()
    np.testing.assert_allclose(host(out), wanted, rtol=0, atol=allowed)


# Every decoder in both kernels; every tile in every precision of them.
SHAPES = [(name, rows) for name in PAIR for rows in (1, 17)]
SHAPES += [(name, rows) for name in ("F32", "BF16", "IQ4_KSS") for rows in (2, 5, 70)]


@pytest.mark.parametrize("name,rows", SHAPES)
def test_matmul(name: str, rows: int, rng: np.random.Generator) -> None:
    """One, few and many rows; rows of w that fill no tile."""
    n, n_out = 512, 19
    data = random_rows(name, (n_out,), n, rng)
    x = rng.standard_normal((rows, n)).astype(np.float32)
    y = host(tk.matmul(gpu(x), gpu(data), name, n, n_out))
    w = weights(data, name, n)
    assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound(x, w, name, rows)).all()


@pytest.mark.parametrize("rows", [1, 20])
@pytest.mark.parametrize("n", [32, 96, 160])
def test_short_and_odd_rows(n: int, rows: int, rng: np.random.Generator) -> None:
    data = random_rows("IQ4_NL", (1,), n, rng)
    x = rng.standard_normal((rows, n)).astype(np.float32)
    y = host(tk.matmul(gpu(x), gpu(data), "IQ4_NL", n, 1))
    w = weights(data, "IQ4_NL", n)
    assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound(x, w, "IQ4_NL", rows)).all()


def test_activations_beyond_float16(rng: np.random.Generator) -> None:
    """Rows of magnitude 1e9 and 1e-9, and one of zeros, in the float16 kernel."""
    n = 256
    data = random_rows("Q8_0", (16,), n, rng)
    size = np.array([1e9, 1e-9, 0.0, 1.0, 1.0])[:, None]
    x = (rng.standard_normal((5, n)) * size).astype(np.float32)
    y = host(tk.matmul(gpu(x), gpu(data), "Q8_0", n, 16))
    w = weights(data, "Q8_0", n)
    assert np.isfinite(y).all()
    assert (np.abs(y - x.astype(np.float64) @ w.T) <= bound(x, w, "Q8_0", 5)).all()


def test_no_rows() -> None:
    data = torch.zeros((4, 34), dtype=torch.uint8)
    assert tk.matmul(torch.zeros((0, 32)), data, "Q8_0", 32, 4).shape == (0, 4)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def swiglu_bound(x: np.ndarray, gate: np.ndarray, up: np.ndarray, name: str, rows: int) -> Any:
    """silu's slope is below 1.1, and it is 2 ulp of its own off."""
    g, u = x @ gate.T, x @ up.T
    dg, du = bound(x, gate, name, rows), bound(x, up, name, rows)
    return 1.1 * dg * (np.abs(u) + du) + np.abs(silu(g)) * (du + 8 * EPS * np.abs(u))


def choices(kind: str, tokens: int, n_experts: int, rng: np.random.Generator) -> np.ndarray:
    """int32 (tokens, 2): the experts of each token, different ones."""
    if kind == "one expert":  # and a second one that is different for every token, as it must be
        ids = np.stack([np.full(tokens, 3), np.arange(tokens) % 3], 1)
    elif kind == "last two":
        ids = np.tile([n_experts - 1, n_experts - 2], (tokens, 1))
    else:
        ids = np.stack([rng.permutation(n_experts)[:2] for _ in range(tokens)])
        ids[ids == 4] = 0  # expert 4 gets no token; a pair of equal ids is computed twice
    return ids.astype(np.int32)


@pytest.mark.parametrize(
    "tokens,kind",
    [(2, "random"), (9, "random"), (9, "one expert"), (70, "one expert"), (70, "last two")],
)
def test_experts(tokens: int, kind: str, rng: np.random.Generator) -> None:
    """The tape's op from fused gate and up, down, and the weighted sum, against float64."""
    n, width, n_experts = 64, 32, 7
    name, down_name = "IQ4_NL", "Q8_0"
    gate = random_rows(name, (n_experts, width), n, rng)
    up = random_rows(name, (n_experts, width), n, rng)
    down = random_rows(down_name, (n_experts, n), width, rng)
    x = rng.standard_normal((tokens, n)).astype(np.float32)
    ids = choices(kind, tokens, n_experts, rng)
    p = rng.uniform(0, 1, ids.shape).astype(np.float32)
    h = tk.experts_matmul(gpu(x), gpu(gate), name, n, width, gpu(ids), gpu(up))
    pairs = tk.experts_matmul(h, gpu(down), down_name, width, n, gpu(ids))
    y = (pairs.view(tokens, 2, n) * gpu(p)[:, :, None]).sum(1)

    rows = 1 if tokens <= tk.FEW_TOKENS else tokens  # which of the kernels it was
    g, u, d = weights(gate, name, n), weights(up, name, n), weights(down, down_name, width)
    for t in range(tokens):
        wanted, allowed = np.zeros(n), np.zeros(n)
        for e, weight in zip(ids[t], p[t], strict=True):
            h = silu(x[t] @ g[e].T) * (x[t] @ u[e].T)
            off = swiglu_bound(x[t : t + 1], g[e], u[e], name, rows)[0]
            wanted += weight * (h @ d[e].T)
            allowed += weight * (off @ np.abs(d[e]).T + bound(h[None], d[e], down_name, rows)[0])
        assert (np.abs(host(y[t]) - wanted) <= 1.01 * allowed + 1e-12).all()


@pytest.mark.parametrize("tokens", [2, 20])
def test_ids_of_no_expert_give_nan_and_read_nothing(tokens: int, rng: np.random.Generator) -> None:
    """In both kernels; the other pairs are as if those were not there."""
    n, n_out, n_experts = 64, 18, 5
    data = random_rows("Q8_0", (n_experts, n_out), n, rng)
    x = gpu(rng.standard_normal((tokens, n)).astype(np.float32))
    ids = rng.integers(0, n_experts, (tokens, 2)).astype(np.int32)
    good = tk.experts_matmul(x, gpu(data), "Q8_0", n, n_out, gpu(ids))
    wrong = ids.copy()
    wrong[0, 1], wrong[1, 0], wrong[1, 1] = n_experts, -1, -(2**31)
    y = tk.experts_matmul(x, gpu(data), "Q8_0", n, n_out, gpu(wrong))
    kept = (wrong == ids).reshape(-1)
    assert torch.isnan(y[~kept]).all() and torch.equal(y[kept], good[kept])


def test_pairs_are_all_in_one_tile_each(rng: np.random.Generator) -> None:
    """Tiles cover the sorted pairs once, and none holds pairs of two experts."""
    for n_experts, pairs, block in ((1, 1, 16), (5, 40, 16), (300, 33, 16), (3, 200, 64)):
        expert = rng.integers(0, n_experts, pairs).astype(np.int32)
        order, tiles = tk.sort_pairs(gpu(expert), n_experts, block)
        seen = np.zeros(pairs, int)
        for e, start, end in tiles.tolist():
            if start < end:
                assert end - start <= block
                places = host(order)[start:end]
                assert (expert[places] == e).all()
                seen[places] += 1
        assert (seen == 1).all()


def test_tiles_of_experts_write_their_own_pairs_only(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    """A GPU runs tiles in any order; the interpreter does not, so here they are turned round."""
    n, n_out, n_experts, tokens = 64, 70, 5, 20
    data = random_rows("Q4_0", (n_experts, n_out), n, rng)
    ids = gpu(rng.integers(0, n_experts, (tokens, 2)).astype(np.int32))
    x = gpu(rng.standard_normal((tokens, n)).astype(np.float32))
    usual = tk.experts_matmul(x, gpu(data), "Q4_0", n, n_out, ids)
    sort_pairs = tk.sort_pairs

    def turned(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        order, tiles = sort_pairs(*args)
        return order, tiles.flip(0).contiguous()

    monkeypatch.setattr(tk, "sort_pairs", turned)
    assert torch.equal(tk.experts_matmul(x, gpu(data), "Q4_0", n, n_out, ids), usual)


def test_delta_step(rng: np.random.Generator) -> None:
    """Two steps of three sequences whose slots are not in order, against the reference's op."""
    k_heads, v_heads, n, eps, dim = 2, 4, 3, 1e-6, 64
    attrs = {"k_heads": k_heads, "v_heads": v_heads, "head_dim": dim, "eps": eps}
    ssm_a = -rng.uniform(0.1, 4, v_heads).astype(np.float32)
    dt_bias = rng.standard_normal(v_heads).astype(np.float32)
    weights: Any = (ssm_a, dt_bias)  # `step.weight` gives them as they are
    op = Op(0, "gated_delta", 0, (), (), weights, attrs, state=0)
    state = rng.standard_normal((5, v_heads, dim, dim)).astype(np.float32)
    ours = gpu(state.copy())
    slots = np.array([4, 0, 2], np.int32)
    batch = SimpleNamespace(segments=[Segment(int(s), 0, 1) for s in slots])
    cache = SimpleNamespace(arrays=[(state,)])
    step = SimpleNamespace(batch=batch, cache=cache, weight=lambda w: w)
    for _ in range(2):
        qkv = rng.standard_normal((n, (2 * k_heads + v_heads) * dim)).astype(np.float32)
        a, b = (8 * rng.standard_normal((2, n, v_heads))).astype(np.float32)
        (wanted,) = reference.gated_delta(op, [qkv, a, b], step)  # type: ignore[arg-type]
        args = [gpu(v) for v in (qkv, a, b, ssm_a, dt_bias)]
        out = tk.delta_step(*args, ours, gpu(slots), k_heads=k_heads, eps=eps)  # type: ignore[misc]
        # Two float32 sums of dim products each, q and k of length 1, on both sides.
        allowed = 8 * (dim + 8) * EPS * np.abs(state).max() * dim**0.5
        np.testing.assert_allclose(host(out), wanted, rtol=0, atol=allowed)
        np.testing.assert_allclose(host(ours), state, rtol=0, atol=allowed)


@pytest.mark.parametrize(
    "heads,kv_heads,k_type,v_type",
    [(6, 2, "f16", "f16"), (32, 1, "q8_0", "q8_0"), (2, 2, "f32", "q8_0")],
)
def test_decode_attention(
    heads: int, kv_heads: int, k_type: str, v_type: str, rng: np.random.Generator
) -> None:
    """Lengths of 1, a full tile, a tile and one, and more splits than some of them have tiles."""
    dim, n_ctx, scale = 64, 100, 0.125
    k_t, v_t = BY_NAME[k_type.upper()], BY_NAME[v_type.upper()]
    lengths = np.array([1, 32, 33, 97], np.int32)
    slots = np.array([3, 0, 4, 1], np.int32)
    n = len(lengths)
    k = random_rows(k_t.name, (5, kv_heads, n_ctx), dim, rng)
    v = random_rows(v_t.name, (5, kv_heads, n_ctx), dim, rng)
    attrs = {"heads": heads, "kv_heads": kv_heads, "head_dim": dim, "scale": scale}
    op = Op(0, "attention", 0, (), (), attrs=attrs, state=0)
    cache = SimpleNamespace(arrays=[(k, v)], k_type=k_t, v_type=v_t)
    segments = tuple(
        Segment(int(s), int(length) - 1, 1) for s, length in zip(slots, lengths, strict=True)
    )
    batch = Batch(np.zeros(n, np.int32), segments, np.arange(n, dtype=np.int32))
    q = rng.standard_normal((n, heads * dim)).astype(np.float32)
    new = rng.standard_normal((2, n, kv_heads * dim)).astype(np.float32)
    step = SimpleNamespace(batch=batch, cache=cache)
    (wanted,) = reference.attention(op, [q, *new], step)  # type: ignore[arg-type]
    for splits in (1, 3):
        device_out = tk.decode_attention(
            gpu(q), gpu(k), gpu(v), gpu(slots), gpu(lengths), k_type=k_type, v_type=v_type,
            dim=dim, scale=scale, splits=splits,
        )  # fmt: skip
        out = host(device_out)
        for i, segment in enumerate(segments):
            keys = weights(k[segment.slot, :, : lengths[i]], k_t.name, dim)
            values = weights(v[segment.slot, :, : lengths[i]], v_t.name, dim)
            rounding = 2.0**-10 + (dim + 8) * EPS  # of q and K; the same of p and V
            top = scale * np.abs(q[i]).reshape(-1, dim).sum(1).max() * np.abs(keys).max()
            off = np.expm1(2 * rounding * top) + rounding + lengths[i] * EPS
            assert np.abs(out[i] - wanted[i]).max() <= off * np.abs(values).max()


def test_positions_past_the_length_are_not_read(rng: np.random.Generator) -> None:
    """What follows may be anything that was in memory, NaN too."""
    k = np.full((1, 1, 64, 2 * 32), 0xFF, np.uint8)  # NaN in float16
    v = k.copy()
    k[0, 0, :40] = random_rows("F16", (40,), 32, rng)
    v[0, 0, :40] = random_rows("F16", (40,), 32, rng)
    q = gpu(rng.standard_normal((1, 32)).astype(np.float32))
    one = np.zeros(1, np.int32)
    out = tk.decode_attention(
        q, gpu(k), gpu(v), gpu(one), gpu(one + 40), k_type="f16", v_type="f16", dim=32,
        scale=1.0, splits=4,
    )  # fmt: skip
    assert torch.isfinite(out).all()


def test_splits_follow_the_longest_sequence() -> None:
    assert [tk.attention_splits(n) for n in (1, 512, 513, 262144)] == [1, 1, 2, 64]


@pytest.mark.parametrize(
    "call,says",
    [
        (lambda: tk.matmul(torch.zeros(1, 32), torch.zeros(4, 20), "Q4_1", 32, 4), "no GPU kernel"),
        (lambda: tk.matmul(torch.zeros(1, 48), torch.zeros(4, 96), "F16", 48, 4), "32 weights"),
        (lambda: tk.matmul(torch.zeros(1, 64), torch.zeros(4, 34), "Q8_0", 32, 4), "(rows, 32)"),
        (lambda: tk.matmul(torch.zeros(1, 32), torch.zeros(4, 34), "Q8_0", 32, 4), "136 contig"),
        (
            lambda: tk.experts_matmul(
                torch.zeros(3, 32),
                torch.zeros((2, 4, 34), dtype=torch.uint8),
                "Q8_0",
                32,
                4,
                torch.zeros((2, 2), dtype=torch.int32),
            ),
            "rows of activations, not 3",
        ),
    ],
)  # fmt: skip
def test_wrong_arguments_say_so(call: Callable[[], object], says: str) -> None:
    with pytest.raises(DesksideError) as error:
        call()
    assert says in str(error.value)


def test_without_interpreter_or_device_it_refuses() -> None:
    """What `triton.jit` makes without TRITON_INTERPRET is no InterpretedFunction."""
    with pytest.raises(DesksideError, match="CUDA device"):
        tk._launch(object(), (1, 1, 1), tk.Config(), torch.zeros(1))
