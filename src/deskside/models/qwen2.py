"""Qwen2 and Qwen2.5 (`qwen2`), dense: biases on the projections to q, k and v."""

from __future__ import annotations

from deskside.models.common import Model, decoder, dense_ffn, qkv
from deskside.tape import Tape, TapeBuilder, Value


def build(m: Model) -> Tape:
    return decoder(m, attention, dense_ffn)


def attention(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    heads, kv_heads = m.heads()
    head_dim = m.positive("attention.key_length", m.n_embd // heads)
    n_rot = m.n_rot(head_dim, head_dim)
    base = m.real("rope.freq_base", 1e4)

    parts = qkv(heads, kv_heads, head_dim)
    weights, biases = m.rows_of(p, "attn_qkv", parts, m.n_embd), m.biases_of(p, "attn_qkv", parts)
    q, k, v = (t.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    q = t.rope(q, heads=heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    k = t.rope(k, heads=kv_heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    o = t.attention(q, k, v, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return t.linear(o, m.tensor(p + "attn_output.weight", heads * head_dim, m.n_embd))
