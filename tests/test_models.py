"""What a file must hold to be run; everything else is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.convert.synth import synth_file
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.models import build_tape
from tests.models import rewrite, tiny


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(DesksideError) as caught:
        build_tape(GGUF.open(path))
    message = str(caught.value)
    assert str(path) in message and "\n" not in message
    for part in parts:
        assert part in message


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    names = ("blk.1.ssm_a", "blk.3.attn_q.weight", "token_embd.weight", "blk.0.ffn_up_exps.weight")
    for name in names:
        refused(rewrite(tiny(), tmp_path / "m.gguf", drop=(name,)), name, "missing")


def test_a_wrong_shape_is_named(tmp_path: Path) -> None:
    new = np.zeros((3, 256), np.float32)
    path = rewrite(tiny(), tmp_path / "m.gguf", replace={"blk.3.attn_k.weight": new})
    refused(path, "blk.3.attn_k.weight", "[256, 3]", "[256, 128]")


def test_a_tensor_without_a_place_is_refused(tmp_path: Path) -> None:
    path = rewrite(tiny(), tmp_path / "m.gguf", rename={"output.weight": "output.scale"})
    refused(path, "output.scale")


@pytest.mark.parametrize(
    ("key", "value", "part"),
    [
        ("general.architecture", "mamba", "'mamba'"),
        ("general.architecture", None, "general.architecture"),
        ("qwen35moe.block_count", None, "missing"),
        ("qwen35moe.block_count", 0, "0 layers"),
        ("qwen35moe.context_length", 0, "at least 1"),
        ("qwen35moe.block_count", "many", "'many'"),
        ("qwen35moe.embedding_length", np.int32(-4), "-4"),
        ("qwen35moe.attention.head_count_kv", 0, "at least 1"),
        ("qwen35moe.attention.head_count", 3, "no multiple of 2"),
        ("qwen35moe.rope.dimension_count", 15, "even"),
        ("qwen35moe.rope.dimension_count", 512, "at most 64"),
        ("qwen35moe.expert_used_count", 99, "99"),
        ("qwen35moe.ssm.group_count", 3, "no multiple"),
        ("qwen35moe.attention.layer_norm_rms_epsilon", float("nan"), "nan"),
        ("qwen35moe.rope.scaling.type", "longrope", "'longrope'"),
        ("qwen35moe.rope.scale_linear", 4.0, "4.0"),
        ("qwen35moe.expert_gating_func", 2, "is 2"),
        ("qwen35moe.norm_top_k_prob", False, "False"),
        ("qwen35moe.ssm.v_head_reordered", False, "False"),
        ("qwen35moe.attention.head_count", np.array([4, 4, 2, 4], np.int32), "differs"),
        ("qwen35moe.attention.head_count", np.array([4, -4, 4, 4], np.int32), "differs"),
        ("qwen35moe.attention.head_count_kv", np.array([0, 2]), "names 2 of 4 layers"),
        ("qwen35moe.attention.head_count_kv", np.array([2.0] * 4, np.float32), "whole number"),
    ],
)
def test_bad_hyper_parameters_are_named(tmp_path: Path, key: str, value: Any, part: str) -> None:
    refused(rewrite(tiny(), tmp_path / "m.gguf", metadata={key: value}), key, part)


def test_mtp_tensors_are_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "mtp.gguf"
    synth_file("tiny-moe", path, layers=4, mtp=True)
    file = GGUF.open(path)
    assert any("nextn" in name for name in file.tensors)
    tape = build_tape(file)
    assert not any(name.startswith("blk.4.") for name in tape.weights())
    assert {op.layer for op in tape.ops} == {-1, 0, 1, 2, 3}


def test_recurrent_layers_may_be_listed(tmp_path: Path) -> None:
    listed = np.array([True, True, True, False])
    key = "qwen35moe.attention.recurrent_layers"
    path = rewrite(tiny(), tmp_path / "m.gguf", metadata={key: listed})
    kinds = {op.layer for op in build_tape(GGUF.open(path)).ops if op.kind == "attention"}
    assert kinds == {3}
    for bad in (listed[:2], True, "all", ["a", "b", "c", "d"], np.full(4, 7)):
        refused(rewrite(tiny(), tmp_path / "m.gguf", metadata={key: bad}), key)
