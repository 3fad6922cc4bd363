"""Hand-made Hugging Face checkpoints for the converter's tests: no torch, no safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Tensors = dict[str, NDArray[Any]]

D, HEADS, KV_HEADS, HEAD_DIM = 12, 4, 2, 6
K_HEADS, V_HEADS, S_DIM, KERNEL = 2, 6, 4, 4
EXPERTS, WIDTH, SHARED, DENSE = 3, 5, 7, 9
VOCAB = 300
CONTROL_TOKEN, USER_TOKEN = "<|stop|>", "<mark>"

BASE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "max_position_embeddings": 77,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
QWEN35: dict[str, Any] = {
    **BASE,
    "num_hidden_layers": 4,
    "linear_num_key_heads": K_HEADS,
    "linear_num_value_heads": V_HEADS,
    "linear_key_head_dim": S_DIM,
    "linear_value_head_dim": S_DIM,
    "linear_conv_kernel_dim": KERNEL,
    "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 5e5,
        "partial_rotary_factor": 0.34,
        "mrope_section": [1, 0, 0],
    },
}
EXPERT_SIZES = {
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": WIDTH,
}
QWEN35MOE = {
    **QWEN35,
    **EXPERT_SIZES,
    "model_type": "qwen3_5_moe_text",
    "shared_expert_intermediate_size": SHARED,
}
QWEN35DENSE = {**QWEN35, "model_type": "qwen3_5_text", "intermediate_size": DENSE}
QWEN3MOE = {
    **BASE,
    **EXPERT_SIZES,
    "model_type": "qwen3_moe",
    "num_hidden_layers": 2,
    "rope_theta": 1e6,
    "norm_topk_prob": True,
}
LLAMA = {
    **BASE,
    "model_type": "llama",
    "num_hidden_layers": 2,
    "intermediate_size": DENSE,
    "rope_theta": 5e5,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def bf16(x: NDArray[np.float32]) -> NDArray[np.uint16]:
    """The upper halves: test weights are chosen so that nothing is lost."""
    return (x.view(np.uint32) >> 16).astype(np.uint16)


def write_safetensors(path: Path, tensors: Tensors) -> None:
    """u16 arrays are written as BF16."""
    names = {"float32": "F32", "float16": "F16", "uint16": "BF16"}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, x in tensors.items():
        offsets = [offset, offset + x.nbytes]
        table[name] = {"dtype": names[x.dtype.name], "shape": x.shape, "data_offsets": offsets}
        offset += x.nbytes
    header = json.dumps(table).encode()
    data = b"".join(np.ascontiguousarray(x).tobytes() for x in tensors.values())
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: Tensors) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json()))
    write_safetensors(folder / "model.safetensors", tensors)
    return folder


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the bytes 0 .. 255."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(spare)) for b in range(256)]


SPLIT = {
    "qwen35": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}


def split_steps(regex: str) -> dict[str, Any]:
    """tokenizer.json's pre_tokenizer that cuts by one regex."""
    split = {
        "type": "Split",
        "pattern": {"Regex": regex},
        "behavior": "Isolated",
        "invert": False,
    }
    return {"type": "Sequence", "pretokenizers": [split, byte_level(use_regex=False)]}


def byte_level(**options: Any) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, **options}


def tokenizer_json(pre: dict[str, Any] | None = None) -> dict[str, Any]:
    """256 bytes and four merges, then a control and a user-defined token."""
    merges = [["a", "b"], ["Ġ", "a"], ["ab", "ab"], ["1", "2"]]
    pieces = byte_alphabet() + [left + right for left, right in merges]
    added = [
        {"id": len(pieces), "content": CONTROL_TOKEN, "special": True},
        {"id": len(pieces) + 1, "content": USER_TOKEN, "special": False},
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {
        "version": "1.0",
        "added_tokens": [token | flags for token in added],
        "normalizer": None,
        "pre_tokenizer": pre or split_steps(SPLIT["qwen35"]),
        "post_processor": None,
        "decoder": byte_level(),
        "model": {
            "type": "BPE",
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
    }


class _Random:
    """Weights that bfloat16 and float16 hold exactly: small multiples of 1/16."""

    def __init__(self) -> None:
        self._rng = np.random.default_rng(5)

    def __call__(self, *shape: int) -> NDArray[np.float32]:
        return (self._rng.integers(-64, 65, shape) / 16).astype(np.float32)


def _ends(r: _Random) -> Tensors:
    return {
        "model.embed_tokens.weight": r(VOCAB, D),
        "model.norm.weight": r(D),
        "lm_head.weight": r(VOCAB, D),
    }


def _self_attention(r: _Random, p: str, q_rows: int, *, norms: bool) -> Tensors:
    tensors = {
        p + "q_proj.weight": r(q_rows, D),
        p + "k_proj.weight": r(KV_HEADS * HEAD_DIM, D),
        p + "v_proj.weight": r(KV_HEADS * HEAD_DIM, D),
        p + "o_proj.weight": r(D, HEADS * HEAD_DIM),
    }
    if norms:
        tensors |= {p + "q_norm.weight": r(HEAD_DIM), p + "k_norm.weight": r(HEAD_DIM)}
    return tensors


def _mlp(r: _Random, p: str, width: int) -> Tensors:
    return {
        p + "gate_proj.weight": r(width, D),
        p + "up_proj.weight": r(width, D),
        p + "down_proj.weight": r(D, width),
    }


def _moe(r: _Random, p: str) -> Tensors:
    return {
        p + "gate.weight": r(EXPERTS, D),
        p + "experts.gate_up_proj": r(EXPERTS, 2 * WIDTH, D),
        p + "experts.down_proj": r(EXPERTS, D, WIDTH),
    }


def _norms(r: _Random, p: str) -> Tensors:
    return {
        p + "input_layernorm.weight": r(D),
        p + "post_attention_layernorm.weight": r(D),
    }


def qwen35_tensors(*, moe: bool, mtp: bool = False) -> Tensors:
    r = _Random()
    tensors = _ends(r)
    inner, channels = V_HEADS * S_DIM, (2 * K_HEADS + V_HEADS) * S_DIM
    prefixes = [f"model.layers.{i}." for i in range(4)] + (["mtp.layers.0."] if mtp else [])
    for i, p in enumerate(prefixes):
        tensors |= _norms(r, p)
        if i >= 3:
            q_rows = 2 * HEADS * HEAD_DIM
            tensors |= _self_attention(r, p + "self_attn.", q_rows, norms=True)
        else:
            a = p + "linear_attn."
            tensors |= {
                a + "in_proj_qkv.weight": r(channels, D),
                a + "in_proj_z.weight": r(inner, D),
                a + "in_proj_a.weight": r(V_HEADS, D),
                a + "in_proj_b.weight": r(V_HEADS, D),
                a + "conv1d.weight": r(channels, 1, KERNEL),
                a + "A_log": r(V_HEADS),
                a + "dt_bias": r(V_HEADS),
                a + "norm.weight": r(S_DIM),
                a + "out_proj.weight": r(D, inner),
            }
        if moe:
            tensors |= _moe(r, p + "mlp.") | _mlp(r, p + "mlp.shared_expert.", SHARED)
            tensors[p + "mlp.shared_expert_gate.weight"] = r(1, D)
        else:
            tensors |= _mlp(r, p + "mlp.", DENSE)
    if mtp:
        tensors["mtp.fc.weight"] = r(D, 2 * D)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            tensors[f"mtp.{name}.weight"] = r(D)
    return tensors


def qwen3moe_tensors() -> Tensors:
    r = _Random()
    tensors = _ends(r)
    for p in ("model.layers.0.", "model.layers.1."):
        tensors |= _norms(r, p) | _moe(r, p + "mlp.")
        tensors |= _self_attention(r, p + "self_attn.", HEADS * HEAD_DIM, norms=True)
    return tensors


def llama_tensors() -> Tensors:
    r = _Random()
    tensors = _ends(r)
    for p in ("model.layers.0.", "model.layers.1."):
        tensors |= _norms(r, p) | _mlp(r, p + "mlp.", DENSE)
        tensors |= _self_attention(r, p + "self_attn.", HEADS * HEAD_DIM, norms=False)
    return tensors


def one_by_one(tensors: Tensors) -> Tensors:
    """The same checkpoint with each expert's matrices as tensors of their own."""
    out: Tensors = {}
    for name, x in tensors.items():
        stem, _, last = name.rpartition(".")
        if last == "gate_up_proj":
            for e in range(EXPERTS):
                out[f"{stem}.{e}.gate_proj.weight"] = x[e, :WIDTH]
                out[f"{stem}.{e}.up_proj.weight"] = x[e, WIDTH:]
        elif last == "down_proj":
            out |= {f"{stem}.{e}.down_proj.weight": x[e] for e in range(EXPERTS)}
        else:
            out[name] = x
    return out
