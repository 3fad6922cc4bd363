"""Synthetic files: the shapes they claim, weights on a sane scale, a tokenizer that works."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.convert import synth
from deskside.convert.synth import PRESETS, estimate, outline, synth_file
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.models import build_tape
from deskside.text.tokenizer import Tokenizer

TINY = [name for name in PRESETS if name.startswith("tiny")]
# Small enough to be made by each test.
SMALL: dict[str, Any] = {"layers": 4, "experts": 4, "vocab": 300}


def made(tmp_path: Path, preset: str = "tiny-moe", **arguments: Any) -> GGUF:
    out = tmp_path / f"{preset}.gguf"
    synth_file(preset, out, **arguments)
    return GGUF.open(out)


@pytest.fixture(scope="module")
def tiny_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, GGUF]:
    return {preset: made(tmp_path_factory.mktemp("tiny"), preset) for preset in TINY}


@pytest.mark.parametrize("preset", TINY)
def test_tiny_files_are_whole_models(tiny_files: dict[str, GGUF], preset: str) -> None:
    file = tiny_files[preset]
    file.check_values()
    build_tape(file)


@pytest.mark.parametrize("layers", [1, 2, 3, 5])
def test_any_number_of_layers(tmp_path: Path, layers: int) -> None:
    file = made(tmp_path, layers=layers, experts=4, vocab=300)
    assert file.metadata["qwen35moe.block_count"] == layers
    full = {int(n.split(".")[1]) for n in file.tensors if n.endswith("attn_q.weight")}
    assert full == {i for i in range(layers) if (i + 1) % 4 == 0}
    build_tape(file)


# Billions of parameters as in docs/MODEL.md, rounded there to the last digit shown.
@pytest.mark.parametrize(
    ("preset", "billions", "rounding"),
    [
        ("qwen3.5-397b-a17b", 396.35, 0.005),
        ("qwen3.5-122b-a10b", 122.1, 0.05),
        ("qwen3.5-35b-a3b", 34.66, 0.005),
    ],
)
def test_real_presets_have_the_published_size(
    preset: str, billions: float, rounding: float
) -> None:
    weights = sum(math.prod(tensor.shape) for tensor in outline(preset).tensors)
    assert weights / 1e9 == pytest.approx(billions, abs=rounding)


def test_real_preset_shapes_and_types() -> None:
    plan = outline("qwen3.5-397b-a17b", mtp=True)
    table = {
        tensor.name: (tensor.shape, kind.name)
        for tensor, kind in zip(plan.tensors, plan.types, strict=True)
    }
    expected = {
        "token_embd.weight": ((4096, 248320), "Q8_0"),
        "output.weight": ((4096, 248320), "Q6_K"),
        "blk.0.attn_qkv.weight": ((4096, 12288), "Q8_0"),
        "blk.0.ssm_conv1d.weight": ((4, 12288), "F32"),
        "blk.0.ssm_out.weight": ((8192, 4096), "Q8_0"),
        "blk.3.attn_q.weight": ((4096, 16384), "Q8_0"),
        "blk.3.ffn_gate_inp.weight": ((4096, 512), "F32"),
        "blk.59.ffn_gate_exps.weight": ((4096, 1024, 512), "IQ4_NL"),
        "blk.59.ffn_down_exps.weight": ((1024, 4096, 512), "IQ4_NL"),
        "blk.59.ffn_down_shexp.weight": ((1024, 4096), "Q8_0"),
        "blk.60.nextn.eh_proj.weight": ((8192, 4096), "Q8_0"),
    }
    assert {name: table[name] for name in expected} == expected
    keys = {key: plan.metadata[f"qwen35moe.{key}"] for key in ("block_count", "expert_used_count")}
    assert keys == {"block_count": 61, "expert_used_count": 10}


def test_options_change_what_they_name(tmp_path: Path) -> None:
    file = made(
        tmp_path,
        layers=4,
        experts=6,
        vocab=311,
        overrides={"moe_intermediate_size": 96, "linear_num_value_heads": 12},
        mtp=True,
    )
    shapes = {name: info.shape for name, info in file.tensors.items()}
    assert shapes["blk.0.ffn_up_exps.weight"] == (256, 96, 6)
    assert shapes["blk.0.ssm_a"] == (12,)
    assert shapes["output.weight"] == (256, 311)
    assert "blk.4.nextn.eh_proj.weight" in shapes
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 311
    build_tape(file)


def test_first_matching_type_rule_wins(tmp_path: Path) -> None:
    rules = [(r"blk\.1\..*_exps", quant_type("Q8_0")), ("_exps|attn_q", quant_type("BF16"))]
    file = made(tmp_path, **SMALL, types=rules)
    kinds = {name: info.type.name for name, info in file.tensors.items()}
    assert kinds["blk.0.ffn_up_exps.weight"] == "BF16"
    assert kinds["blk.1.ffn_up_exps.weight"] == "Q8_0"
    assert kinds["blk.3.attn_q.weight"] == "BF16"
    assert kinds["blk.3.attn_k.weight"] == "Q8_0"
    assert kinds["blk.3.attn_q_norm.weight"] == "F32"
    # llama.cpp's number for "mostly BF16": the experts of three of four layers.
    assert file.metadata["general.file_type"] == 32


def test_default_types_fall_back_where_rows_are_too_short(tmp_path: Path) -> None:
    file = made(tmp_path, **SMALL, overrides={"hidden_size": 96, "moe_intermediate_size": 40})
    kinds = {name: info.type.name for name, info in file.tensors.items()}
    assert kinds["output.weight"] == "Q8_0"  # 96 is no multiple of Q6_K's 256
    assert kinds["blk.0.ffn_down_exps.weight"] == "F16"  # 40 is none of 32


def test_the_seed_decides_the_bytes(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "abc"]
    for path, seed in zip(files, (1, 1, 2), strict=True):
        synth_file("tiny-moe", path, **SMALL, seed=seed)
    one, same, other = (path.read_bytes() for path in files)
    assert one == same
    assert one != other


@pytest.mark.parametrize("all_random", [1 << 27, 0], ids=["random", "pooled"])
@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ4_KS", "IQ4_KSS"])
def test_weights_have_the_promised_scale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, all_random: int
) -> None:
    monkeypatch.setattr(synth, "_ALL_RANDOM", all_random)
    monkeypatch.setattr(synth, "_POOL_BYTES", 1 << 20)
    file = made(tmp_path, **SMALL, types=[(r"attn_q\.|_embd", quant_type(kind))])
    file.check_values()
    for name, scale in (("blk.3.attn_q.weight", 256**-0.5), ("token_embd.weight", 1.0)):
        x = file.dequantized(name)
        # At least 76,800 weights: the deviation of a sample is off by 1 / sqrt(2 n) = 0.3 %, five
        # times that is 1.3 %; four-bit rounding adds at most (1/8)^2 / 2. A pool mixes the row
        # scales h of IQ4_KS and IQ4_KSS with other rows' blocks: that multiplies the variance by
        # E[h^2] E[1/h^2] = 1 + 4 cv^2 with cv = 15 % for the maximum of 256 normals, 4.5 % more.
        assert x.std() == pytest.approx(scale, rel=0.08 if "KS" in kind else 0.03)
        assert abs(x.mean()) < 0.04 * scale
        assert len(np.unique(x, axis=0)) > len(x) // 2


def test_delta_net_parameters_are_realistic(tmp_path: Path) -> None:
    file = made(tmp_path, **SMALL)
    a = file.dequantized("blk.0.ssm_a")
    assert (a < 0).all() and (a >= -16).all()
    dt = np.log1p(np.exp(file.dequantized("blk.0.ssm_dt.bias")))
    assert (dt > 0.99e-3).all() and (dt < 0.101).all()


def test_tied_embedding_is_scaled_as_a_head(tmp_path: Path) -> None:
    file = made(tmp_path, "tiny-llama", vocab=600, overrides={"tie_word_embeddings": True})
    assert "output.weight" not in file.tensors
    # 153,600 weights: five standard errors of the deviation are 0.9 %.
    assert file.dequantized("token_embd.weight").std() == pytest.approx(1 / 16, rel=0.01)


@pytest.mark.parametrize("preset", TINY)
def test_estimate(tiny_files: dict[str, GGUF], preset: str) -> None:
    size = tiny_files[preset].path.stat().st_size
    # What it leaves out: merges, template, tensor table and padding, below 150 bytes per tensor.
    assert 0 <= size - estimate(preset) < 100_000


# --- tokenizer ---------------------------------------------------------------------------------


@pytest.mark.parametrize("preset", TINY)
@settings(max_examples=40, deadline=None)
@given(text=st.text(st.characters(codec="utf-8")))
def test_every_text_can_be_encoded(
    tiny_tokenizers: dict[str, Tokenizer], preset: str, text: str
) -> None:
    tokenizer = tiny_tokenizers[preset]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert len(ids) <= len(text.encode())


@pytest.fixture(scope="module")
def tiny_tokenizers(tiny_files: dict[str, GGUF]) -> dict[str, Tokenizer]:
    return {name: Tokenizer.from_metadata(file.metadata, name) for name, file in tiny_files.items()}


def test_vocabulary(tmp_path: Path) -> None:
    file = made(tmp_path, layers=1, experts=4, vocab=5000)
    tokens = file.metadata["tokenizer.ggml.tokens"]
    types = file.metadata["tokenizer.ggml.token_type"]
    assert len(tokens) == len(set(tokens)) == len(types) == 5000
    assert tokens[file.metadata["tokenizer.ggml.eos_token_id"]] == "<|im_end|>"
    assert [t for t, kind in zip(tokens, types, strict=True) if kind == 3] == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert all((t == f"[PAD{i}]") == (types[i] == 5) for i, t in enumerate(tokens))
    assert types[-1] == 5
    tokenizer = Tokenizer.from_metadata(file.metadata, "file")
    assert len(tokenizer.encode("return the first argument")) <= 8  # words are learned
    assert len(tokenizer.encode("<|im_start|>user\n")) <= 4


# --- refusals ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "arguments", "message"),
    [
        ("huge-moe", {}, "preset 'huge-moe' is not known"),
        ("tiny-moe", {"layers": 0}, "num_hidden_layers is 0"),
        ("tiny-moe", {"layers": 10**9}, "num_hidden_layers 1000000000 is more"),
        ("tiny-moe", {"experts": 3}, "num_experts_per_tok is 4, more than num_experts 3"),
        ("tiny-moe", {"vocab": 100}, "vocabulary of 100 is too small"),
        ("tiny-moe", {"vocab": 10**12}, "vocab_size 1000000000000 is more"),
        ("tiny-moe", {"seed": -1}, "seed -1"),
        ("tiny-moe", {"overrides": {"colour": 1}}, "tiny-moe has no colour"),
        ("tiny-moe", {"overrides": {"head_dim": "x"}}, "head_dim is 'x'"),
        ("tiny-moe", {"overrides": {"model_type": "llama"}}, "tiny-moe has no model_type"),
        ("tiny-llama", {"experts": 4}, "tiny-llama has no num_experts"),
        ("tiny-llama", {"mtp": True}, "no MTP layer"),
        ("tiny-moe", {"types": [("(", quant_type("Q8_0"))]}, r"'\(' is not a regex"),
        ("tiny-moe", {"types": [("exps", quant_type("Q6_K"))]}, "Q6_K needs rows .* 256.* has 64"),
        ("tiny-moe", {"types": [("exps", quant_type("Q5_1"))]}, "Q5_1"),
    ],
)
def test_bad_arguments(
    tmp_path: Path, preset: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(DesksideError, match=message) as caught:
        synth_file(preset, tmp_path / "out.gguf", **arguments)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_too_little_disk_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        free = 10**9

    monkeypatch.setattr("shutil.disk_usage", lambda _: Usage)
    with pytest.raises(
        DesksideError, match=r"needs 20\.7 GB, the disk has 1\.0 GB free; use fewer"
    ):
        synth_file("qwen3.5-35b-a3b", tmp_path / "out.gguf")
    assert not list(tmp_path.iterdir())


def test_folder_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(DesksideError, match="cannot be written"):
        synth_file("tiny-moe", tmp_path / "no" / "out.gguf", **SMALL)
