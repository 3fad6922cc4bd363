"""Export to, and compare with, transformers' ``Qwen3_5MoeForCausalLM``; projected GGUF size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from model import ModelConfig, Qwen35Moe
from safetensors.torch import load_file, save_file
from torch import Tensor


def hf_config(cfg: ModelConfig, eos: int, pad: int) -> dict[str, Any]:
    """The contents of config.json."""
    kinds = ("linear_attention", "full_attention")
    return {
        "architectures": ["Qwen3_5MoeForCausalLM"],
        "model_type": "qwen3_5_moe_text",
        "vocab_size": cfg.vocab_size,
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "full_attention_interval": cfg.full_attention_interval,
        "layer_types": [kinds[cfg.is_full_attention(i)] for i in range(cfg.num_hidden_layers)],
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_dim": cfg.head_dim,
        "attn_output_gate": True,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "rms_norm_eps": cfg.rms_norm_eps,
        "max_position_embeddings": cfg.max_position_embeddings,
        "partial_rotary_factor": cfg.partial_rotary_factor,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": cfg.rope_theta,
            "partial_rotary_factor": cfg.partial_rotary_factor,
            # Halves of the 16 rotary dimensions for time, height and width; text uses one position
            # for all three, so the split only matters to readers that insist on the field.
            "mrope_interleaved": True,
            "mrope_section": [3, 3, 2],
        },
        "linear_conv_kernel_dim": cfg.linear_conv_kernel_dim,
        "linear_key_head_dim": cfg.linear_key_head_dim,
        "linear_value_head_dim": cfg.linear_value_head_dim,
        "linear_num_key_heads": cfg.linear_num_key_heads,
        "linear_num_value_heads": cfg.linear_num_value_heads,
        "mamba_ssm_dtype": "float32",
        "num_experts": cfg.num_experts,
        "num_experts_per_tok": cfg.num_experts_per_tok,
        "moe_intermediate_size": cfg.moe_intermediate_size,
        "shared_expert_intermediate_size": cfg.shared_expert_intermediate_size,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "float32",
    }


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export(model: Qwen35Moe, tokenizer_dir: Path, out: Path) -> None:
    """Write a complete Hugging Face checkpoint directory (float32 weights)."""
    out.mkdir(parents=True, exist_ok=True)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (out / name).write_bytes((tokenizer_dir / name).read_bytes())
    vocab = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in vocab}
    eos, pad = ids["<|im_end|>"], ids["<|endoftext|>"]
    write_json(out / "config.json", hf_config(model.cfg, eos, pad))
    write_json(out / "generation_config.json", {"eos_token_id": [eos, pad], "pad_token_id": pad})
    state = {
        name: value.detach().float().contiguous() for name, value in model.state_dict().items()
    }
    temporary = out / "model.safetensors.tmp"
    save_file(state, temporary, metadata={"format": "pt"})
    os.replace(temporary, out / "model.safetensors")


def load(checkpoint: Path, cfg: ModelConfig) -> Qwen35Moe:
    """Read an exported checkpoint back into the training model."""
    model = Qwen35Moe(cfg)
    model.load_state_dict(load_file(checkpoint / "model.safetensors"))
    return model.eval()


@torch.no_grad()
def compare_with_transformers(checkpoint: Path, cfg: ModelConfig, tokens: Tensor) -> float:
    """Largest absolute logit difference to transformers; ``cfg`` must ask for float32."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    ours, _ = load(checkpoint, cfg)(tokens)
    return float((ours - reference(tokens).logits).abs().max())


def gguf_bytes(model: Qwen35Moe) -> int:
    """Tensor bytes of the bundled GGUF.

    Routed experts are IQ4_NL (18 bytes per 32 weights), other matrices Q8_0 (34 bytes per 32);
    router, shared-expert gate, convolution, norms and per-head vectors stay float32.
    """
    total = 0
    for name, weight in model.named_parameters():
        keeps_f32 = weight.dim() < 2 or "gate.weight" in name or "conv1d" in name
        if keeps_f32:
            total += 4 * weight.numel()
        else:
            total += weight.numel() // 32 * (18 if ".experts." in name else 34)
    return total
