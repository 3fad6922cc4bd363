"""Qwen2 and Qwen2.5 (`qwen2`), dense: biases on the projections to q, k and v."""

from __future__ import annotations

from deskside.models.common import Model, dense_ffn
from deskside.tape import Tape, TapeBuilder, Value


def build(m: Model) -> Tape:
    t = TapeBuilder()
    token_embd = m.embedding()
    width = m.positive("feed_forward_length")
    x = t.embed(token_embd)
    for i in range(m.n_layers):
        with t.layer(i):
            p = f"blk.{i}."
            h = t.rms_norm(x, m.tensor(p + "attn_norm.weight", m.n_embd), m.eps)
            x = t.add(x, attention(t, m, h, p))
            h = t.rms_norm(x, m.tensor(p + "ffn_norm.weight", m.n_embd), m.eps)
            x = t.add(x, dense_ffn(t, m, h, p, "", width))
    return t.finish(m.head(t, x, token_embd), m.n_ctx_train)


def attention(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    heads, kv_heads = m.heads()
    head_dim = m.positive("attention.key_length", m.n_embd // heads)
    n_rot = m.n_rot(head_dim, head_dim)
    base = m.real("rope.freq_base", 1e4)

    parts = {
        "attn_q": heads * head_dim,
        "attn_k": kv_heads * head_dim,
        "attn_v": kv_heads * head_dim,
    }
    weights, biases = m.rows_of(p, "attn_qkv", parts, m.n_embd), m.biases_of(p, "attn_qkv", parts)
    q, k, v = (t.linear(x, w, b) for w, b in zip(weights, biases, strict=True))
    q = t.rope(q, heads=heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    k = t.rope(k, heads=kv_heads, head_dim=head_dim, n_rot=n_rot, base=base, neox=True)
    o = t.attention(q, k, v, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    return t.linear(o, m.tensor(p + "attn_output.weight", heads * head_dim, m.n_embd))
