"""Qwen3.5-MoE in plain PyTorch, written for fast CPU training.

Module and parameter names are those of transformers' ``Qwen3_5MoeForCausalLM``, so a state dict of
this model *is* a Hugging Face checkpoint. Shapes in comments: B rows, T tokens, H hidden, D head
dim, C chunk, N chunks, K/V number of key/value heads.

Precision: parameters, residual stream, norms, router, delta-rule state and loss are float32; dense
products run in ``compute_dtype`` (bfloat16 while training, float32 to compare with transformers).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from delta_rule import chunked_gated_delta_rule
from moe import SparseMoe
from torch import Tensor, nn


@dataclass(frozen=True)
class ModelConfig:
    """Field names and meaning as in transformers' ``Qwen3_5MoeTextConfig``."""

    vocab_size: int = 4096
    hidden_size: int = 256
    num_hidden_layers: int = 4
    full_attention_interval: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64
    partial_rotary_factor: float = 0.25
    rope_theta: float = 1e6
    linear_num_key_heads: int = 4
    linear_num_value_heads: int = 8
    linear_key_head_dim: int = 64
    linear_value_head_dim: int = 64
    linear_conv_kernel_dim: int = 4
    num_experts: int = 32
    num_experts_per_tok: int = 4
    moe_intermediate_size: int = 128
    shared_expert_intermediate_size: int = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 8192
    chunk_size: int = 64
    compute_dtype: torch.dtype = torch.bfloat16

    def is_full_attention(self, layer: int) -> bool:
        return (layer + 1) % self.full_attention_interval == 0


def project(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """Apply several (out, in) matrices to the same input with a single product in x's dtype."""
    sizes = [w.shape[0] for w in weights]
    stacked = weights[0] if len(weights) == 1 else torch.cat(weights)
    return F.linear(x, stacked.to(x.dtype)).split(sizes, dim=-1)


class ZeroCentredRMSNorm(nn.Module):
    """RMSNorm that stores its scale as an offset from one."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1.0 + self.weight, self.eps)


class GatedRMSNorm(nn.Module):
    """RMSNorm of the delta-rule output, multiplied with silu of the output gate."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps) * F.silu(gate.float())


class GatedDeltaNet(nn.Module):
    """Linear attention with the gated delta rule and a short causal convolution on q, k and v."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.key_dim = cfg.linear_num_key_heads * cfg.linear_key_head_dim
        self.value_dim = cfg.linear_num_value_heads * cfg.linear_value_head_dim
        channels = 2 * self.key_dim + self.value_dim
        heads = cfg.linear_num_value_heads
        self.in_proj_qkv = nn.Linear(cfg.hidden_size, channels, bias=False)
        self.in_proj_z = nn.Linear(cfg.hidden_size, self.value_dim, bias=False)
        self.in_proj_b = nn.Linear(cfg.hidden_size, heads, bias=False)
        self.in_proj_a = nn.Linear(cfg.hidden_size, heads, bias=False)
        self.conv1d = nn.Conv1d(
            channels, channels, cfg.linear_conv_kernel_dim, groups=channels, bias=False
        )
        # Decay rates exp(A_log)·softplus(dt_bias) start log-uniform between about 1e-3 and 1.6 per
        # token, so the heads cover memories from one to a thousand tokens.
        self.A_log = nn.Parameter(torch.empty(heads).uniform_(1.0, 16.0).log())
        step = torch.empty(heads).uniform_(math.log(1e-3), math.log(0.1)).exp()
        self.dt_bias = nn.Parameter(step.expm1().log())
        self.norm = GatedRMSNorm(cfg.linear_value_head_dim, cfg.rms_norm_eps)
        self.out_proj = nn.Linear(self.value_dim, cfg.hidden_size, bias=False)

    def causal_conv(self, x: Tensor) -> Tensor:
        """silu(depthwise causal convolution) over (B, T, channels), in channels-last layout."""
        taps = self.conv1d.weight[:, 0].to(x.dtype)  # (channels, kernel), last tap = current token
        width = taps.shape[1]
        length = x.shape[1]
        padded = F.pad(x, (0, 0, width - 1, 0))
        total = padded[:, width - 1 :] * taps[:, width - 1]
        for tap in range(width - 1):
            total = torch.addcmul(total, padded[:, tap : tap + length], taps[:, tap])
        return F.silu(total)

    def forward(self, x: Tensor) -> Tensor:
        cfg = self.cfg
        qkv, z, b, a = project(
            x.to(cfg.compute_dtype),
            self.in_proj_qkv.weight,
            self.in_proj_z.weight,
            self.in_proj_b.weight,
            self.in_proj_a.weight,
        )
        q, k, v = self.causal_conv(qkv).split([self.key_dim, self.key_dim, self.value_dim], dim=-1)
        shape = (*x.shape[:2], -1)
        out = chunked_gated_delta_rule(
            q.reshape(*shape, cfg.linear_key_head_dim),
            k.reshape(*shape, cfg.linear_key_head_dim),
            v.reshape(*shape, cfg.linear_value_head_dim),
            log_decay=-self.A_log.exp() * F.softplus(a.float() + self.dt_bias),
            beta=b.float().sigmoid(),
            chunk=cfg.chunk_size,
            product_dtype=cfg.compute_dtype,
        )
        out = self.norm(out, z.reshape(*shape, cfg.linear_value_head_dim)).flatten(2)
        return project(out.to(cfg.compute_dtype), self.out_proj.weight)[0]


class GatedAttention(nn.Module):
    """Grouped-query attention with q/k norms, partial rotary embedding and an output gate."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        heads, kv_heads, dim = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, heads * dim * 2, bias=False)
        self.k_proj = nn.Linear(cfg.hidden_size, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(cfg.hidden_size, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, cfg.hidden_size, bias=False)
        self.q_norm = ZeroCentredRMSNorm(dim, cfg.rms_norm_eps)
        self.k_norm = ZeroCentredRMSNorm(dim, cfg.rms_norm_eps)

    def rotate(self, x: Tensor) -> Tensor:
        """NeoX-style rotary embedding on the leading share of each head; x is (B, T, heads, D)."""
        dim = int(self.cfg.head_dim * self.cfg.partial_rotary_factor)
        rates = self.cfg.rope_theta ** (-torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(x.shape[1]).float(), rates)[:, None]  # (T, 1, dim/2)
        first, second, rest = x.split([dim // 2, dim // 2, self.cfg.head_dim - dim], dim=-1)
        cos, sin = angle.cos(), angle.sin()
        return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        dtype, dim = self.cfg.compute_dtype, self.cfg.head_dim
        shape = (*x.shape[:2], -1)
        q_gate, k, v = project(
            x.to(dtype), self.q_proj.weight, self.k_proj.weight, self.v_proj.weight
        )
        q, gate = q_gate.reshape(*shape, 2 * dim).chunk(2, dim=-1)
        q = self.rotate(self.q_norm(q)).to(dtype).transpose(1, 2)
        k = self.rotate(self.k_norm(k.reshape(*shape, dim))).to(dtype).transpose(1, 2)
        v = v.reshape(*shape, dim).transpose(1, 2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2) * gate.sigmoid()
        return project(out.flatten(2), self.o_proj.weight)[0]


class DecoderLayer(nn.Module):
    """Pre-norm token mixer (delta net or attention) followed by the pre-norm MoE block."""

    def __init__(self, cfg: ModelConfig, index: int) -> None:
        super().__init__()
        self.input_layernorm = ZeroCentredRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        if cfg.is_full_attention(index):
            self.self_attn = GatedAttention(cfg)
        else:
            self.linear_attn = GatedDeltaNet(cfg)
        self.full_attention = cfg.is_full_attention(index)
        self.post_attention_layernorm = ZeroCentredRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = SparseMoe(
            cfg.hidden_size,
            cfg.num_experts,
            cfg.num_experts_per_tok,
            cfg.moe_intermediate_size,
            cfg.shared_expert_intermediate_size,
            cfg.compute_dtype,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        mixer = self.self_attn if self.full_attention else self.linear_attn
        x = x + mixer(self.input_layernorm(x))
        y, aux_loss = self.mlp(self.post_attention_layernorm(x))
        return x + y, aux_loss


class Backbone(nn.Module):
    """Embedding, layers and final norm: everything below the output head."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = ZeroCentredRMSNorm(cfg.hidden_size, cfg.rms_norm_eps)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embed_tokens(tokens)
        aux_total = x.new_zeros(())
        for layer in self.layers:
            x, aux_loss = layer(x)
            aux_total = aux_total + aux_loss
        return self.norm(x), aux_total / len(self.layers)


class Qwen35Moe(nn.Module):
    """Causal language model: token ids (B, T) to logits (B, T, vocab)."""

    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = Backbone(cfg)
        self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)
        self.initialise()

    @torch.no_grad()
    def initialise(self) -> None:
        """Scale matrices by 1/sqrt(fan-in); those writing to the residual stream are damped."""
        damping = 1.0 / math.sqrt(2 * self.cfg.num_hidden_layers)
        for name, weight in self.named_parameters():
            if weight.dim() < 2:
                continue
            if name.endswith("conv1d.weight"):
                nn.init.uniform_(weight, -0.5, 0.5)
            elif "embed_tokens" in name or "lm_head" in name:
                nn.init.normal_(weight, std=0.02)
            else:
                writes_residual = name.split(".")[-2] in ("o_proj", "out_proj", "experts")
                writes_residual &= not name.endswith("gate_up_proj")
                writes_residual |= "down_proj" in name
                std = 0.6 / math.sqrt(weight.shape[-1])
                nn.init.normal_(weight, std=std * damping if writes_residual else std)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits in ``compute_dtype`` and the mean auxiliary router loss."""
        hidden, aux_loss = self.model(tokens)
        return project(hidden.to(self.cfg.compute_dtype), self.lm_head.weight)[0], aux_loss
