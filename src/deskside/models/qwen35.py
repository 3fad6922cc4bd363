"""Qwen3.5, dense (`qwen35`) and mixture of experts (`qwen35moe`).

Three of four layers mix tokens with a gated delta net, every fourth with gated full attention.
docs/MODEL.md has the equations. GGUF stores the norms with their +1 applied, and tiles value heads
over key heads, so this file changes no layout.
"""

from __future__ import annotations

import numpy as np

from deskside.models.common import Model, dense_ffn, moe_ffn, qkv
from deskside.tape import Tape, TapeBuilder, Value

# Added to the squared length of q and k. A constant of the published model code, not the epsilon of
# the norms.
L2_EPS = 1e-6


def build(m: Model) -> Tape:
    t = TapeBuilder()
    token_embd = m.embedding()
    x = t.embed(token_embd)
    for i, is_attention in enumerate(attention_layers(m)):
        with t.layer(i):
            p = f"blk.{i}."
            h = t.rms_norm(x, m.tensor(p + "attn_norm.weight", m.n_embd), m.eps)
            x = t.add(x, attention(t, m, h, p) if is_attention else delta_net(t, m, h, p))
            h = t.rms_norm(x, m.tensor(p + "post_attention_norm.weight", m.n_embd), m.eps)
            x = t.add(x, ffn(t, m, h, p))
    return t.finish(m.head(t, x, token_embd), m.n_ctx_train)


def attention_layers(m: Model) -> list[bool]:
    """Which layers are full attention: as listed, those that have KV heads where these are listed,
    or every `full_attention_interval`-th."""
    recurrent = m.file.get(f"{m.arch}.attention.recurrent_layers")
    if recurrent is not None:
        flags = recurrent.tolist() if isinstance(recurrent, np.ndarray) else None
        if flags is None or not all(flag in (0, 1) for flag in flags):
            raise m.bad("attention.recurrent_layers", "is no list of booleans")
        if len(flags) < m.n_layers:
            raise m.bad("attention.recurrent_layers", f"names {len(flags)} of {m.n_layers} layers")
        return [not flag for flag in flags[: m.n_layers]]
    kv_heads = m.file.get(f"{m.arch}.attention.head_count_kv")
    if isinstance(kv_heads, np.ndarray) and 0 in kv_heads:
        if len(kv_heads) < m.n_layers:
            raise m.bad("attention.head_count_kv", f"names {len(kv_heads)} of {m.n_layers} layers")
        return [n != 0 for n in kv_heads.tolist()[: m.n_layers]]
    interval = m.positive("full_attention_interval", 4)
    return [(i + 1) % interval == 0 for i in range(m.n_layers)]


def attention(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    heads, kv_heads = m.heads()
    head_dim = m.positive("attention.key_length")
    n_rot = m.n_rot(head_dim)
    base = m.real("rope.freq_base", 1e7)

    # attn_q holds per head [q | gate].
    parts = qkv(2 * heads, kv_heads, head_dim)
    w_q, w_k, w_v = m.rows_of(p, "attn_qkv", parts, m.n_embd)
    q, gate = t.split_gate(t.linear(x, w_q), heads, head_dim)
    k, v = t.linear(x, w_k), t.linear(x, w_v)
    q = t.rms_norm(q, m.tensor(p + "attn_q_norm.weight", head_dim), m.eps)
    k = t.rms_norm(k, m.tensor(p + "attn_k_norm.weight", head_dim), m.eps)
    # Text has the same position in all three streams of mrope, so plain rope is equal to it.
    q = t.rope(q, heads=heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    k = t.rope(k, heads=kv_heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    o = t.attention(q, k, v, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    o = t.sigmoid_gate(o, gate)
    return t.linear(o, m.tensor(p + "attn_output.weight", heads * head_dim, m.n_embd))


def delta_net(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    head_dim = m.positive("ssm.state_size")
    k_heads = m.positive("ssm.group_count")
    v_heads = m.positive("ssm.time_step_rank")
    inner = m.positive("ssm.inner_size")
    if inner != v_heads * head_dim:
        raise m.bad("ssm.inner_size", f"is {inner}; {v_heads} heads of {head_dim} were expected")
    if v_heads % k_heads:
        raise m.bad("ssm.group_count", f"is {k_heads}; {v_heads} value heads are no multiple of it")
    channels = 2 * k_heads * head_dim + inner

    qkv = t.linear(x, m.tensor(p + "attn_qkv.weight", m.n_embd, channels))
    z = t.linear(x, m.tensor(p + "attn_gate.weight", m.n_embd, inner))
    b = t.linear(x, m.tensor(p + "ssm_beta.weight", m.n_embd, v_heads))
    a = t.linear(x, m.tensor(p + "ssm_alpha.weight", m.n_embd, v_heads))
    kernel = m.positive("ssm.conv_kernel")
    qkv = t.conv_silu(qkv, m.tensor(p + "ssm_conv1d.weight", kernel, channels))
    o = t.gated_delta(
        qkv,
        a,
        b,
        m.tensor(p + "ssm_a", v_heads),
        m.tensor(p + "ssm_dt.bias", v_heads),
        k_heads=k_heads,
        v_heads=v_heads,
        head_dim=head_dim,
        eps=L2_EPS,
    )
    o = t.gated_norm(o, z, m.tensor(p + "ssm_norm.weight", head_dim), m.eps)
    return t.linear(o, m.tensor(p + "ssm_out.weight", inner, m.n_embd))


def ffn(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    return moe_ffn(t, m, x, p) if m.arch == "qwen35moe" else dense_ffn(t, m, x, p)
