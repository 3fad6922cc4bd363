"""Llama (`llama`), dense: interleaved rope pairs, as GGUF orders the rows of attn_q and attn_k."""

from __future__ import annotations

from deskside.models.common import Model, decoder, dense_ffn, qkv
from deskside.tape import Tape, TapeBuilder, Value


def build(m: Model) -> Tape:
    if m.count("expert_count", 0):
        raise m.bad("expert_count", "asks for experts; deskside runs dense llama files only")
    return decoder(m, attention, dense_ffn)


def attention(t: TapeBuilder, m: Model, x: Value, p: str) -> Value:
    heads, kv_heads = m.heads()
    head_dim = m.positive("attention.key_length", m.n_embd // heads)
    n_rot = m.n_rot(head_dim, head_dim)
    base = m.real("rope.freq_base", 1e4)
    # Llama 3 scales the wave length of each frequency by a factor.
    factors = m.tensor("rope_freqs.weight", n_rot // 2) if m.has("rope_freqs.weight") else None

    def rope(x: Value, n_heads: int) -> Value:
        return t.rope(
            x,
            heads=n_heads,
            head_dim=head_dim,
            n_rot=n_rot,
            base=base,
            neox=False,
            factors=factors,
        )

    w_q, w_k, w_v = m.rows_of(p, "attn_qkv", qkv(heads, kv_heads, head_dim), m.n_embd)
    q, k, v = t.linear(x, w_q), t.linear(x, w_k), t.linear(x, w_v)
    o = t.attention(
        rope(q, heads), rope(k, kv_heads), v, heads=heads, kv_heads=kv_heads, head_dim=head_dim
    )
    return t.linear(o, m.tensor(p + "attn_output.weight", heads * head_dim, m.n_embd))
