"""Hugging Face checkpoint to GGUF: transforms against loops that state them, and refusals."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from deskside.convert import huggingface as convert
from deskside.convert.huggingface import convert_hf
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.text.tokenizer import Tokenizer
from tests.hf_checkpoints import (
    CONTROL_TOKEN,
    EXPERTS,
    HEAD_DIM,
    HEADS,
    K_HEADS,
    KV_HEADS,
    LLAMA,
    QWEN3MOE,
    QWEN35DENSE,
    QWEN35MOE,
    S_DIM,
    SPLIT,
    USER_TOKEN,
    V_HEADS,
    VOCAB,
    WIDTH,
    Tensors,
    bf16,
    byte_level,
    llama_tensors,
    one_by_one,
    qwen3moe_tensors,
    qwen35_tensors,
    split_steps,
    tokenizer_json,
    write_checkpoint,
    write_safetensors,
)

Floats = NDArray[np.float32]
SHARED_TMP = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def converted(tmp_path: Path, config: dict[str, Any], tensors: Tensors, **options: Any) -> GGUF:
    out = tmp_path / "out.gguf"
    convert_hf(write_checkpoint(tmp_path / "hf", config, tensors), out, **options)
    return GGUF.open(out)


def weights(file: GGUF) -> dict[str, Floats]:
    return {name: file.dequantized(name) for name in file.tensors}


def tiled(head: int) -> int:
    """Where GGUF puts value head `head` of the checkpoint (docs/MODEL.md)."""
    r = V_HEADS // K_HEADS
    key_head, v = divmod(head, r)
    return v * K_HEADS + key_head


def tile_rows(x: Floats, start: int, head_dim: int) -> Floats:
    out = x.copy()
    for head in range(V_HEADS):
        for j in range(head_dim):
            out[start + tiled(head) * head_dim + j] = x[start + head * head_dim + j]
    return out


def expected_delta_net(t: Tensors, hf: str, p: str) -> dict[str, Floats]:
    v_start = 2 * K_HEADS * S_DIM
    return {
        p + "attn_qkv.weight": tile_rows(t[hf + "in_proj_qkv.weight"], v_start, S_DIM),
        p + "attn_gate.weight": tile_rows(t[hf + "in_proj_z.weight"], 0, S_DIM),
        p + "ssm_conv1d.weight": tile_rows(t[hf + "conv1d.weight"][:, 0], v_start, S_DIM),
        p + "ssm_dt.bias": tile_rows(t[hf + "dt_bias"], 0, 1),
        p + "ssm_a": tile_rows(-np.exp(t[hf + "A_log"]), 0, 1),
        p + "ssm_alpha.weight": tile_rows(t[hf + "in_proj_a.weight"], 0, 1),
        p + "ssm_beta.weight": tile_rows(t[hf + "in_proj_b.weight"], 0, 1),
        p + "ssm_norm.weight": t[hf + "norm.weight"],
        p + "ssm_out.weight": tile_rows(t[hf + "out_proj.weight"].T, 0, S_DIM).T,
    }


def expected_attention(t: Tensors, hf: str, p: str, plus: int) -> dict[str, Floats]:
    return {
        p + "attn_q.weight": t[hf + "q_proj.weight"],
        p + "attn_k.weight": t[hf + "k_proj.weight"],
        p + "attn_v.weight": t[hf + "v_proj.weight"],
        p + "attn_output.weight": t[hf + "o_proj.weight"],
        p + "attn_q_norm.weight": t[hf + "q_norm.weight"] + plus,
        p + "attn_k_norm.weight": t[hf + "k_norm.weight"] + plus,
    }


def expected_mlp(t: Tensors, hf: str, p: str, suffix: str = "") -> dict[str, Floats]:
    return {f"{p}ffn_{n}{suffix}.weight": t[f"{hf}{n}_proj.weight"] for n in ("gate", "up", "down")}


def expected_moe(t: Tensors, hf: str, p: str) -> dict[str, Floats]:
    return {
        p + "ffn_gate_inp.weight": t[hf + "gate.weight"],
        p + "ffn_gate_exps.weight": t[hf + "experts.gate_up_proj"][:, :WIDTH],
        p + "ffn_up_exps.weight": t[hf + "experts.gate_up_proj"][:, WIDTH:],
        p + "ffn_down_exps.weight": t[hf + "experts.down_proj"],
    }


def expected_ends(t: Tensors, plus: int) -> dict[str, Floats]:
    return {
        "token_embd.weight": t["model.embed_tokens.weight"],
        "output_norm.weight": t["model.norm.weight"] + plus,
        "output.weight": t["lm_head.weight"],
    }


def expected_qwen35(t: Tensors, *, moe: bool, mtp: bool) -> dict[str, Floats]:
    want = expected_ends(t, 1)
    for i in range(5 if mtp else 4):
        p, hf = f"blk.{i}.", f"model.layers.{i}." if i < 4 else "mtp.layers.0."
        want[p + "attn_norm.weight"] = t[hf + "input_layernorm.weight"] + 1
        want[p + "post_attention_norm.weight"] = t[hf + "post_attention_layernorm.weight"] + 1
        if i < 3:
            want |= expected_delta_net(t, hf + "linear_attn.", p)
        else:
            want |= expected_attention(t, hf + "self_attn.", p, 1)
        if moe:
            want |= expected_moe(t, hf + "mlp.", p)
            want |= expected_mlp(t, hf + "mlp.shared_expert.", p, "_shexp")
            want[p + "ffn_gate_inp_shexp.weight"] = t[hf + "mlp.shared_expert_gate.weight"][0]
        else:
            want |= expected_mlp(t, hf + "mlp.", p)
    if mtp:
        want["blk.4.nextn.eh_proj.weight"] = t["mtp.fc.weight"]
        want["blk.4.nextn.enorm.weight"] = t["mtp.pre_fc_norm_embedding.weight"] + 1
        want["blk.4.nextn.hnorm.weight"] = t["mtp.pre_fc_norm_hidden.weight"] + 1
        want["blk.4.nextn.shared_head_norm.weight"] = t["mtp.norm.weight"] + 1
    return want


def assert_same(got: dict[str, Floats], want: dict[str, Floats]) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        np.testing.assert_array_equal(got[name], x, err_msg=name)


@pytest.mark.parametrize("mtp", [False, True])
@pytest.mark.parametrize("moe", [False, True])
def test_qwen35(tmp_path: Path, moe: bool, mtp: bool) -> None:
    tensors = qwen35_tensors(moe=moe, mtp=mtp)
    file = converted(tmp_path, QWEN35MOE if moe else QWEN35DENSE, tensors)
    assert_same(weights(file), expected_qwen35(tensors, moe=moe, mtp=mtp))
    arch = "qwen35moe" if moe else "qwen35"
    assert file.metadata["general.architecture"] == arch
    facts = {
        "block_count": 5 if mtp else 4,
        "context_length": 77,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "rope.dimension_count": 2,  # 0.34 of 6
        "rope.freq_base": 5e5,
        "full_attention_interval": 4,
        "ssm.state_size": S_DIM,
        "ssm.group_count": K_HEADS,
        "ssm.time_step_rank": V_HEADS,
        "ssm.inner_size": V_HEADS * S_DIM,
        "ssm.conv_kernel": 4,
        "nextn_predict_layers": 1 if mtp else None,
        "expert_count": EXPERTS if moe else None,
        "feed_forward_length": None if moe else 9,
    }
    assert {key: file.get(f"{arch}.{key}") for key in facts} == facts
    assert file.metadata[f"{arch}.rope.dimension_sections"].tolist() == [1, 0, 0, 0]


def test_multimodal_checkpoint_in_shards_keeps_only_the_text_model(tmp_path: Path) -> None:
    tensors = qwen35_tensors(moe=True, mtp=True)
    config = {
        "model_type": "qwen3_5_moe",
        "text_config": QWEN35MOE,
        "vision_config": {"depth": 2},
        "tie_word_embeddings": False,
    }
    folder = write_checkpoint(tmp_path / "hf", config, {})
    (folder / "model.safetensors").unlink()
    renamed = {n.replace("model.", "model.language_model.", 1): x for n, x in tensors.items()}
    renamed["model.visual.blocks.0.attn.qkv.weight"] = np.zeros((2, 2), np.float32)
    names = sorted(renamed)
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, members in shards.items():
        write_safetensors(folder / shard, {name: renamed[name] for name in members})
    weight_map = {name: shard for shard, members in shards.items() for name in members}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))

    convert_hf(folder, tmp_path / "out.gguf")
    file = GGUF.open(tmp_path / "out.gguf")
    assert_same(weights(file), expected_qwen35(tensors, moe=True, mtp=True))


def test_qwen3moe_keeps_every_value(tmp_path: Path) -> None:
    t = qwen3moe_tensors()
    want = expected_ends(t, 0)
    for i in range(2):
        p, hf = f"blk.{i}.", f"model.layers.{i}."
        want[p + "attn_norm.weight"] = t[hf + "input_layernorm.weight"]
        want[p + "ffn_norm.weight"] = t[hf + "post_attention_layernorm.weight"]
        want |= expected_attention(t, hf + "self_attn.", p, 0) | expected_moe(t, hf + "mlp.", p)
    assert_same(weights(converted(tmp_path, QWEN3MOE, t)), want)


@pytest.mark.parametrize(
    ("config", "tensors"),
    [(QWEN3MOE, qwen3moe_tensors()), (QWEN35MOE, qwen35_tensors(moe=True, mtp=True))],
    ids=["qwen3moe", "qwen35moe"],
)
def test_experts_one_by_one_or_fused_give_one_file(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors
) -> None:
    fused = weights(converted(tmp_path, config, tensors))
    assert_same(weights(converted(tmp_path, config, one_by_one(tensors))), fused)


def test_llama_rope_pairs_end_up_side_by_side(tmp_path: Path) -> None:
    """The checkpoint rotates (i, i + half) of each head, GGUF's llama (2i, 2i + 1)."""
    t = llama_tensors()
    got = weights(converted(tmp_path, LLAMA, t))
    half = HEAD_DIM // 2
    for short, name, heads in (("q", "attn_q", HEADS), ("k", "attn_k", KV_HEADS)):
        source = t[f"model.layers.1.self_attn.{short}_proj.weight"]
        for h in range(heads):
            for i in range(half):
                for side in range(2):
                    row = got[f"blk.1.{name}.weight"][h * HEAD_DIM + 2 * i + side]
                    np.testing.assert_array_equal(row, source[h * HEAD_DIM + side * half + i])
    p, hf = "blk.1.", "model.layers.1."
    np.testing.assert_array_equal(got[p + "attn_v.weight"], t[hf + "self_attn.v_proj.weight"])
    np.testing.assert_array_equal(got[p + "attn_norm.weight"], t[hf + "input_layernorm.weight"])


def test_llama3_rope_factors(tmp_path: Path) -> None:
    got = weights(converted(tmp_path, LLAMA, llama_tensors()))["rope_freqs.weight"]
    want = []
    for i in range(HEAD_DIM // 2):
        wave_length = 2 * math.pi * 5e5 ** (2 * i / HEAD_DIM)
        if wave_length < 64 / 4:
            want.append(1.0)
        elif wave_length > 64 / 1:
            want.append(8.0)
        else:
            smooth = (64 / wave_length - 1) / (4 - 1)
            want.append(1 / ((1 - smooth) / 8 + smooth))
    # One rounding to float32.
    np.testing.assert_allclose(got, want, rtol=2**-23)


def test_tied_embeddings_leave_out_the_head(tmp_path: Path) -> None:
    tensors = llama_tensors()
    del tensors["lm_head.weight"]
    file = converted(tmp_path, LLAMA | {"tie_word_embeddings": True}, tensors)
    assert "output.weight" not in file.tensors


@pytest.mark.parametrize(
    ("stored", "outtype", "matrices"),
    [
        ("F32", "auto", "F32"),
        ("F16", "auto", "F16"),
        ("BF16", "auto", "BF16"),
        ("BF16", "f32", "F32"),
        ("BF16", "f16", "F16"),
        ("F32", "bf16", "BF16"),
    ],
)
def test_types(tmp_path: Path, stored: str, outtype: str, matrices: str) -> None:
    tensors = qwen35_tensors(moe=True)
    store: Callable[[Any], Any] = {
        "F32": lambda x: x,
        "F16": lambda x: x.astype(np.float16),
        "BF16": bf16,
    }[stored]
    file = converted(
        tmp_path, QWEN35MOE, {n: store(x) for n, x in tensors.items()}, outtype=outtype
    )
    # The test weights are exact in all three types, 1 + norm included.
    assert_same(weights(file), expected_qwen35(tensors, moe=True, mtp=False))
    always_f32 = ("norm.weight", "ssm_a", ".bias", "conv1d.weight", "_inp.weight", "_shexp.weight")
    for name, info in file.tensors.items():
        keeps = name.endswith(always_f32) and not name.endswith(
            ("gate_shexp.weight", "up_shexp.weight", "down_shexp.weight")
        )
        assert info.type.name == ("F32" if keeps else matrices), name


def test_chunks_do_not_show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = qwen35_tensors(moe=True)
    monkeypatch.setattr(convert, "CHUNK", 1)
    steps: list[tuple[int, int]] = []
    file = converted(
        tmp_path, QWEN35MOE, tensors, progress=lambda _, done, total: steps.append((done, total))
    )
    assert_same(weights(file), expected_qwen35(tensors, moe=True, mtp=False))
    assert steps == sorted(steps) and steps[-1][0] == steps[-1][1]


# --- tokenizer ---------------------------------------------------------------------------------


def test_vocabulary(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", QWEN3MOE, qwen3moe_tensors())
    settings = {"eos_token": CONTROL_TOKEN, "pad_token": {"content": USER_TOKEN}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": "from tokenizer_config"})
    )
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": [3, 4]}))
    convert_hf(folder, tmp_path / "out.gguf")
    m = GGUF.open(tmp_path / "out.gguf").metadata
    tokens, types = m["tokenizer.ggml.tokens"], m["tokenizer.ggml.token_type"].tolist()
    assert len(tokens) == len(types) == VOCAB
    assert tokens[260:264] == [CONTROL_TOKEN, USER_TOKEN, "[PAD262]", "[PAD263]"]
    assert types == [1] * 260 + [3, 4] + [5] * (VOCAB - 262)
    assert m["tokenizer.ggml.merges"] == ["a b", "Ġ a", "ab ab", "1 2"]
    assert m["tokenizer.ggml.model"] == "gpt2"
    ids = [m[f"tokenizer.ggml.{role}_token_id"] for role in ("eos", "padding", "bos")]
    assert ids == [260, 261, 3]
    assert m["tokenizer.ggml.add_bos_token"] is False
    assert m["tokenizer.chat_template"] == "from tokenizer_config"

    (folder / "chat_template.jinja").write_text("from the file of its own")
    convert_hf(folder, tmp_path / "out.gguf")
    template = GGUF.open(tmp_path / "out.gguf").metadata["tokenizer.chat_template"]
    assert template == "from the file of its own"


DIGITS = {"type": "Digits", "individual_digits": True}
SMOLLM = {"type": "Sequence", "pretokenizers": [DIGITS, byte_level()]}
PRE_TOKENIZERS = [
    *((name, split_steps(regex)) for name, regex in SPLIT.items()),
    ("gpt-2", byte_level()),
    ("smollm", SMOLLM),
]


@pytest.mark.parametrize(("name", "pre"), PRE_TOKENIZERS)
@SHARED_TMP
@given(text=st.text(st.characters(codec="utf-8"), max_size=40) | st.text("ab 12'\n<|stop>mrk"))
def test_text_is_cut_as_the_checkpoint_cuts_it(
    tmp_path: Path, name: str, pre: dict[str, Any], text: str
) -> None:
    spec = tokenizer_json(pre)
    out = tmp_path / "out.gguf"
    if not out.exists():
        folder = write_checkpoint(tmp_path / "hf", QWEN3MOE, qwen3moe_tensors())
        (folder / "tokenizer.json").write_text(json.dumps(spec))
        convert_hf(folder, out)
    metadata = GGUF.open(out).metadata
    assert metadata["tokenizer.ggml.pre"] == name
    theirs = tokenizers.Tokenizer.from_str(json.dumps(spec)).encode(text).ids
    assert Tokenizer.from_metadata(metadata, "out.gguf").encode(text) == theirs


def test_unknown_pre_tokenizer_is_named_and_can_be_overridden(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", QWEN3MOE, qwen3moe_tensors())
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(split_steps("[xyz]+"))))
    with pytest.raises(DesksideError, match=r"\[xyz\]\+"):
        convert_hf(folder, tmp_path / "out.gguf")
    convert_hf(folder, tmp_path / "out.gguf", pre="qwen2")
    assert GGUF.open(tmp_path / "out.gguf").metadata["tokenizer.ggml.pre"] == "qwen2"


@pytest.mark.parametrize(
    ("post", "settings", "adds"),
    [
        ([{"SpecialToken": {"id": CONTROL_TOKEN}}, {"Sequence": {"id": "A"}}], {}, True),
        ([{"Sequence": {"id": "A"}}], {}, False),
        (None, {"add_bos_token": True}, True),
    ],
)
def test_add_bos(tmp_path: Path, post: Any, settings: dict[str, Any], adds: bool) -> None:
    folder = write_checkpoint(tmp_path / "hf", QWEN3MOE, qwen3moe_tensors())
    spec = tokenizer_json()
    if post is not None:
        spec["post_processor"] = {"type": "TemplateProcessing", "single": post}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    convert_hf(folder, tmp_path / "out.gguf")
    assert GGUF.open(tmp_path / "out.gguf").metadata["tokenizer.ggml.add_bos_token"] is adds


def test_ids_that_the_run_does_not_need_are_left_out(tmp_path: Path) -> None:
    folder = write_checkpoint(
        tmp_path / "hf",
        QWEN3MOE | {"bos_token_id": -1, "pad_token_id": VOCAB + 5, "eos_token_id": 260},
        qwen3moe_tensors(),
    )
    notes = convert_hf(folder, tmp_path / "out.gguf")
    m = GGUF.open(tmp_path / "out.gguf").metadata
    assert "tokenizer.ggml.bos_token_id" not in m
    assert "tokenizer.ggml.padding_token_id" not in m
    assert m["tokenizer.ggml.eos_token_id"] == 260
    assert any(f"pad_token_id {VOCAB + 5}" in note for note in notes)


@pytest.mark.parametrize(
    ("config", "generation", "named", "eos", "ends"),
    [
        ([260, 7], None, None, 260, {260, 7}),
        ([260, 7, 8, 9], [10, 260], None, 260, {260, 7, 8, 9, 10}),
        (7, 260, None, 7, {7, 260}),
        # config.json often keeps the base model's
        (7, None, CONTROL_TOKEN, 260, {260}),
        ([7, 8], 9, CONTROL_TOKEN, 260, {260, 7, 8, 9}),
        (-1, [-1, VOCAB], CONTROL_TOKEN, 260, {260}),
        (None, None, None, None, set()),
    ],
)
def test_every_listed_id_ends_an_answer(
    tmp_path: Path, config: Any, generation: Any, named: Any, eos: int | None, ends: set[int]
) -> None:
    folder = write_checkpoint(
        tmp_path / "hf", QWEN3MOE | {"eos_token_id": config}, qwen3moe_tensors()
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": generation}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": named}))
    convert_hf(folder, tmp_path / "out.gguf")
    tokenizer = Tokenizer.from_metadata(GGUF.open(tmp_path / "out.gguf").metadata, "out.gguf")
    assert tokenizer.eos_id == eos
    assert tokenizer.stop_ids == ends


TEMPLATES = {
    "chat_template.jinja": "jinja",
    "chat_template.json": json.dumps({"chat_template": "json"}),
    "tokenizer_config.json": json.dumps({"chat_template": "config"}),
}


@pytest.mark.parametrize(
    ("files", "default", "named"),
    [
        (TEMPLATES, "jinja", {}),
        (("chat_template.json", "tokenizer_config.json"), "json", {}),
        (("tokenizer_config.json",), "config", {}),
        (
            {
                "tokenizer_config.json": json.dumps(
                    {
                        "chat_template": [
                            {"name": "default", "template": "d"},
                            {"name": "tool_use", "template": "t"},
                            {"name": 3, "template": None},
                        ]
                    }
                )
            },
            "d",
            {"tool_use": "t"},
        ),
        ({"tokenizer_config.json": json.dumps({"chat_template": {"default": "o"}})}, "o", {}),
        (
            {
                "chat_template.jinja": "jinja",
                "additional_chat_templates/Tool-Use.jinja": "t",
                "additional_chat_templates/rag.jinja": "r",
            },
            "jinja",
            {"tool_use": "t", "rag": "r"},
        ),
    ],
)
def test_chat_templates_in_all_of_hugging_faces_places(
    tmp_path: Path, files: Any, default: str, named: dict[str, str]
) -> None:
    folder = write_checkpoint(tmp_path / "hf", QWEN3MOE, qwen3moe_tensors())
    (folder / "additional_chat_templates").mkdir()
    for name in files:
        (folder / name).write_text(files[name] if isinstance(files, dict) else TEMPLATES[name])
    assert convert_hf(folder, tmp_path / "out.gguf") == []
    m = GGUF.open(tmp_path / "out.gguf").metadata
    prefix = "tokenizer.chat_template"
    assert m[prefix] == default
    assert {k.removeprefix(f"{prefix}."): v for k, v in m.items() if f"{prefix}." in k} == named
    assert set(m.get(f"{prefix}s", [])) == set(named)


@pytest.mark.parametrize(
    ("told", "default", "note"),
    [
        (None, None, "no chat template"),
        ("", None, "no chat template"),
        ([{"name": "rag", "template": "r"}], "r", "took 'rag'"),
    ],
)
def test_without_a_default_template_there_is_a_note(
    tmp_path: Path, told: Any, default: str | None, note: str
) -> None:
    folder = write_checkpoint(tmp_path / "hf", QWEN3MOE, qwen3moe_tensors())
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": told}))
    (told_note,) = convert_hf(folder, tmp_path / "out.gguf")
    assert note in told_note
    assert GGUF.open(tmp_path / "out.gguf").get("tokenizer.chat_template") == default


def test_shards_without_an_index(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA, llama_tensors())
    convert_hf(folder, tmp_path / "whole.gguf")
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    convert_hf(folder, tmp_path / "one.gguf")
    names = sorted(llama_tensors())
    for no, part in enumerate((names[::2], names[1::2]), 1):
        path = folder / f"model-{no:05}-of-00002.safetensors"
        write_safetensors(path, {n: llama_tensors()[n] for n in part})
    (folder / "model-00001-of-00001.safetensors").unlink()
    convert_hf(folder, tmp_path / "two.gguf")
    whole = (tmp_path / "whole.gguf").read_bytes()
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "two.gguf").read_bytes() == whole
    (folder / "model-00001-of-00002.safetensors").unlink()
    refused(folder, tmp_path, "no model.safetensors and no model.safetensors.index.json")
    write_safetensors(folder / "model-00003-of-00003.safetensors", {})
    refused(folder, tmp_path, "is the checkpoint complete")


def test_a_snapshot_of_the_cache_has_its_repositorys_name(tmp_path: Path) -> None:
    commit = "hub/models--acme--tiny-1b/snapshots/0123456789abcdef"
    folder = write_checkpoint(tmp_path / commit, LLAMA, llama_tensors())
    convert_hf(folder, tmp_path / "out.gguf")
    assert GGUF.open(tmp_path / "out.gguf").metadata["general.name"] == "tiny-1b"
    (tmp_path / "my-model").symlink_to(folder)
    convert_hf(tmp_path / "my-model", tmp_path / "out.gguf")
    assert GGUF.open(tmp_path / "out.gguf").metadata["general.name"] == "tiny-1b"


# --- refusals ----------------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def refused(folder: Path, tmp_path: Path, message: str) -> None:
    out = tmp_path / "refused" / "out.gguf"
    out.parent.mkdir(exist_ok=True)
    with pytest.raises(DesksideError, match=message) as caught:
        convert_hf(folder, out)
    assert "\n" not in str(caught.value)
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "gpt9"}, "model_type 'gpt9' is not known"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"hidden_size": None}, "hidden_size is None"),
        ({"num_attention_heads": "4"}, "num_attention_heads is '4'"),
        ({"num_hidden_layers": 3}, "layer_types"),
        ({"layer_types": None, "num_hidden_layers": 5}, r"model\.layers\.4\.\S+ is missing"),
        ({"layer_types": ["full_attention"] * 3 + ["linear_attention"]}, "layer_types"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok is 9"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"linear_num_value_heads": 5}, "no multiple of 2 key heads"),
        ({"linear_value_head_dim": 8}, "linear_value_head_dim"),
        ({"rope_parameters": {"rope_type": "magic"}}, "'magic' is not supported"),
        ({"rope_parameters": [1]}, "rope_parameters must be an object"),
        ({"rope_parameters": {"mrope_section": ["a"]}}, "mrope_section"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor"),
        ({"head_dim": 5}, "head_dim is 5"),
        ({"vocab_size": VOCAB + 1}, r"embed_tokens\S+ has shape \[300, 12\].*\[301, 12\]"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"attn_output_gate": False}, "attn_output_gate"),
    ],
)
def test_bad_config(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", QWEN35MOE | change, qwen35_tensors(moe=True))
    refused(folder, tmp_path, message)


ODD_VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1.5,
    10**12,
    10**40,
    math.inf,
    math.nan,
    "x",
    [],
    [1],
    {},
]


@pytest.mark.filterwarnings("error")
@SHARED_TMP
@given(key=st.sampled_from([*LLAMA, *LLAMA["rope_scaling"]]), value=st.sampled_from(ODD_VALUES))
def test_odd_config_values_never_escape(tmp_path: Path, key: str, value: Any) -> None:
    config = LLAMA | {key: value}
    if key in LLAMA["rope_scaling"]:
        config = LLAMA | {"rope_scaling": LLAMA["rope_scaling"] | {key: value}}
    folder = write_checkpoint(tmp_path / "hf", config, llama_tensors())
    try:
        convert_hf(folder, tmp_path / "out.gguf")
    except DesksideError as error:
        assert str(folder) in str(error)


def test_missing_files(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "model.safetensors", "config.json"):
        folder = write_checkpoint(tmp_path / name, LLAMA, llama_tensors())
        (folder / name).unlink()
        refused(folder, tmp_path, name)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", tmp_path, "config.json: file is missing")


@pytest.mark.parametrize("text", ["", "{", "[]", "\xff", "[" * 100_000, '{"model": 3}', "{}"])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_broken_json(tmp_path: Path, name: str, text: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA, llama_tensors())
    (folder / name).write_bytes(text.encode("latin-1"))
    refused(folder, tmp_path, name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].update(type="Unigram"), "Unigram"),
        (lambda s: s["model"].update(byte_fallback=True), "byte fallback"),
        (lambda s: s["model"].update(merges=[["a b", "c"]]), "contains a space"),
        (lambda s: s["model"].update(merges=["abc"]), "not a tokenizer"),
        (lambda s: s["model"]["vocab"].update(x=VOCAB), "id 300"),
        (lambda s: s["model"]["vocab"].update(xy="9"), "id 9"),
        (lambda s: s["model"]["vocab"].update(xy=5), "id 5 is given to"),
        (lambda s: s["model"]["vocab"].update({"\ud800": 290}), "not a tokenizer"),
        (lambda s: s.update(normalizer={"type": "Lowercase"}), "Lowercase"),
        (lambda s: s.update(pre_tokenizer=None), "unknown pre-tokenizer"),
        (lambda s: s.update(pre_tokenizer=byte_level(add_prefix_space=True)), "add_prefix_space"),
        (lambda s: s.update(added_tokens=[{"id": 1}]), "not a tokenizer"),
    ],
)
def test_unsupported_tokenizer(tmp_path: Path, change: Change, message: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA, llama_tensors())
    spec = tokenizer_json()
    change(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    refused(folder, tmp_path, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.norm.weight"), r"model\.norm\.weight is missing"),
        (lambda t: t.pop("lm_head.weight"), r"lm_head\.weight is missing"),
        (lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}), r"shape \[3\].*\[12\]"),
        (lambda t: t["model.norm.weight"].__setitem__(2, np.nan), "output_norm.weight.*NaN"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(24, np.float32)}),
            r"q_proj\.bias .* has no place",
        ),
    ],
)
def test_bad_tensors(tmp_path: Path, change: Change, message: str) -> None:
    tensors = llama_tensors()
    change(tensors)
    refused(write_checkpoint(tmp_path / "hf", LLAMA, tensors), tmp_path, message)


def test_weights_beyond_f16_are_named(tmp_path: Path) -> None:
    tensors = llama_tensors()
    tensors["lm_head.weight"][7, 3] = 1e6
    with pytest.raises(DesksideError, match=r"output\.weight.*fp16"):
        converted(tmp_path, LLAMA, tensors, outtype="f16")


def test_fp8_is_refused_by_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA, llama_tensors())
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["dtype"] = "F8_E4M3"
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    refused(folder, tmp_path, r"lm_head\.weight is F8_E4M3")


def test_unknown_outtype(tmp_path: Path) -> None:
    with pytest.raises(DesksideError, match="'q4_0' is not known"):
        converted(tmp_path, LLAMA, llama_tensors(), outtype="q4_0")


@pytest.mark.parametrize(
    ("weight_map", "message"),
    [
        ({"a": "../a.safetensors"}, "weight_map"),
        ({"a": 3}, "weight_map"),
        ("a", "weight_map"),
        ({"a": "gone.safetensors"}, "gone.safetensors: No such file"),
        ({"a": "b.safetensors"}, "tensor a is missing; the index lists it"),
    ],
)
def test_bad_index(tmp_path: Path, weight_map: Any, message: str) -> None:
    folder = write_checkpoint(tmp_path / "hf", LLAMA, llama_tensors())
    (folder / "model.safetensors").rename(folder / "b.safetensors")
    index = json.dumps({"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)
    refused(folder, tmp_path, message)


@SHARED_TMP
@given(data=st.data())
def test_damaged_safetensors_never_escape(tmp_path: Path, data: st.DataObject) -> None:
    """Cut anywhere, or with bytes of the header changed: converted or refused in one line."""
    folder = tmp_path / "hf"
    if not folder.exists():
        write_checkpoint(folder, LLAMA, llama_tensors())
        (folder / "model.safetensors").rename(folder / "whole")
    whole = bytearray((folder / "whole").read_bytes())
    if data.draw(st.booleans()):
        damaged = bytes(whole[: data.draw(st.integers(0, len(whole) - 1))])
    else:
        header = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(data.draw(st.integers(1, 3))):
            whole[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
        damaged = bytes(whole)
    (folder / "model.safetensors").write_bytes(damaged)
    try:
        convert_hf(folder, tmp_path / "out.gguf")
    except DesksideError as error:
        assert "model.safetensors" in str(error) or "tensor" in str(error)
        assert "\n" not in str(error)
