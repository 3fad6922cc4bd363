"""The gated delta rule in chunked (matrix-product) form.

Per value head, with state S (Dk by Dv), decay e^g and write strength β, the recurrence is

    S ← e^g S;   δ = β (v - Sᵀ k);   S ← S + k δᵀ;   o = Sᵀ q.

Inside a chunk let c_i be the running sum of g. Solving the recurrence for all δ of the chunk at
once gives the unit lower-triangular system (I + A) δ = β (v - e^c S₀ᵀ k) with
A_ij = β_i (k_i·k_j) e^(c_i - c_j) for j < i, so only one state update per chunk is sequential.
(Yang et al., "Gated Delta Networks", arXiv:2412.06464, section 3.)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def l2_normalise(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def split_chunks(x: Tensor, chunk: int) -> Tensor:
    """(B, N·C, heads, D) to (B, heads, N, C, D)."""
    return x.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2, 4)


def chunked_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    log_decay: Tensor,
    beta: Tensor,
    chunk: int,
    product_dtype: torch.dtype,
) -> Tensor:
    """Run the rule from a zero state.

    q, k (B, T, K, Dk) before normalisation; v (B, T, V, Dv); log_decay ≤ 0 and beta (B, T, V).
    Value head j reads key head j // (V/K). T may be any length. Products run in ``product_dtype``;
    the triangular solve and the state are float32. Returns float32 (B, T, V, Dv).
    """
    length, group = q.shape[1], v.shape[2] // q.shape[2]
    padding = -length % chunk
    if padding:  # zero keys and values leave the state as it is
        q, k, v = (F.pad(x, (0, 0, 0, 0, 0, padding)) for x in (q, k, v))
        log_decay, beta = (F.pad(x, (0, 0, 0, padding)) for x in (log_decay, beta))

    q = split_chunks(l2_normalise(q.float()) * q.shape[-1] ** -0.5, chunk)  # (B, K, N, C, Dk)
    k = split_chunks(l2_normalise(k.float()), chunk)
    v = split_chunks(v.float(), chunk)  # (B, V, N, C, Dv)
    total = log_decay.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2).cumsum(-1)  # (B, V, N, C)
    beta = beta.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2).unsqueeze(-1)

    def product(x: Tensor, y: Tensor) -> Tensor:
        return (x.to(product_dtype) @ y.to(product_dtype)).float()

    # The upper triangle is masked before exp, where the difference is positive and may be large.
    lower = torch.ones(chunk, chunk, dtype=torch.bool).tril()
    difference = total.unsqueeze(-1) - total.unsqueeze(-2)
    decay = difference.masked_fill(~lower, -torch.inf).exp()  # (B, V, N, C, C)
    key_key = product(k, k.transpose(-1, -2)).repeat_interleave(group, 1)
    query_key = product(q, k.transpose(-1, -2)).repeat_interleave(group, 1)
    q, k = q.repeat_interleave(group, 1), k.repeat_interleave(group, 1)

    from_start = total.exp().unsqueeze(-1)
    to_end = (total[..., -1:] - total).exp().unsqueeze(-1)
    system = (beta * key_key * decay).tril(-1)
    targets = torch.cat([v, from_start * k], dim=-1) * beta
    solved = torch.linalg.solve_triangular(system, targets, upper=False, unitriangular=True)
    value_part, key_part = solved.split([v.shape[-1], k.shape[-1]], dim=-1)

    q_start = (q * from_start).to(product_dtype)
    k_end = (k * to_end).transpose(-1, -2).to(product_dtype)
    key_part = key_part.to(product_dtype)
    chunk_decay = from_start[..., -1:, :]
    state = v.new_zeros(*v.shape[:2], k.shape[-1], v.shape[-1])
    deltas, carried = [], []
    for n in range(v.shape[2]):
        start = state.to(product_dtype)
        delta = value_part[:, :, n] - product(key_part[:, :, n], start)
        carried.append(product(q_start[:, :, n], start))
        deltas.append(delta)
        state = state * chunk_decay[:, :, n] + product(k_end[:, :, n], delta)
    out = product(query_key * decay, torch.stack(deltas, 2)) + torch.stack(carried, 2)
    return out.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :length]
