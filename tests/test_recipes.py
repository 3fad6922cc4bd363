"""What `quantize --type` names: which matrix gets which type."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.convert.quantize import quantize_file
from deskside.convert.recipes import RECIPES, recipe, writable
from deskside.convert.synth import synth_file
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.encoders import encodable
from deskside.gguf.quants import quant_type
from tests import ik_ggml
from tests.commands import command
from tests.models import rewrite

MIXES = ("Q2_K", "Q3_K_M", "Q4_K_S", "Q4_K_M", "Q5_K_M")
# Rows of whole superblocks everywhere: nothing falls back.
WIDE = {"vocab_size": 512, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
MOE = {key: WIDE[key] for key in ("vocab_size", "moe_intermediate_size")}


def f32(path: Path, preset: str, layers: int, **overrides: Any) -> Path:
    synth_file(preset, path, layers=layers, overrides=overrides, types=[("", quant_type("F32"))])
    return path


def types(path: Path) -> dict[str, str]:
    return {name: info.type.name for name, info in GGUF.open(path).tensors.items()}


@pytest.mark.external
@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize(
    ("preset", "overrides"),
    [("tiny-llama", {"vocab_size": 512}), ("tiny-qwen3moe", {**MOE, "num_experts": 8})],
    ids=["dense", "8 experts"],
)
def test_mixes_are_those_of_llama_quantize(
    name: str, preset: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """ik's llama-quantize, where its choices are still llama.cpp's: up to three query heads per KV
    head, dense or of eight experts. 16 layers have a first eighth, a sixteenth and a rest."""
    source = f32(tmp_path / "f32.gguf", preset, 16, **overrides)
    theirs, ours = tmp_path / "theirs.gguf", tmp_path / "ours.gguf"
    command = [str(ik_ggml.llama_quantize()), str(source), str(theirs), name, "1"]
    subprocess.run(command, check=True, capture_output=True)
    assert quantize_file(source, ours, recipe(name)) == []
    assert types(ours) == types(theirs)
    key = "general.file_type"
    assert GGUF.open(ours).metadata[key] == GGUF.open(theirs).metadata[key]


def chosen(path: Path, name: str) -> dict[str, str]:
    """The type of every matrix by its name."""
    model = GGUF.open(path)
    choose = recipe(name).types(model)
    return {n: choose(n).name for n, info in model.tensors.items() if len(info.shape) > 1}


def test_q4_k_m_spends_more_on_some_layers(tmp_path: Path) -> None:
    """First and last eighth, and every third between. In a hybrid model the delta net's attn_qkv
    counts as attention's attn_v does."""
    got = chosen(f32(tmp_path / "m.gguf", "tiny-moe", 8, **WIDE), "Q4_K_M")
    for i in range(8):
        expected = "Q6_K" if i in (0, 3, 6, 7) else "Q4_K"
        value = "attn_v" if i % 4 == 3 else "attn_qkv"
        for part in (value, "ffn_down_exps", "ffn_down_shexp"):
            assert got[f"blk.{i}.{part}.weight"] == expected, (i, part)
        for part in ("ffn_gate_exps", "ffn_up_shexp"):
            assert got[f"blk.{i}.{part}.weight"] == "Q4_K", (i, part)
    assert (got["token_embd.weight"], got["output.weight"]) == ("Q4_K", "Q6_K")


def test_q2_k_keeps_shared_values_finer(tmp_path: Path) -> None:
    for kv_heads, expected in ((1, "Q4_K"), (2, "Q3_K")):
        path = f32(tmp_path / f"{kv_heads}.gguf", "tiny-llama", 2, num_key_value_heads=kv_heads)
        assert chosen(path, "Q2_K")["blk.1.attn_v.weight"] == expected


def test_the_published_mix_for_ik_llama_cpp(tmp_path: Path) -> None:
    got = chosen(f32(tmp_path / "m.gguf", "tiny-moe", 4, **WIDE), "IQ4_KSS")
    assert got["token_embd.weight"] == "IQ4_K"
    assert got["output.weight"] == "IQ6_K"
    for i in range(4):
        layer = {n.split(".")[2]: t for n, t in got.items() if n.startswith(f"blk.{i}.")}
        assert layer.pop("ffn_gate_exps") == layer.pop("ffn_up_exps") == "IQ4_KSS"
        assert layer.pop("ffn_down_exps") == "IQ4_KS"
        assert set(layer.values()) == {"IQ5_KS"}


def test_a_dense_model_has_its_feed_forward_where_others_have_experts(tmp_path: Path) -> None:
    path = f32(tmp_path / "m.gguf", "tiny-llama", 1)
    got = chosen(rewrite(path, tmp_path / "tied.gguf", drop=("output.weight",)), "IQ4_KSS")
    assert got["token_embd.weight"] == "IQ6_K"  # it is the head
    assert got["blk.0.ffn_up.weight"] == "IQ4_KSS"
    assert got["blk.0.ffn_down.weight"] == "IQ4_KS"
    assert got["blk.0.attn_q.weight"] == "IQ5_KS"


def test_a_mix_is_written_with_rules_first_and_the_rest_as_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = f32(tmp_path / "f32.gguf", "tiny-moe", 4, **WIDE)
    out = tmp_path / "q.gguf"
    flags = ("--type", "iq4_kss", "--tensor-type", "shexp=Q8_0")
    code, _, said = command(capsys, "quantize", str(source), str(out), *flags)
    assert code == 0, said
    got = types(out)
    assert got["blk.0.ffn_gate_inp.weight"] == got["blk.0.attn_norm.weight"] == "F32"
    assert got["blk.0.ffn_up_shexp.weight"] == "Q8_0"
    assert got["blk.0.ffn_up_exps.weight"] == "IQ4_KSS"
    assert GGUF.open(out).metadata["general.file_type"] == 148
    GGUF.open(out).check_values()


def test_pure_is_one_type(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = f32(tmp_path / "f32.gguf", "tiny-llama", 1), tmp_path / "q.gguf"
    for flags, expected in (((), {"Q4_K", "Q6_K"}), (("--pure",), {"Q4_K"})):
        words = ("quantize", str(source), str(out), "--type", "q4_k", *flags)
        assert command(capsys, *words)[0] == 0
        assert {t for n, t in types(out).items() if "norm" not in n} == expected
    code, _, said = command(capsys, *words[:-2], "q4_k_m", "--pure")
    assert code == 2
    assert "'q4_k_m'" in said


def test_short_names_are_those_of_llama_cpp() -> None:
    for short in ("Q3_K", "Q4_K", "Q5_K"):
        assert recipe(short) is RECIPES[f"{short}_M"]
    assert recipe("q6_k").file_type == 18


@pytest.mark.parametrize("bad", ["Q9", "I8", "F64", "Q5_0", ""])
def test_an_error_lists_what_can_be_written_and_nothing_else(bad: str) -> None:
    for ask, names in ((recipe, {*RECIPES, *encodable()}), (writable, set(encodable()))):
        with pytest.raises(DesksideError) as error:
            ask(bad)
        listed = str(error.value).partition("choose from ")[2]
        assert set(listed.split(", ")) == names


def test_lists_of_head_counts_are_read(tmp_path: Path) -> None:
    """Some converters write a number a layer, 0 for layers without attention."""
    path = f32(tmp_path / "m.gguf", "tiny-llama", 2)
    key = "llama.attention.head_count_kv"
    listed = rewrite(path, tmp_path / "l.gguf", metadata={key: np.array([0, 2], np.int32)})
    assert chosen(listed, "Q2_K") == chosen(path, "Q2_K")
