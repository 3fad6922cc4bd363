"""Files of other writers: they run and give the same numbers, whatever joins or names tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside import LLM
from deskside.convert.quantize import quantize_file
from deskside.convert.synth import synth_file
from deskside.engine.config import EngineConfig
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.quants import BY_NAME
from deskside.gguf.writer import GGUFWriter
from deskside.models import build_tape
from deskside.plan.rules import Rules, apply, parse_overrides
from tests.models import PRESETS, rewrite, tiny

IDS = np.random.default_rng(3).integers(0, 2000, 20).tolist()
ARCH = "qwen35moe"


def with_biases_joined(src: Path, dst: Path) -> Path:
    """A copy with a block's biases of q, k and v in one vector."""
    file = GGUF.open(src)
    names = [n for n in file.tensors if not re.search(r"attn_[kv]\.bias", n)]
    data, table = {}, []
    for name in names:
        info, x = file.tensors[name], file.raw(name)
        if name.endswith("attn_q.bias"):
            vectors = [file.dequantized(name.replace("attn_q", f"attn_{c}")) for c in "qkv"]
            x = np.concatenate(vectors)
            name, info = name.replace("attn_q", "attn_qkv"), replace(info, shape=x.shape)
        data[name] = x
        table.append((name, info.type, info.shape))
    with GGUFWriter(dst, file.typed_metadata(), table) as out:
        for name, x in data.items():
            out.write(name, x)
    return dst


def joined(src: Path, dst: Path, joins: Mapping[str, tuple[str, ...]]) -> Path:
    """A copy in which tensors of a block are joined, row after row of each matrix."""
    file = GGUF.open(src)
    parts = {
        f"{block}{part}.weight": (f"{block}{fused}.weight", [f"{block}{p}.weight" for p in own])
        for fused, own in joins.items()
        for part in own
        for block in (f"blk.{i}." for i in range(16))
        if f"{block}{own[-1]}.weight" in file.tensors
    }
    table: list[tuple[str, Any, tuple[int, ...]]] = []
    data: dict[str, np.ndarray] = {}
    for name, info in file.tensors.items():
        fused, own = parts.get(name, (name, [name]))
        if fused in data:
            continue
        pieces = [file.tensors[n] for n in own]
        assert len({piece.type.name for piece in pieces}) == 1
        data[fused] = np.concatenate([file.matrices(n) for n in own], axis=1)
        rows = sum(piece.shape[1] for piece in pieces) if len(info.shape) > 1 else None
        shape = info.shape if rows is None else (info.row_len, rows, *info.shape[2:])
        table.append((fused, info.type, shape))
    with GGUFWriter(dst, file.typed_metadata(), table) as out:
        for name, _, _ in table:
            out.write(name, data[name])
    return dst


JOINS = {
    "ffn_gate_up_exps": ("ffn_gate_exps", "ffn_up_exps"),
    "ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp"),
    "ffn_gate_up": ("ffn_gate", "ffn_up"),
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
}


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    folder = tmp_path_factory.mktemp("fused")

    def make(preset: str, types: str = "") -> Path:
        path = folder / f"{preset}-{types}.gguf"
        return path if path.exists() else joined(tiny(preset, types), path, JOINS)

    return make


def logits(path: Path, **options: Any) -> np.ndarray:
    return LLM(path, ctx=64, threads=1, **options).logits(IDS)


@pytest.mark.parametrize("preset", PRESETS)
def test_joined_tensors_give_the_same_numbers(fused: Callable[..., Path], preset: str) -> None:
    path = fused(preset)
    names = GGUF.open(path).tensors
    own = re.compile(r"(ffn_(gate|up)(_exps|_shexp)?|attn_[qkv])\.weight")
    assert not any(own.search(name) for name in names)
    assert np.array_equal(logits(path), logits(tiny(preset)))


def test_joined_biases_give_the_same_numbers(fused: Callable[..., Path], tmp_path: Path) -> None:
    path = with_biases_joined(fused("tiny-qwen2"), tmp_path / "m.gguf")
    names = GGUF.open(path).tensors
    assert "blk.0.attn_qkv.bias" in names
    assert not any(re.search(r"attn_[qkv]\.bias", name) for name in names)
    assert np.array_equal(logits(path), logits(tiny("tiny-qwen2")))


def test_the_reference_reads_them_too(fused: Callable[..., Path]) -> None:
    path = fused("tiny-moe")
    plain = logits(tiny("tiny-moe"), backend="reference")
    assert np.array_equal(logits(path, backend="reference"), plain)


@pytest.mark.parametrize("types", ["F32", "Q8_0", "IQ4_KSS"])
def test_rows_of_every_sort_of_type(fused: Callable[..., Path], types: str) -> None:
    if types == "IQ4_KSS":  # needs rows of 256: the experts' down matrices have fewer
        src = fused("tiny-dense", types)
        assert np.array_equal(logits(src), logits(tiny("tiny-dense", types)))
        return
    assert np.array_equal(logits(fused("tiny-moe", types)), logits(tiny("tiny-moe", types)))


@pytest.mark.external
@pytest.mark.parametrize(
    "options",
    [
        {"gpu_layers": "all"},
        {"cpu_moe": True},
        {"cpu_moe": True, "expert_cache": "1MiB"},
        {"cpu_moe": True, "stream_experts": "8"},
        {"override_tensor": ("ffn_gate_up_exps=CPU", "attn_qkv=CPU")},
        {"override_tensor": ("ffn_up_exps=CPU",)},  # the halves on two devices
    ],
    ids=str,
)
def test_devices_read_them_too(fused: Callable[..., Path], options: dict[str, Any]) -> None:
    pytest.importorskip("torch")
    config = {"devices": ("emu0:64MiB",), **options}
    moved = dict(config)
    if "ffn_gate_up_exps" in str(options):  # in the file with tensors of their own
        moved["override_tensor"] = (r"ffn_(gate|up)_exps=CPU", r"blk\.3\.attn_[qkv]\.=CPU")
        config["override_tensor"] = ("ffn_gate_up_exps=CPU", r"blk\.3\.attn_qkv=CPU")
    got = logits(fused("tiny-moe"), **config)
    assert np.array_equal(got, logits(tiny("tiny-moe"), **moved))


def test_a_plan_counts_them_once(fused: Callable[..., Path]) -> None:
    plain, views = (build_tape(GGUF.open(p)).weights() for p in (tiny(), fused("tiny-moe")))
    assert {n: w.nbytes for n, w in plain.items()} == {n: w.nbytes for n, w in views.items()}


def test_rules_know_both_names(fused: Callable[..., Path]) -> None:
    weights = build_tape(GGUF.open(fused("tiny-moe"))).weights()
    names = list(weights)
    sources = {w.name: w.source for w in weights.values()}
    for regex in ("ffn_gate_up_exps", r"ffn_(gate|up)_exps"):
        rules = Rules(parse_overrides([rf"blk\.0\.{regex}=CPU"]))
        placed = apply(rules, names, 4, (), sources).devices
        assert set(placed) == {"blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight"}


def test_a_joined_tensor_of_a_wrong_shape_is_named(tmp_path: Path) -> None:
    path = joined(tiny(), tmp_path / "m.gguf", {"attn_qkv": ("attn_q", "attn_k", "attn_v")})
    bad = np.zeros((5, 256), np.float32)
    path = rewrite(path, tmp_path / "bad.gguf", replace={"blk.3.attn_qkv.weight": bad})
    with pytest.raises(DesksideError, match=r"blk\.3\.attn_qkv\.weight has shape \[256, 5\]"):
        build_tape(GGUF.open(path))


def test_quantize_keeps_tensors_joined(fused: Callable[..., Path], tmp_path: Path) -> None:
    quantize_file(fused("tiny-moe"), tmp_path / "q.gguf", BY_NAME["Q8_0"])
    quantize_file(tiny(), tmp_path / "plain.gguf", BY_NAME["Q8_0"])
    assert "blk.0.ffn_gate_up_exps.weight" in GGUF.open(tmp_path / "q.gguf").tensors
    assert np.array_equal(logits(tmp_path / "q.gguf"), logits(tmp_path / "plain.gguf"))


RENAMES = {
    "blk.0.ssm_dt.bias": "blk.0.ssm_dt",
    "blk.1.ssm_dt.bias": "blk.1.ssm_dt.weight",
    "blk.0.ssm_a": "blk.0.ssm_a.weight",
    "blk.0.ssm_conv1d.weight": "blk.0.ssm_conv1d",
    "blk.0.post_attention_norm.weight": "blk.0.attn_post_norm.weight",
    "blk.1.post_attention_norm.weight": "blk.1.ffn_norm.weight",
    "blk.3.attn_output.weight": "blk.3.attn_out.weight",
}


def test_other_names_of_the_same_tensors(tmp_path: Path) -> None:
    path = rewrite(tiny(), tmp_path / "m.gguf", rename=RENAMES)
    assert np.array_equal(logits(path), logits(tiny()))


@pytest.mark.parametrize(
    "metadata",
    [
        {"attention.head_count": np.full(4, 4, np.int32)},
        {"attention.head_count_kv": np.array([0, 0, 0, 2], np.int32)},
        {"attention.head_count_kv": np.array([0, 0, 0, 2, 0], np.uint32)},
        {"attention.head_count_kv": np.array([0, 0, 0, 2]), "full_attention_interval": None},
        {"expert_used_count": np.full(4, 4, np.int64)},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0},
        {"rope.scaling.type": "linear"},
        {"expert_gating_func": 1, "norm_top_k_prob": True, "ssm.v_head_reordered": True},
        {"something.of.the.future": [["nested"], ["lists"]], "vision.block_count": 27},
    ],
    ids=str,
)
def test_metadata_that_changes_nothing(tmp_path: Path, metadata: dict[str, Any]) -> None:
    changes = {f"{ARCH}.{key}": value for key, value in metadata.items()}
    path = rewrite(tiny(), tmp_path / "m.gguf", metadata=changes)
    assert np.array_equal(logits(path), logits(tiny()))


@pytest.mark.parametrize(
    "metadata",
    [
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0},
        {"rope.scaling.type": "yarn", "rope.scaling.factor": 1.0, "rope.scaling.attn_factor": 2.0},
        {"attn_logit_softcapping": 30.0},
        {"attention.head_count_kv": np.array([0, 0, 1, 2], np.int32)},
    ],
    ids=str,
)
def test_metadata_that_would_change_something_is_named(
    tmp_path: Path, metadata: dict[str, Any]
) -> None:
    changes = {f"{ARCH}.{key}": value for key, value in metadata.items()}
    path = rewrite(tiny(), tmp_path / "m.gguf", metadata=changes)
    with pytest.raises(DesksideError, match=rf"metadata key {ARCH}\.({'|'.join(metadata)}) "):
        build_tape(GGUF.open(path))


def with_more(dst: Path, more: Mapping[str, np.ndarray], unknown: tuple[str, ...] = ()) -> Path:
    """The tiny model with more F32 tensors; those in `unknown` get a type id that nobody knows."""
    file = GGUF.open(tiny())
    f32 = BY_NAME["F32"]
    table = [(n, info.type, info.shape) for n, info in file.tensors.items()]
    table += [(n, f32, x.shape[::-1]) for n, x in more.items()]
    with GGUFWriter(dst, file.typed_metadata(), table) as out:
        for name in file.tensors:
            out.write(name, file.raw(name))
        for name, x in more.items():
            out.write(name, x.astype("<f4"))
    data = dst.read_bytes()
    for name in unknown:
        at = data.index(name.encode()) + len(name)
        dims = data[at]
        at += 4 + 8 * dims
        assert data[at : at + 4] == bytes(4)
        data = data[:at] + b"\x4d\x01\0\0" + data[at + 4 :]
    dst.write_bytes(data)
    return dst


LEFT_OUT = (
    "v.blk.0.attn_q.weight",
    "v.patch_embd.weight",
    "mm.0.weight",
    "a.blk.0.conv.weight",
    "blk.0.ffn_down_exps.input_scale",
    "blk.4.attn_q.weight",
    "mtp.layers.0.weight",
)


def test_tensors_of_parts_that_are_not_run_get_one_note(tmp_path: Path) -> None:
    more: dict[str, np.ndarray] = {name: np.full((2, 3), 0.5, np.float32) for name in LEFT_OUT}
    more["blk.0.attn_qkv.scale"] = np.ones(1, np.float32)
    path = with_more(tmp_path / "m.gguf", more, unknown=(*LEFT_OUT[:2], "blk.4.attn_q.weight"))
    file = GGUF.open(path)
    assert set(file.unusable) == {*LEFT_OUT[:2], "blk.4.attn_q.weight"}
    (note,) = build_tape(file).notes
    for part in ("vision (3)", "audio (1)", "multi-token prediction (2)", "activations (1)"):
        assert part in note
    llm = LLM(path, ctx=64, threads=1)
    assert note in llm.notes
    assert np.array_equal(llm.logits(IDS), logits(tiny()))
    assert build_tape(GGUF.open(tiny())).notes == ()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blk.0.attn_qkv.scale", 0.5),  # multiplies the weight's products
        ("blk.0.attn_qkv.bias", 0.0),
        ("blk.0.extra.weight", 1.0),
        ("output.bias", 1.0),
    ],
)
def test_a_tensor_that_may_matter_is_refused(tmp_path: Path, name: str, value: float) -> None:
    path = with_more(tmp_path / "m.gguf", {name: np.full(3, value, np.float32)})
    with pytest.raises(DesksideError, match=f"tensor {re.escape(name)} .* has no place"):
        build_tape(GGUF.open(path))


def test_a_needed_tensor_of_an_unknown_type_is_named(tmp_path: Path) -> None:
    norm = np.ones(256, np.float32)
    base = rewrite(tiny(), tmp_path / "base.gguf", drop=("output_norm.weight",))
    file = GGUF.open(base)
    assert "output_norm.weight" not in file.tensors
    path = with_more(tmp_path / "m.gguf", {"v.x": norm}, unknown=("output_norm.weight",))
    with pytest.raises(DesksideError, match=r"output_norm\.weight' has the unknown type id 333"):
        build_tape(GGUF.open(path))


def test_dimensions_of_one_mean_nothing(tmp_path: Path) -> None:
    src = GGUF.open(tiny())
    name = "blk.0.ffn_gate_inp_shexp.weight"
    taps = "blk.0.ssm_conv1d.weight"
    path = rewrite(
        tiny(),
        tmp_path / "m.gguf",
        replace={
            name: src.dequantized(name).reshape(1, 1, -1),
            taps: src.dequantized(taps)[:, None],
        },
    )
    assert len(GGUF.open(path).tensors[name].shape) == 3
    assert np.array_equal(logits(path), logits(tiny()))


@pytest.mark.parametrize("told", [True, False])
def test_blocks_of_multi_token_prediction_are_kept_and_not_run(tmp_path: Path, told: bool) -> None:
    path, out = tmp_path / "mtp.gguf", tmp_path / "q.gguf"
    synth_file("tiny-moe", path, layers=4, vocab=2560, mtp=True)
    quantize_file(path, out, BY_NAME["Q8_0"])
    before, after = GGUF.open(path), GGUF.open(out)
    assert set(before.tensors) == set(after.tensors)
    assert after.get(f"{ARCH}.block_count") == 5
    assert after.get(f"{ARCH}.nextn_predict_layers") == 1
    assert after.tensors["blk.4.nextn.eh_proj.weight"].type.name == "Q8_0"
    if not told:
        key = f"{ARCH}.nextn_predict_layers"
        out = rewrite(out, tmp_path / "silent.gguf", metadata={key: None})
    tape = build_tape(GGUF.open(out))
    n = sum(name.startswith("blk.4.") for name in after.tensors)
    assert tape.notes == (
        f"left out tensors that text does not need: multi-token prediction ({n})",
    )
    assert not any(name.startswith("blk.4.") for name in tape.weights())
    assert EngineConfig(ctx=64).ctx == 64
    assert LLM(out, ctx=64, threads=1).generate(IDS).tokens


def test_rows_of_a_tensor_lie_where_they_are() -> None:
    t = TensorInfo("w", BY_NAME["Q8_0"], (64, 10, 3), Path("m"), 1000)
    part = t.rows("part", 4, 2)
    assert (part.offset, part.shape, part.source) == (1000 + 4 * 68, (64, 2, 3), "w")
    assert (part.stride, part.nbytes, part.n_rows) == (10 * 68, 6 * 68, 6)
    flat = TensorInfo("w", BY_NAME["F32"], (8, 10), Path("m"), 0).rows("part", 4, 2)
    assert (flat.stride, flat.offset, flat.matrix_stride) == (0, 128, 64)
