"""Sparse mixture of experts with a shared expert, dispatched by sorting tokens by expert."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LOAD_BALANCE_WEIGHT = 0.01
ROUTER_Z_WEIGHT = 1e-4


class Dispatch(torch.autograd.Function):
    """Copy each token to its k slots; slots are ordered by expert.

    ``token_of_slot`` (N·k) and ``slots_of_token`` (N, k) are inverse maps, so the gradient is a
    gather too; the generic backward of indexing would be a slow scatter-add on CPU.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, token_of_slot: Tensor, slots_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(slots_of_token)
        return x.index_select(0, token_of_slot)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (slots_of_token,) = ctx.saved_tensors
        (grad,) = grads
        total = grad.index_select(0, slots_of_token[:, 0])
        for rank in range(1, slots_of_token.shape[1]):
            total += grad.index_select(0, slots_of_token[:, rank])
        return total, None, None


class Combine(torch.autograd.Function):
    """Sum each token's k slots: the transpose of :class:`Dispatch`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, token_of_slot: Tensor, slots_of_token: Tensor) -> Tensor:
        ctx.save_for_backward(token_of_slot)
        total = y.index_select(0, slots_of_token[:, 0]).float()
        for rank in range(1, slots_of_token.shape[1]):
            total += y.index_select(0, slots_of_token[:, rank])
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (token_of_slot,) = ctx.saved_tensors
        (grad,) = grads
        return grad.index_select(0, token_of_slot), None, None


def swiglu(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def grouped_linear(x: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
    """Apply ``weights[e]`` (out, in) to the e-th group of ``counts[e]`` rows of x."""
    groups = zip(x.split(counts), weights.to(x.dtype).unbind(), strict=True)
    return torch.cat([F.linear(rows, weight) for rows, weight in groups])


class Experts(nn.Module):
    """All routed experts of a layer, stacked: gate_up_proj (E, 2I, H), down_proj (E, H, I)."""

    def __init__(self, hidden: int, experts: int, width: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, hidden))
        self.down_proj = nn.Parameter(torch.empty(experts, hidden, width))

    def forward(self, x: Tensor, slot_weight: Tensor, counts: list[int]) -> Tensor:
        """x (slots, H) ordered by expert, ``counts`` slots per expert; outputs are weighted."""
        inner = swiglu(grouped_linear(x, self.gate_up_proj, counts))
        inner = inner * slot_weight.to(x.dtype).unsqueeze(-1)
        return grouped_linear(inner, self.down_proj, counts)


class SharedExpert(nn.Module):
    """The dense SwiGLU every token goes through."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, width, bias=False)
        self.up_proj = nn.Linear(hidden, width, bias=False)
        self.down_proj = nn.Linear(width, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        weight = torch.cat([self.gate_proj.weight, self.up_proj.weight]).to(x.dtype)
        return F.linear(swiglu(F.linear(x, weight)), self.down_proj.weight.to(x.dtype))


class SparseMoe(nn.Module):
    """Top-k softmax router (weights renormalised to sum 1) plus a sigmoid-gated shared expert."""

    def __init__(
        self,
        hidden: int,
        experts: int,
        top_k: int,
        width: int,
        shared_width: int,
        compute_dtype: torch.dtype,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.compute_dtype = compute_dtype
        self.gate = nn.Linear(hidden, experts, bias=False)
        self.experts = Experts(hidden, experts, width)
        self.shared_expert = SharedExpert(hidden, shared_width)
        self.shared_expert_gate = nn.Linear(hidden, 1, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x float32 (B, T, H) to the block's output and its weighted auxiliary router loss.

        The load-balancing loss is E·Σ_e f_e p_e with f the share of tokens per expert and p the
        mean router probability (Switch Transformer, arXiv:2101.03961, eq. 4; top-k of them, so a
        perfect balance gives k). The z-loss keeps the router's logits small (arXiv:2202.08906).
        """
        flat = x.flatten(0, 1)
        logits = self.gate(flat)
        probs = logits.softmax(-1)
        top_probs, top_experts = probs.topk(self.top_k, dim=-1)
        weights = top_probs / top_probs.sum(-1, keepdim=True)

        order = top_experts.flatten().argsort(stable=True)  # slot -> flat (token, rank)
        slots_of_token = torch.empty_like(order)
        slots_of_token[order] = torch.arange(order.numel())
        slots_of_token = slots_of_token.view_as(top_experts)
        token_of_slot = order // self.top_k
        counts = top_experts.flatten().bincount(minlength=probs.shape[1])

        low = flat.to(self.compute_dtype)
        slots = Dispatch.apply(low, token_of_slot, slots_of_token)
        slot_weight = Dispatch.apply(
            weights.reshape(-1, 1), order, slots_of_token.view(-1, 1)
        ).squeeze(-1)
        routed = self.experts(slots, slot_weight, counts.tolist())
        routed = Combine.apply(routed, token_of_slot, slots_of_token)
        shared = self.shared_expert_gate(flat).sigmoid() * self.shared_expert(low)

        share = counts.float() / flat.shape[0]
        balance = probs.shape[1] * (share * probs.mean(0)).sum()
        z_loss = logits.logsumexp(-1).square().mean()
        aux_loss = LOAD_BALANCE_WEIGHT * balance + ROUTER_Z_WEIGHT * z_loss
        return (routed + shared).view_as(x), aux_loss
