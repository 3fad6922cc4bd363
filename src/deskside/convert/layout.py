"""How a Hugging Face config and its tensors become GGUF's: one function per architecture.

Values change only as noted here: zero-centred norms get their +1, `ssm_a` is -exp(A_log), value
heads are tiled over key heads, and llama's rope pairs are interleaved.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from deskside.convert.source import Config, Floats, Indices, Output, Outputs

# Adds an architecture's tensors to the outputs; returns its metadata, keys without the prefix.
Layout = Callable[[Config, Outputs], dict[str, Any]]


def tiled_heads(k_heads: int, v_heads: int, head_dim: int) -> Indices:
    """Gather order that tiles value heads: head k * r + v moves to place v * k_heads + k.

    The checkpoint groups the r value heads of a key head; GGUF repeats the key heads instead.
    """
    r = v_heads // k_heads
    return np.arange(v_heads * head_dim).reshape(k_heads, r, head_dim).swapaxes(0, 1).ravel()


def interleaved_rope(heads: int, head_dim: int) -> Indices:
    """Gather order that puts the rope pair (i, i + head_dim / 2) of each head side by side."""
    return np.arange(heads * head_dim).reshape(heads, 2, head_dim // 2).swapaxes(1, 2).ravel()


def plus_one(w: Floats) -> Floats:
    return w + np.float32(1)


def negative_exp(a_log: Floats) -> Floats:
    return -np.exp(a_log)


def _ends(o: Outputs, c: Config, norm: Callable[[Floats], Floats] | None = None) -> int:
    """Embedding, final norm and head; returns the vocabulary size."""
    n_embd, n_vocab = c.whole("hidden_size"), c.whole("vocab_size")
    o.add("token_embd.weight", "model.embed_tokens.weight", n_vocab, n_embd)
    o.add("output_norm.weight", "model.norm.weight", n_embd, apply=norm)
    if c.tied:
        o.drop("lm_head.weight")
    else:
        o.add("output.weight", "lm_head.weight", n_vocab, n_embd)
    return n_vocab


def _head_dim(c: Config) -> int:
    head_dim = c.whole("head_dim", c.whole("hidden_size") // c.whole("num_attention_heads"))
    if head_dim % 2:
        raise c.bad("head_dim", f"is {head_dim}; rope needs an even number")
    return head_dim


def _common(c: Config, head_dim: int) -> dict[str, Any]:
    metadata: dict[str, Any] = {
        "block_count": c.whole("num_hidden_layers"),
        "context_length": c.whole("max_position_embeddings"),
        "embedding_length": c.whole("hidden_size"),
        "attention.head_count": c.whole("num_attention_heads"),
        "attention.head_count_kv": c.whole("num_key_value_heads", c.whole("num_attention_heads")),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "attention.layer_norm_rms_epsilon": c.number("rms_norm_eps", 1e-6),
        "vocab_size": c.whole("vocab_size"),
        "rope.freq_base": c.rope_number("rope_theta", 1e4),
        "rope.dimension_count": head_dim,
    }
    c.must("hidden_act", "silu")
    scaling = c.rope.get("rope_type", c.rope.get("type", "default"))
    if scaling in ("linear", "yarn"):
        metadata["rope.scaling.type"] = scaling
        metadata["rope.scaling.factor"] = c.rope_number("factor")
        if scaling == "yarn":
            original = c.rope_number("original_max_position_embeddings")
            metadata["rope.scaling.original_context_length"] = int(original)
    elif scaling not in ("default", "llama3"):
        raise c.bad("rope_type", f"{scaling!r} is not supported")
    return metadata


def _moe(c: Config) -> dict[str, Any]:
    experts = c.whole("num_experts", c.values.get("num_local_experts"))
    top_k = c.whole("num_experts_per_tok")
    if top_k > experts:
        raise c.bad("num_experts_per_tok", f"is {top_k}, more than num_experts {experts}")
    return {
        "expert_count": experts,
        "expert_used_count": top_k,
        "expert_feed_forward_length": c.whole("moe_intermediate_size"),
    }


def _experts(o: Outputs, c: Config, p: str, hf: str) -> None:
    """Router and routed experts, stored fused (transformers 5) or one by one."""
    n_embd, width = c.whole("hidden_size"), c.whole("moe_intermediate_size")
    n = c.whole("num_experts", c.values.get("num_local_experts"))
    o.add(p + "ffn_gate_inp.weight", hf + "gate.weight", n, n_embd, narrow=False)
    if o.has(hf + "experts.gate_up_proj"):
        gate_up = o.take(hf + "experts.gate_up_proj", n, 2 * width, n_embd)
        gate, up = list(gate_up[:, :width]), list(gate_up[:, width:])
        down = list(o.take(hf + "experts.down_proj", n, n_embd, width))
    else:
        each = [f"{hf}experts.{e}." for e in range(n)]
        gate = [o.take(e + "gate_proj.weight", width, n_embd) for e in each]
        up = [o.take(e + "up_proj.weight", width, n_embd) for e in each]
        down = [o.take(e + "down_proj.weight", n_embd, width) for e in each]
    o.stack(p + "ffn_gate_exps.weight", gate)
    o.stack(p + "ffn_up_exps.weight", up)
    o.stack(p + "ffn_down_exps.weight", down)


def _ffn(o: Outputs, n_embd: int, width: int, p: str, hf: str, suffix: str = "") -> None:
    o.add(f"{p}ffn_gate{suffix}.weight", hf + "gate_proj.weight", width, n_embd)
    o.add(f"{p}ffn_up{suffix}.weight", hf + "up_proj.weight", width, n_embd)
    o.add(f"{p}ffn_down{suffix}.weight", hf + "down_proj.weight", n_embd, width)


def _attention(
    o: Outputs,
    c: Config,
    p: str,
    hf: str,
    head_dim: int,
    *,
    gated: bool = False,
    pairs: bool = False,
    bias: bool = False,
) -> None:
    n_embd, heads = c.whole("hidden_size"), c.whole("num_attention_heads")
    kv_heads = c.whole("num_key_value_heads", heads)
    q_rows = partial(interleaved_rope, heads, head_dim) if pairs else None
    k_rows = partial(interleaved_rope, kv_heads, head_dim) if pairs else None
    q_size = heads * head_dim * (2 if gated else 1)
    o.add(p + "attn_q.weight", hf + "q_proj.weight", q_size, n_embd, rows=q_rows)
    o.add(p + "attn_k.weight", hf + "k_proj.weight", kv_heads * head_dim, n_embd, rows=k_rows)
    o.add(p + "attn_v.weight", hf + "v_proj.weight", kv_heads * head_dim, n_embd)
    o.add(p + "attn_output.weight", hf + "o_proj.weight", n_embd, heads * head_dim)
    if bias:
        o.add(p + "attn_q.bias", hf + "q_proj.bias", q_size)
        o.add(p + "attn_k.bias", hf + "k_proj.bias", kv_heads * head_dim)
        o.add(p + "attn_v.bias", hf + "v_proj.bias", kv_heads * head_dim)


def llama(c: Config, o: Outputs) -> dict[str, Any]:
    n_embd, head_dim = c.whole("hidden_size"), _head_dim(c)
    _ends(o, c)
    for i in range(c.whole("num_hidden_layers")):
        p, hf = f"blk.{i}.", f"model.layers.{i}."
        o.add(p + "attn_norm.weight", hf + "input_layernorm.weight", n_embd)
        _attention(o, c, p, hf + "self_attn.", head_dim, pairs=True)
        o.add(p + "ffn_norm.weight", hf + "post_attention_layernorm.weight", n_embd)
        _ffn(o, n_embd, c.whole("intermediate_size"), p, hf + "mlp.")
    if c.rope.get("rope_type", c.rope.get("type")) == "llama3":
        factors = llama3_factors(c, head_dim)
        o.tensors.append(Output("rope_freqs.weight", factors.shape, [factors[None]], narrow=False))
    return _common(c, head_dim) | {"feed_forward_length": c.whole("intermediate_size")}


def llama3_factors(c: Config, n_rot: int) -> Floats:
    """Divisors of the rope frequencies: 1 for wave lengths shorter than context / high_freq_factor,
    `factor` for those longer than context / low_freq_factor, and linear in 1 / length between."""
    low, high = c.rope_number("low_freq_factor"), c.rope_number("high_freq_factor")
    context = c.rope_number("original_max_position_embeddings")
    if not low < high:
        raise c.bad("high_freq_factor", f"is {high}; it must exceed low_freq_factor {low}")
    pairs = np.arange(0, n_rot, 2, dtype=np.float64) / n_rot
    wave_length = 2 * np.pi * c.rope_number("rope_theta", 1e4) ** pairs
    share = np.clip((context / wave_length - low) / (high - low), 0, 1)
    return (1 / ((1 - share) / c.rope_number("factor") + share)).astype(np.float32)


def qwen2(c: Config, o: Outputs) -> dict[str, Any]:
    n_embd, head_dim = c.whole("hidden_size"), _head_dim(c)
    c.must("use_sliding_window", False)
    _ends(o, c)
    for i in range(c.whole("num_hidden_layers")):
        p, hf = f"blk.{i}.", f"model.layers.{i}."
        o.add(p + "attn_norm.weight", hf + "input_layernorm.weight", n_embd)
        _attention(o, c, p, hf + "self_attn.", head_dim, bias=True)
        o.add(p + "ffn_norm.weight", hf + "post_attention_layernorm.weight", n_embd)
        _ffn(o, n_embd, c.whole("intermediate_size"), p, hf + "mlp.")
    return _common(c, head_dim) | {"feed_forward_length": c.whole("intermediate_size")}


def qwen3(c: Config, o: Outputs) -> dict[str, Any]:
    """Qwen3, dense and MoE."""
    n_embd, head_dim = c.whole("hidden_size"), _head_dim(c)
    is_moe = "_moe" in c.values["model_type"]
    if is_moe:
        c.must("norm_topk_prob", True)
        c.must("mlp_only_layers", [], None)
        c.must("decoder_sparse_step", 1)
    c.must("use_sliding_window", False)
    _ends(o, c)
    for i in range(c.whole("num_hidden_layers")):
        p, hf = f"blk.{i}.", f"model.layers.{i}."
        o.add(p + "attn_norm.weight", hf + "input_layernorm.weight", n_embd)
        _attention(o, c, p, hf + "self_attn.", head_dim)
        o.add(p + "attn_q_norm.weight", hf + "self_attn.q_norm.weight", head_dim)
        o.add(p + "attn_k_norm.weight", hf + "self_attn.k_norm.weight", head_dim)
        o.add(p + "ffn_norm.weight", hf + "post_attention_layernorm.weight", n_embd)
        if is_moe:
            _experts(o, c, p, hf + "mlp.")
        else:
            _ffn(o, n_embd, c.whole("intermediate_size"), p, hf + "mlp.")
    size = _moe(c) if is_moe else {"feed_forward_length": c.whole("intermediate_size")}
    return _common(c, head_dim) | size


def qwen35(c: Config, o: Outputs) -> dict[str, Any]:
    """Dense Qwen3.5; the MoE variant differs in its feed-forward blocks only."""
    n_embd = c.whole("hidden_size")
    head_dim = _head_dim(c)
    n_layers = c.whole("num_hidden_layers")
    c.must("attn_output_gate", True)
    metadata = _common(c, head_dim) | _delta_net_metadata(c)
    share = c.rope_number("partial_rotary_factor", 0.25)
    if share > 1:
        raise c.bad("partial_rotary_factor", f"is {share}; expected at most 1")
    metadata["rope.dimension_count"] = int(head_dim * share)
    sections = c.rope.get("mrope_section", [11, 11, 10])
    if not isinstance(sections, list) or not all(type(n) is int and 0 <= n < 1e6 for n in sections):
        raise c.bad("mrope_section", "must be a list of whole numbers")
    metadata["rope.dimension_sections"] = np.array([*sections, 0, 0, 0, 0][:4], np.int32)
    interval = _full_attention_interval(c, n_layers)
    metadata["full_attention_interval"] = interval
    is_moe = "_moe" in c.values["model_type"]
    if is_moe:
        shared = c.whole("shared_expert_intermediate_size")
        metadata |= _moe(c) | {"expert_shared_feed_forward_length": shared}
    else:
        metadata["feed_forward_length"] = c.whole("intermediate_size")

    def layer(i: int, hf: str, full_attention: bool) -> None:
        p = f"blk.{i}."
        o.add(p + "attn_norm.weight", hf + "input_layernorm.weight", n_embd, apply=plus_one)
        if full_attention:
            attn = hf + "self_attn."
            _attention(o, c, p, attn, head_dim, gated=True)
            o.add(p + "attn_q_norm.weight", attn + "q_norm.weight", head_dim, apply=plus_one)
            o.add(p + "attn_k_norm.weight", attn + "k_norm.weight", head_dim, apply=plus_one)
        else:
            _delta_net(o, c, p, hf + "linear_attn.")
        o.add(
            p + "post_attention_norm.weight",
            hf + "post_attention_layernorm.weight",
            n_embd,
            apply=plus_one,
        )
        if not is_moe:
            _ffn(o, n_embd, c.whole("intermediate_size"), p, hf + "mlp.")
            return
        _experts(o, c, p, hf + "mlp.")
        _ffn(o, n_embd, shared, p, hf + "mlp.shared_expert.", "_shexp")
        gate = o.take(hf + "mlp.shared_expert_gate.weight", 1, n_embd)
        name = p + "ffn_gate_inp_shexp.weight"
        o.tensors.append(Output(name, (n_embd,), [gate], narrow=False))

    _ends(o, c, plus_one)
    for i in range(n_layers):
        layer(i, f"model.layers.{i}.", (i + 1) % interval == 0)
    if o.has("mtp.fc.weight"):
        # The multi-token-prediction layer follows the main ones: a full-attention layer with a
        # projection of [embedding | hidden] in front.
        n_mtp = c.whole("mtp_num_hidden_layers") if c.values.get("mtp_num_hidden_layers") else 1
        for i in range(n_mtp):
            layer(n_layers + i, f"mtp.layers.{i}.", True)
        p = f"blk.{n_layers}.nextn."
        o.add(p + "eh_proj.weight", "mtp.fc.weight", n_embd, 2 * n_embd)
        o.add(p + "enorm.weight", "mtp.pre_fc_norm_embedding.weight", n_embd, apply=plus_one)
        o.add(p + "hnorm.weight", "mtp.pre_fc_norm_hidden.weight", n_embd, apply=plus_one)
        o.add(p + "shared_head_norm.weight", "mtp.norm.weight", n_embd, apply=plus_one)
        metadata |= {"block_count": n_layers + n_mtp, "nextn_predict_layers": n_mtp}
    return metadata


def _delta_net_metadata(c: Config) -> dict[str, Any]:
    k_heads, v_heads = c.whole("linear_num_key_heads"), c.whole("linear_num_value_heads")
    k_dim, v_dim = c.whole("linear_key_head_dim"), c.whole("linear_value_head_dim")
    if v_heads % k_heads:
        raise c.bad("linear_num_value_heads", f"is {v_heads}, no multiple of {k_heads} key heads")
    if k_dim != v_dim:
        raise c.bad("linear_value_head_dim", f"is {v_dim}; GGUF has one size for it and {k_dim}")
    return {
        "ssm.conv_kernel": c.whole("linear_conv_kernel_dim"),
        "ssm.state_size": k_dim,
        "ssm.group_count": k_heads,
        "ssm.time_step_rank": v_heads,
        "ssm.inner_size": v_heads * v_dim,
    }


def _delta_net(o: Outputs, c: Config, p: str, hf: str) -> None:
    n_embd, kernel = c.whole("hidden_size"), c.whole("linear_conv_kernel_dim")
    k_heads, v_heads = c.whole("linear_num_key_heads"), c.whole("linear_num_value_heads")
    dim = c.whole("linear_key_head_dim")
    qk, inner = 2 * k_heads * dim, v_heads * dim
    heads = partial(tiled_heads, k_heads, v_heads, 1)
    values = partial(tiled_heads, k_heads, v_heads, dim)

    def channels() -> Indices:
        return np.concatenate([np.arange(qk), qk + values()])  # [q | k | v], v tiled

    o.add(p + "attn_qkv.weight", hf + "in_proj_qkv.weight", qk + inner, n_embd, rows=channels)
    o.add(p + "attn_gate.weight", hf + "in_proj_z.weight", inner, n_embd, rows=values)
    conv = o.take(hf + "conv1d.weight", qk + inner, 1, kernel)[:, 0]
    name = p + "ssm_conv1d.weight"
    o.tensors.append(Output(name, (kernel, qk + inner), [conv], narrow=False, rows=channels))
    o.add(p + "ssm_dt.bias", hf + "dt_bias", v_heads, cols=heads)
    o.add(p + "ssm_a", hf + "A_log", v_heads, cols=heads, apply=negative_exp)
    o.add(p + "ssm_beta.weight", hf + "in_proj_b.weight", v_heads, n_embd, rows=heads)
    o.add(p + "ssm_alpha.weight", hf + "in_proj_a.weight", v_heads, n_embd, rows=heads)
    o.add(p + "ssm_norm.weight", hf + "norm.weight", dim)
    o.add(p + "ssm_out.weight", hf + "out_proj.weight", n_embd, inner, cols=values)


def _full_attention_interval(c: Config, n_layers: int) -> int:
    """The n for which exactly every n-th layer is full attention, as GGUF states it."""
    kinds = c.values.get("layer_types")
    if kinds is None:
        return c.whole("full_attention_interval", 4)
    if not isinstance(kinds, list):
        raise c.bad("layer_types", "must be a list")
    full = [i for i, kind in enumerate(kinds) if kind == "full_attention"]
    interval = c.whole("full_attention_interval", full[0] + 1 if full else max(4, n_layers + 1))
    if len(kinds) != n_layers or full != list(range(interval - 1, n_layers, interval)):
        raise c.bad("layer_types", f"is not full attention in exactly every {interval}. layer")
    return interval


# model_type of config.json, or of its text_config -> GGUF architecture and layout
ARCHITECTURES: dict[str, tuple[str, Layout]] = {
    "qwen3_5_moe": ("qwen35moe", qwen35),
    "qwen3_5_moe_text": ("qwen35moe", qwen35),
    "qwen3_5": ("qwen35", qwen35),
    "qwen3_5_text": ("qwen35", qwen35),
    "qwen3_moe": ("qwen3moe", qwen3),
    "qwen3": ("qwen3", qwen3),
    "qwen2": ("qwen2", qwen2),
    "llama": ("llama", llama),
}
