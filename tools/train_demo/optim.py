"""Muon for the hidden matrices, AdamW for everything else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

# Quintic Newton-Schulz coefficients of Jordan et al., "Muon" (2024): fast, not exact, convergence
# of all singular values towards one.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
# Gives an orthogonalised update the root-mean-square size of a typical AdamW update, so that both
# optimisers share one learning rate (Liu et al., "Muon is scalable", arXiv:2502.16982).
UPDATE_RMS = 0.2


def orthogonalise(batch: Tensor) -> Tensor:
    """Replace each (m, n) matrix of a batch by an approximately semi-orthogonal one."""
    a, b, c = NEWTON_SCHULZ
    x = batch.bfloat16()
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).float()


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised per matrix; equal shapes are processed together.

    Stacked experts (E, out, in) count as E matrices.
    """

    def __init__(
        self, params: Iterable[Tensor], lr: float, momentum: float, weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = defaultdict(list)
            for weight in group["params"]:
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                nesterov = weight.grad.lerp(state["momentum"], group["momentum"])
                matrices = nesterov.reshape(-1, *weight.shape[-2:])
                by_shape[matrices.shape[1:]].append((weight, matrices))
            for (rows, columns), members in by_shape.items():
                updates = orthogonalise(torch.cat([matrices for _, matrices in members]))
                scale = UPDATE_RMS * max(rows, columns) ** 0.5 * group["lr"]
                sizes = [len(matrices) for _, matrices in members]
                for (weight, _), update in zip(members, updates.split(sizes), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.sub_(update.reshape(weight.shape), alpha=scale)


def build_optimizers(model: nn.Module, lr: float, decay: float) -> list[torch.optim.Optimizer]:
    """Route hidden matrices to Muon; embeddings, head, router, gates and vectors to AdamW."""
    muon, adam, adam_no_decay = [], [], []
    adam_names = ("embed_tokens", "lm_head", "gate.weight", "in_proj_a", "in_proj_b")
    for name, weight in model.named_parameters():
        if weight.dim() < 2 or "conv1d" in name:
            adam_no_decay.append(weight)
        elif any(part in name for part in adam_names):
            adam.append(weight)
        else:
            muon.append(weight)
    groups = [
        {"params": adam, "weight_decay": decay},
        {"params": adam_no_decay, "weight_decay": 0.0},
    ]
    return [
        Muon(muon, lr, momentum=0.95, weight_decay=decay),
        torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.95), eps=1e-10, fused=True),
    ]
