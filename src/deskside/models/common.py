"""What the model files share: checked access to a file's tensors and the feed-forward blocks."""

from __future__ import annotations

from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.tape import TapeBuilder, Value


class Model:
    """A GGUF file as a model file reads it: hyper-parameters and tensors, all checked."""

    def __init__(self, file: GGUF, arch: str) -> None:
        self.file = file
        self.arch = arch
        self.used: set[str] = set()
        self.n_layers = self.count("block_count") - self.count("nextn_predict_layers", 0)
        self.n_embd = self.positive("embedding_length")
        self.eps = self.real("attention.layer_norm_rms_epsilon")
        self.n_ctx_train = self.positive("context_length")
        if self.n_layers < 1:
            raise self.bad("block_count", f"leaves {self.n_layers} layers to run")

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number >= 0 from the metadata. key: without the architecture's prefix."""
        value = self.file.get(f"{self.arch}.{key}", default)
        if value is None:
            raise self.bad(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise self.bad(key, f"is {value!r}; expected a whole number")
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
        return name in self.file.tensors

    def tensor(self, name: str, *shape: int) -> TensorInfo:
        """The tensor `name`, whose ggml shape (fastest dimension first) must be `shape`."""
        info = self.file.tensors.get(name)
        if info is None:
            raise DesksideError(f"{self.file.path}: tensor {name} is missing; {self._reason(name)}")
        if info.shape != shape:
            raise DesksideError(
                f"{self.file.path}: tensor {name} has shape {list(info.shape)}; "
                f"the metadata says {list(shape)}"
            )
        self.used.add(name)
        return info

    def _reason(self, name: str) -> str:
        for part, fused in (("ffn_gate_exps", "ffn_gate_up_exps"), ("attn_q", "attn_qkv")):
            if f".{part}." in name and self.has(name.replace(part, fused)):
                return f"the file has a fused {fused}, which is not supported yet"
        return "is the file complete?"

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


def dense_ffn(t: TapeBuilder, m: Model, x: Value, prefix: str, suffix: str, width: int) -> Value:
    """SwiGLU: W_down(silu(W_gate x) * (W_up x))."""
    gate = t.linear(x, m.tensor(f"{prefix}ffn_gate{suffix}.weight", m.n_embd, width))
    up = t.linear(x, m.tensor(f"{prefix}ffn_up{suffix}.weight", m.n_embd, width))
    down = m.tensor(f"{prefix}ffn_down{suffix}.weight", width, m.n_embd)
    return t.linear(t.swiglu(gate, up), down)


def moe_ffn(t: TapeBuilder, m: Model, x: Value, prefix: str) -> Value:
    """Routed experts and, if the file has one, the gated shared expert (docs/MODEL.md)."""
    n_expert = m.positive("expert_count")
    top_k = m.positive("expert_used_count")
    width = m.positive("expert_feed_forward_length")
    if top_k > n_expert:
        raise m.bad("expert_used_count", f"is {top_k}, more than expert_count {n_expert}")

    router = m.tensor(f"{prefix}ffn_gate_inp.weight", m.n_embd, n_expert)
    ids, weights = t.route(t.linear(x, router), top_k)
    y = t.experts(
        x,
        ids,
        weights,
        m.tensor(f"{prefix}ffn_gate_exps.weight", m.n_embd, width, n_expert),
        m.tensor(f"{prefix}ffn_up_exps.weight", m.n_embd, width, n_expert),
        m.tensor(f"{prefix}ffn_down_exps.weight", width, m.n_embd, n_expert),
    )
    if not m.has(f"{prefix}ffn_gate_inp_shexp.weight"):
        return y
    shared_width = m.positive("expert_shared_feed_forward_length")
    shared = dense_ffn(t, m, x, prefix, "_shexp", shared_width)
    gate = t.linear(x, m.tensor(f"{prefix}ffn_gate_inp_shexp.weight", m.n_embd))
    return t.add(y, t.sigmoid_gate(shared, gate))
