"""Routed experts that a device computes for the host: the ops, and the suppliers of their matrices.

`lowering/sections.py` makes these ops. They compute exactly what the `experts` op computes: the
same products for the same tokens, added in the same order. So if torch runs the host's part too,
the result has the same bits, whichever device computes an expert.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from deskside.backends.torch.ops import TorchStep, by_expert, gathered, multiply, rounded
from deskside.lowering.scratch import FEW_PAIRS
from deskside.tape import Op

Matrices = tuple[Tensor, Tensor, Tensor]  # gate, up, down of one expert: uint8 (rows, row_bytes)


class Divides(Protocol):
    """Decides which of the selected experts a device computes."""

    def divide(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Split ids, float32 (tokens, top_k), into the device's and the host's part.

        Each part has the shape of ids, with -1 for pairs of the other part.
        """
        ...


class Supplies(Protocol):
    """Supplies experts' matrices on the device that computes them, during a step."""

    def each(self, op: Op, experts: list[int], pairs: int) -> Callable[[int], Matrices]:
        """A function that returns the matrices of an expert. Call it in the order of `experts`.

        An expert's matrices are valid until the next call, the last until `done`. pairs: the number
        of pairs of token and expert.
        """
        ...

    def done(self) -> None:
        """End the layer: its matrices are no longer used."""
        ...


@runtime_checkable
class Gathers(Supplies, Protocol):
    """Supplies all experts' matrices as one stack, indexed on the device.

    So the host need not wait for the ids, which a step of few tokens could not afford. A class that
    does this must have this one as its base: `_few` asks for that.
    """

    def stacks(self, op: Op) -> Matrices:
        """gate, up, down of all experts that are here: uint8 (n, rows, row_bytes) each."""
        ...

    def places(self, layer: int, ids: Tensor) -> Tensor:
        """The index into `stacks` of every id: int64 of its shape. For -1, any valid index."""
        ...


class Offloads(Divides, Supplies, Protocol):
    """Decides and supplies: all that the ops of offloaded experts need."""


class HostExperts(Gathers):
    """Supplies the host's own weights, for `expert_pairs`."""

    def __init__(self, step: TorchStep) -> None:
        self.step = step

    def stacks(self, op: Op) -> Matrices:
        gate, up, down = (
            self.step.weights[w.name].reshape(w.shape[2], w.shape[1], -1) for w in op.weights
        )
        return gate, up, down

    def places(self, layer: int, ids: Tensor) -> Tensor:
        return ids.long().clamp(min=0)

    def each(self, op: Op, experts: list[int], pairs: int) -> Callable[[int], Matrices]:
        gate, up, down = self.stacks(op)
        return lambda e: (gate[e], up[e], down[e])

    def done(self) -> None:
        pass


def expert_divide(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """Split the ids (tokens, top_k) into the device's and the host's; -1 stands for the other's."""
    return list(step.offload.divide(op.layer, inputs[0]))


def expert_offload(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """The device's part of a layer, summed over a token's experts: (tokens, rows)."""
    x, ids, p = inputs
    if _few(step.offload, ids):
        return [(p[:, :, None] * _gathered_terms(op, x, ids, step.offload)).sum(1)]
    out = x.new_zeros(len(x), op.weights[2].shape[1])
    for token, slot, y in _terms(op, x, ids, step, step.offload):
        out[token] += p[token, slot][:, None] * y
    return [out]


def expert_offload_pairs(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """The device's part of a layer, by pair: (tokens, top_k * rows), 0 for the host's pairs."""
    x, ids = inputs
    return [_pairs(op, x, ids, step, step.offload)]


def expert_pairs(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """The host's part of a layer, by pair: (tokens, top_k * rows), 0 for the device's pairs."""
    x, ids = inputs
    return [_pairs(op, x, ids, step, HostExperts(step))]


def expert_merge(op: Op, inputs: list[Tensor], step: TorchStep) -> list[Tensor]:
    """Sum both parts over a token's experts: (tokens, rows). One of a pair's two terms is 0.

    The order of the sum is that of `ops._sum_experts`.
    """
    there, here, ids, p = inputs
    n, top_k = ids.shape
    y = (there + here).reshape(n, top_k, -1)
    if n * top_k <= FEW_PAIRS:
        return [(p[:, :, None] * y).sum(1)]
    order = ids.argsort(dim=1)  # unique: a token has an expert at most once
    out = y.new_zeros(n, y.shape[2])
    token = torch.arange(n, device=y.device)
    for j in range(top_k):
        slot = order[:, j]
        out += p[token, slot][:, None] * y[token, slot]
    return [out]


def _few(supplier: Supplies, ids: Tensor) -> TypeGuard[Gathers]:
    return ids.numel() <= FEW_PAIRS and isinstance(supplier, Gathers)


def _pairs(op: Op, x: Tensor, ids: Tensor, step: TorchStep, supplier: Supplies) -> Tensor:
    """W_down h of every pair, 0 for the id -1: (tokens, top_k * rows)."""
    if _few(supplier, ids):
        return _gathered_terms(op, x, ids, supplier).reshape(len(x), -1)
    out = x.new_zeros(*ids.shape, op.weights[2].shape[1])
    for token, slot, y in _terms(op, x, ids, step, supplier):
        out[token, slot] = y
    return out.reshape(len(x), -1)


def _gathered_terms(op: Op, x: Tensor, ids: Tensor, supplier: Gathers) -> Tensor:
    """W_down h of every pair, 0 for the id -1: (tokens, top_k, rows).

    Pairs with the id -1 use some matrix, and their result is dropped. So shapes do not depend on
    the ids, and the host need not wait for them.
    """
    n, top_k = ids.shape
    down = op.weights[2]
    stacks = supplier.stacks(op)
    places = supplier.places(op.layer, ids).reshape(-1)

    def per_pair(stack: Tensor, i: int) -> Tensor:
        rows = rounded(x, op.weights[i].type).repeat_interleave(top_k, dim=0)
        return gathered(rows, places, stack, op.weights[i]).reshape(n, -1)

    h = torch.nn.functional.silu(per_pair(stacks[0], 0)) * per_pair(stacks[1], 1)
    h = rounded(h.reshape(n * top_k, down.row_len), down.type)
    y = gathered(h, places, stacks[2], down).reshape(n, top_k, -1)
    return y.masked_fill((ids < 0)[:, :, None], 0.0)


def _terms(
    op: Op, x: Tensor, ids: Tensor, step: TorchStep, supplier: Supplies
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(tokens, their slots in top_k, W_down h (n, rows)), expert by expert, by ascending id."""
    gate, up, down = op.weights
    parts = by_expert(ids)
    matrices = supplier.each(op, [e for e, _, _ in parts], ids.numel())
    for_gate = rounded(x, gate.type)
    for_up = for_gate if up.type is gate.type else rounded(x, up.type)
    for e, token, slot in parts:
        w = matrices(e)
        h = torch.nn.functional.silu(multiply(for_gate[token], w[0], gate, step.kernels))
        h = h * multiply(for_up[token], w[1], up, step.kernels)
        yield token, slot, multiply(rounded(h, down.type), w[2], down, step.kernels)
    supplier.done()


EXPERT_OPS: dict[str, Callable[[Op, list[Tensor], TorchStep], list[Tensor]]] = {
    f.__name__: f
    for f in (expert_divide, expert_offload, expert_offload_pairs, expert_pairs, expert_merge)
}
