"""What the model files share: checked access to a file's tensors and the feed-forward blocks."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np

from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.models.writers import spellings
from deskside.tape import Tape, TapeBuilder, Value


class Model:
    """A GGUF file as a model file reads it: hyper-parameters and tensors, all checked."""

    def __init__(self, file: GGUF, arch: str) -> None:
        self.file = file
        self.arch = arch
        self.used: set[str] = set()
        blocks = self.count("block_count")
        self.n_layers = blocks - self.count("nextn_predict_layers", self._mtp_blocks(blocks))
        self.n_embd = self.positive("embedding_length")
        self.eps = self.real("attention.layer_norm_rms_epsilon")
        self.n_ctx_train = self.positive("context_length")
        if self.n_layers < 1:
            raise self.bad("block_count", f"leaves {self.n_layers} layers to run")

    def _mtp_blocks(self, blocks: int) -> int:
        """Blocks for multi-token prediction behind the layers, where the metadata does not say."""
        found = (re.match(r"blk\.(\d+)\.nextn\.", name) for name in self.file.tensors)
        return max(0, blocks - min((int(block[1]) for block in found if block), default=blocks))

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number >= 0 from the metadata. key: without the architecture's prefix.

        It may be listed layer by layer, with zeros for layers that have none of it.
        """
        value = self.file.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.bad(key, "is missing")
        if isinstance(value, np.ndarray) and value.size:
            found = sorted({v for v in value.tolist() if v != 0}) or [0]
            if len(found) > 1:
                listed = ", ".join(map(str, found[:3]))
                raise self.bad(key, f"differs between layers ({listed}); deskside runs one value")
            value = found[0]
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.bad(key, f"is {value!r:.40}; expected a whole number")
        return value

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.count(key, default)
        if value == 0:
            raise self.bad(key, "is 0; expected at least 1")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.file.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.bad(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.bad(key, f"is {value!r}; expected a number above 0")
        return float(value)

    def heads(self) -> tuple[int, int]:
        """Query heads and KV heads of full attention."""
        heads = self.positive("attention.head_count")
        kv_heads = self.positive("attention.head_count_kv", heads)
        if heads % kv_heads:
            raise self.bad("attention.head_count", f"is {heads}, no multiple of {kv_heads}")
        return heads, kv_heads

    def n_rot(self, head_dim: int, default: int | None = None) -> int:
        """Dimensions of a head that rope rotates: an even number."""
        n_rot = self.positive("rope.dimension_count", default)
        if n_rot % 2 or n_rot > head_dim:
            raise self.bad("rope.dimension_count", f"is {n_rot}; expected even, at most {head_dim}")
        return n_rot

    def bad(self, key: str, what: str) -> DesksideError:
        return DesksideError(f"{self.file.path}: metadata key {self.arch}.{key} {what}")

    def has(self, name: str) -> bool:
        return self._spelling(name) is not None

    def _spelling(self, name: str) -> str | None:
        """The file's own name of a tensor, which another writer may spell differently."""
        known = (self.file.tensors, self.file.unusable)
        return next((n for n in spellings(name) if any(n in names for names in known)), None)

    def tensor(self, name: str, *shape: int) -> TensorInfo:
        """The tensor `name`, whose ggml shape (fastest dimension first) must be `shape`, dimensions
        of 1 aside."""
        spelled = self._spelling(name)
        if spelled is None:
            raise DesksideError(
                f"{self.file.path}: tensor {name} is missing; is the file complete?"
            )
        info = self.file.tensor(spelled)
        self.used.add(spelled)
        if info.shape == shape:
            return info
        if _without_ones(info.shape) != _without_ones(shape) or info.shape[0] != shape[0]:
            raise DesksideError(
                f"{self.file.path}: tensor {spelled} has shape {list(info.shape)}; "
                f"the metadata says {list(shape)}"
            )
        return replace(info, shape=shape)

    def rows_of(
        self, prefix: str, fused: str, parts: Mapping[str, int], n_in: int, *more: int
    ) -> list[TensorInfo]:
        """Matrices {prefix}{part}.weight of ggml shape (n_in, rows, *more), by name and rows.

        A file may join them to {prefix}{fused}.weight, rows in this order; then they are views of
        its rows.
        """
        joined = f"{prefix}{fused}.weight"
        names = [f"{prefix}{part}.weight" for part in parts]
        if self.has(names[0]) or not self.has(joined):
            return [
                self.tensor(name, n_in, rows, *more)
                for name, rows in zip(names, parts.values(), strict=True)
            ]
        whole, at, found = self.tensor(joined, n_in, sum(parts.values()), *more), 0, []
        for name, rows in zip(names, parts.values(), strict=True):
            found.append(whole.rows(name, at, rows))
            at += rows
        return found

    def biases_of(self, prefix: str, fused: str, parts: Mapping[str, int]) -> list[TensorInfo]:
        """As `rows_of`, for the biases {prefix}{part}.bias: vectors by name and length."""
        joined = f"{prefix}{fused}.bias"
        names = {f"{prefix}{part}.bias": n for part, n in parts.items()}
        if self.has(next(iter(names))) or not self.has(joined):
            return [self.tensor(name, n) for name, n in names.items()]
        whole, at, found = self.tensor(joined, sum(parts.values())), 0, []
        for name, n in names.items():
            offset = whole.offset + at * whole.type.row_bytes(1)
            found.append(replace(whole, name=name, shape=(n,), offset=offset, source=joined))
            at += n
        return found

    def head(self, t: TapeBuilder, x: Value, token_embd: TensorInfo) -> Value:
        """Output norm and LM head; without an `output.weight` the embedding serves as head."""
        x = t.take_rows(x)
        x = t.rms_norm(x, self.tensor("output_norm.weight", self.n_embd), self.eps)
        if self.has("output.weight"):
            return t.linear(x, self.tensor("output.weight", *token_embd.shape))
        return t.linear(x, token_embd)

    def embedding(self) -> TensorInfo:
        """`token_embd.weight`; its second dimension is the (padded) vocabulary."""
        info = self.file.tensors.get("token_embd.weight")
        n_vocab = info.shape[1] if info is not None and len(info.shape) == 2 else 0
        return self.tensor("token_embd.weight", self.n_embd, n_vocab)


def _without_ones(shape: tuple[int, ...]) -> list[int]:
    return [n for n in shape if n != 1]


# Part of a layer: (builder, model, its input, the prefix of its tensors' names) -> its output.
Block = Callable[[TapeBuilder, Model, Value, str], Value]


def decoder(m: Model, attention: Block, ffn: Block) -> Tape:
    """Layers of attention and feed-forward, each behind a norm and added to what it reads."""
    t = TapeBuilder()
    token_embd = m.embedding()
    x = t.embed(token_embd)
    for i in range(m.n_layers):
        with t.layer(i):
            p = f"blk.{i}."
            h = t.rms_norm(x, m.tensor(p + "attn_norm.weight", m.n_embd), m.eps)
            x = t.add(x, attention(t, m, h, p))
            h = t.rms_norm(x, m.tensor(p + "ffn_norm.weight", m.n_embd), m.eps)
            x = t.add(x, ffn(t, m, h, p))
    return t.finish(m.head(t, x, token_embd), m.n_ctx_train)


def qkv(heads: int, kv_heads: int, head_dim: int) -> dict[str, int]:
    """The projections of attention with their rows, in the order in which files join them."""
    return {
        "attn_q": heads * head_dim,
        "attn_k": kv_heads * head_dim,
        "attn_v": kv_heads * head_dim,
    }


def dense_ffn(t: TapeBuilder, m: Model, x: Value, prefix: str) -> Value:
    """SwiGLU of the width that the metadata says."""
    return _swiglu(t, m, x, prefix, "", m.positive("feed_forward_length"))


def _swiglu(t: TapeBuilder, m: Model, x: Value, prefix: str, suffix: str, width: int) -> Value:
    """W_down(silu(W_gate x) * (W_up x))."""
    parts = {f"ffn_gate{suffix}": width, f"ffn_up{suffix}": width}
    gate, up = m.rows_of(prefix, f"ffn_gate_up{suffix}", parts, m.n_embd)
    down = m.tensor(f"{prefix}ffn_down{suffix}.weight", width, m.n_embd)
    y = t.swiglu(t.linear(x, gate), t.linear(x, up))
    return t.linear(y, down)


def moe_ffn(t: TapeBuilder, m: Model, x: Value, prefix: str) -> Value:
    """Routed experts and, if the file has one, the gated shared expert (docs/MODEL.md)."""
    n_expert = m.positive("expert_count")
    top_k = m.positive("expert_used_count")
    width = m.positive("expert_feed_forward_length")
    if top_k > n_expert:
        raise m.bad("expert_used_count", f"is {top_k}, more than expert_count {n_expert}")

    router = m.tensor(f"{prefix}ffn_gate_inp.weight", m.n_embd, n_expert)
    ids, weights = t.route(t.linear(x, router), top_k)
    parts = {"ffn_gate_exps": width, "ffn_up_exps": width}
    gate_exps, up_exps = m.rows_of(prefix, "ffn_gate_up_exps", parts, m.n_embd, n_expert)
    down_exps = m.tensor(f"{prefix}ffn_down_exps.weight", width, m.n_embd, n_expert)
    y = t.experts(x, ids, weights, gate_exps, up_exps, down_exps)
    if not m.has(f"{prefix}ffn_gate_inp_shexp.weight"):
        return y
    shared_width = m.positive("expert_shared_feed_forward_length")
    shared = _swiglu(t, m, x, prefix, "_shexp", shared_width)
    gate = t.linear(x, m.tensor(f"{prefix}ffn_gate_inp_shexp.weight", m.n_embd))
    return t.add(y, t.sigmoid_gate(shared, gate))
