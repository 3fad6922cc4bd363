"""The executor with Triton's kernels, in Triton's interpreter, against torch's ops.

Op by op on the same inputs, so that the bounds are those of a sum (see test_triton): from op to op
a difference of one bit may round an activation to another of its 8-bit steps.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.convert import synth
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from tests.models import tiny
from tests.oracles.need import packages
from tests.placements import IDS, batch, cache_options
from tests.torch_devices import FakeDevice, PlacedBackend, kernels, torch_ops, torch_quants

packages("triton")
torch = import_module("torch")
triton_kernels = import_module("deskside.backends.triton.table").triton_kernels

pytestmark = pytest.mark.external
EPS = 2.0**-24
FEW_ROWS = 2  # of activations that are not rounded to float16


@pytest.fixture(autouse=True)
def wide_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes some ten milliseconds a tile, however many rows of a matrix it has;
    test_triton has the tiles of a GPU."""
    tk = import_module("deskside.backends.triton.launch")
    narrow = tk.matvec_config

    def wide(*args: Any, **options: Any) -> Any:
        config = narrow(*args, **options)
        return replace(config, constants=config.constants | {"BLOCK_N": 32})

    monkeypatch.setattr(tk, "matvec_config", wide)


@pytest.fixture
def micro(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[int, str], Path]:
    """Writes a model of a delta net layer and an attention layer."""

    def write(hidden: int, types: str) -> Path:
        config = {
            "model_type": "qwen3_5_moe_text",
            "vocab_size": 2560,
            "max_position_embeddings": 256,
            "hidden_size": hidden,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "linear_num_key_heads": 1,
            "linear_num_value_heads": 2,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "linear_conv_kernel_dim": 4,
            "full_attention_interval": 2,
            "rope_parameters": {
                "rope_theta": 1e6, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2],
            },
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        }  # fmt: skip
        monkeypatch.setitem(synth.PRESETS, "micro", config)
        path = tmp_path / f"{hidden}-{types}.gguf"
        # Superblocks of 256 weights fit only rows as wide as the model.
        wide = "." if types == "F32" else r"attn_(q|k|gate)\.|(gate|up)_exps"
        rules = [(wide, quant_type(types))] if types else []
        synth.synth_file("micro", path, types=rules)
        return path

    return write


def backend(path: Path, table: Any, *, graphs: bool = False) -> Any:
    """All on one device but the embedding and the head, which are long, and the shared expert."""
    file = GGUF.open(path)
    tape = build_tape(file)
    device = FakeDevice("emu0", 1 << 30, kernels=table, graphs=graphs)
    placement = {
        n: "emu0" if n.startswith("blk.") and "shexp" not in n else "cpu" for n in tape.weights()
    }
    return PlacedBackend(file, tape, placement, [device], HostOptions(), max_tokens=40)


def counting(table: Any, calls: Counter[str]) -> Any:
    """The table, with its calls counted."""

    def counted(name: str) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            calls[name] += 1
            return getattr(table, name)(*args, **options)

        return call

    names = ("matmul", "pairs", "delta_step", "attention")
    return replace(table, **{name: counted(name) for name in names})


def product_bound(x: Any, w: Any, info: Any) -> Any:
    """How far two float32 sums of x (m, n) and matrices w (m or 1, rows, row bytes) may be apart,
    with both factors rounded to float16 in one."""
    flat = w.reshape(-1, w.shape[-1])
    floats = torch_quants.dequantize(flat, info.type, info.row_len).abs().double()
    floats = floats.reshape(*w.shape[:2], info.row_len)
    size = x.abs().double()
    magnitude = (floats @ size[:, :, None])[:, :, 0]
    tiny_factors = floats.sum(-1) * 2 * size.amax(1, keepdim=True) + size.sum(1, keepdim=True)
    return (2 * (info.row_len + 8) * EPS + 2.0**-10) * magnitude + 2.0**-25 * tiny_factors


class Checked:
    """`OPS` with each op's kernel compared with torch's op, whose result goes on; matrices of one
    type and row once a step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: set[Any] = set()
        for kind in ("linear", "experts", "gated_delta", "attention"):
            check = getattr(self, kind)
            monkeypatch.setitem(torch_ops.OPS, kind, self._both(torch_ops.OPS[kind], check))

    def _both(self, run: Any, check: Any) -> Any:
        def both(op: Any, inputs: Any, step: Any) -> Any:
            key = (id(step.batch), op.kind, *((w.type.name, w.row_len) for w in op.weights))
            if key in self.seen and op.kind in ("linear", "experts"):
                return run(op, inputs, replace(step, kernels=kernels.NONE))
            self.seen.add(key)
            states = {i: tuple(a.clone() for a in step.states[i]) for i in step.states}
            twin = replace(step, kernels=kernels.NONE, states=states)
            expected = run(op, inputs, twin)
            got = run(op, inputs, step)
            check(op, inputs, step, twin, expected[0], got[0])
            for i, arrays in states.items():
                for held, array in zip(step.states[i], arrays, strict=True):
                    held.copy_(array)
            return expected

        return both

    def linear(self, op: Any, inputs: Any, step: Any, twin: Any, expected: Any, got: Any) -> None:
        (info,) = op.weights
        x = torch_ops.rounded(inputs[0], info.type)
        allowed = product_bound(x, step.weights[info.name][None], info)
        assert ((got - expected).abs() <= allowed).all(), info.name

    def experts(self, op: Any, inputs: Any, step: Any, twin: Any, expected: Any, got: Any) -> None:
        """Its two halves: between them h is rounded to 8 bits."""
        x, ids, p = inputs
        gate, up, down = op.weights
        n, top_k = ids.shape
        halves = []
        for info in (gate, up):
            y = torch_ops._per_pair(x, ids, info, twin).reshape(n * top_k, -1)
            w = step.weights[info.name].reshape(-1, info.shape[1], info.row_bytes)
            pairs = torch_ops.rounded(x, info.type).repeat_interleave(top_k, 0)
            halves.append((y, product_bound(pairs, w[ids.reshape(-1).long()], info)))
        (g, dg), (u, du) = halves
        h = torch.nn.functional.silu(g) * u
        # silu's slope is below 1.1, and it is some ulp off.
        off = (
            1.1 * dg * (u.abs() + du) + torch.nn.functional.silu(g).abs() * du + 16 * EPS * h.abs()
        )
        rounded = torch_ops.rounded(x, gate.type)
        weights = [step.weights[i.name] for i in (gate, up)]
        fused = step.kernels.pairs(rounded, weights[0], gate, ids, weights[1])
        assert ((fused - h).abs() <= off).all()
        h = h.reshape(n, -1)
        a, b = (torch_ops._sum_experts(h, ids, p, down, s) for s in (step, twin))
        pairs = torch_ops.rounded(h.reshape(n * top_k, -1), down.type)
        w = step.weights[down.name].reshape(-1, down.shape[1], down.row_bytes)
        allowed = product_bound(pairs, w[ids.reshape(-1).long()], down).reshape(n, top_k, -1)
        assert ((a - b).abs() <= (1.01 * p[:, :, None] * allowed).sum(1)).all()

    def gated_delta(
        self, op: Any, inputs: Any, step: Any, twin: Any, expected: Any, got: Any
    ) -> None:
        dim, (state,) = op.attrs["head_dim"], step.states[op.state]
        largest = max(float(state.abs().max()), float(inputs[0].abs().max()))
        allowed = 8 * (dim + 8) * EPS * largest * dim**0.5
        torch.testing.assert_close(got, expected, rtol=0, atol=allowed)
        torch.testing.assert_close(state, twin.states[op.state][0], rtol=0, atol=allowed)

    def attention(
        self, op: Any, inputs: Any, step: Any, twin: Any, expected: Any, got: Any
    ) -> None:
        dim, caches = op.attrs["head_dim"], twin.states[op.state]
        for a, b in zip(step.states[op.state], caches, strict=True):
            assert torch.equal(a, b)  # what is stored, to the bit
        keys, values = (
            torch_quants.decode_cached(c, t.name).abs().max()
            for c, t in zip(caches, (step.k_type, step.v_type), strict=True)
        )
        rounding = 2.0**-10 + (dim + 8) * EPS  # of q and K; the same of p and V
        top = op.attrs["scale"] * inputs[0].abs().reshape(-1, dim).sum(1).max() * keys
        off = float(torch.expm1(2 * rounding * top)) + rounding + 64 * EPS
        assert (got - expected).abs().max() <= off * values


STEPS = [
    batch((1, 0, IDS[:10])),
    batch((1, 10, IDS[10:11])),
    batch((1, 11, IDS[11:12]), (0, 0, IDS[12:13]), (2, 0, IDS[13:14]), outputs=[1]),
]


@pytest.mark.parametrize("hidden,types,kv", [(32, "", "q8_0"), (256, "IQ4_KSS", "f16")])
def test_kernels_are_their_twins(
    hidden: int, types: str, kv: str, micro: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten tokens (tiles of experts), one, and three sequences of one token each."""
    calls: Counter[str] = Counter()
    Checked(monkeypatch)
    own = backend(micro(hidden, types), counting(triton_kernels(), calls))
    cache = own.new_cache(**cache_options(kv))
    for step in STEPS:
        assert np.isfinite(own.run(step, cache)).all()
    assert calls["attention"] == calls["delta_step"] == 2
    assert calls["pairs"] >= 3 * 4 and calls["matmul"] >= 3 * 2


def test_greedy_tokens_with_kernels_are_those_without(micro: Any) -> None:
    """And where sections are replayed with the kernels in them, the logits too, to the bit."""
    path = micro(32, "F32")
    tokens, logits = [], []
    for table, graphs in (
        (kernels.NONE, False),
        (triton_kernels(), False),
        (triton_kernels(), True),
    ):
        own = backend(path, table, graphs=graphs)
        cache = own.new_cache(**cache_options("f32"))
        made, out = [IDS[0]], []
        for i in range(6):
            out.append(own.run(batch((0, i, made[-1:])), cache))
            made.append(int(out[-1].argmax()))
        tokens.append(made)
        logits.append(np.concatenate(out))
    assert own.devices["emu0"].graphs.replays >= 2
    assert tokens[0] == tokens[1] == tokens[2]
    assert np.linalg.norm(logits[1] - logits[0]) < 1e-5 * np.linalg.norm(logits[0])
    np.testing.assert_array_equal(logits[1], logits[2])


def test_a_kernel_is_used_only_for_what_it_takes() -> None:
    """Types that no kernel reads, and rows that are not aligned to 4 bytes, go to torch's ops."""
    table = triton_kernels()
    info = GGUF.open(tiny("tiny-dense", "Q8_0")).tensors["output.weight"]
    shifted = torch.zeros(info.n_rows * info.row_bytes + 2, dtype=torch.uint8)[2:]
    assert not table.takes(shifted.view(info.n_rows, -1), info)
    aligned = shifted.clone().view(info.n_rows, -1)
    assert table.takes(aligned, info)
    assert not table.takes(aligned, replace(info, type=quant_type("Q5_1")))
    assert not table.takes_delta(48) and not table.takes_attention("f16", "f16", 512)
    assert not table.takes_attention("q4_0", "f16", 128)
