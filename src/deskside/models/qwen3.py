"""Qwen3, dense (`qwen3`) and mixture of experts (`qwen3moe`): per-head q and k norms."""

from __future__ import annotations

from deskside.models.common import Model, decoder, dense_ffn, moe_ffn, qkv
from deskside.tape import Tape, TapeBuilder, Value


def build(m: Model) -> Tape:
    return decoder(m, attention, dense_ffn if m.arch == "qwen3" else moe_ffn)


def attention(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    heads, kv_heads = m.heads()
    head_dim = m.positive("attention.key_length", m.n_embd // heads)
    n_rot = m.n_rot(head_dim, head_dim)
    base = m.real("rope.freq_base", 1e6)

    w_q, w_k, w_v = m.rows_of(p, "attn_qkv", qkv(heads, kv_heads, head_dim), m.n_embd)
    q, k, v = t.linear(x, w_q), t.linear(x, w_k), t.linear(x, w_v)
    q = t.rms_norm(q, m.tensor(p + "attn_q_norm.weight", head_dim), m.eps)
    k = t.rms_norm(k, m.tensor(p + "attn_k_norm.weight", head_dim), m.eps)
    q = t.rope(q, heads=heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    k = t.rope(k, heads=kv_heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    o = t.attention(q, k, v, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return t.linear(o, m.tensor(p + "attn_output.weight", heads * head_dim, m.n_embd))
