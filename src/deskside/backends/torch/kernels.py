"""The kernels that take the place of torch's ops on a device, and what they take.

`torch_ops` asks the table, op by op: where a kernel is there and takes the shapes, it runs;
otherwise the twin in torch does. Both get the same inputs: activations that meet quantised weights
are rounded to 8 bits per block of 32 before (`torch_quants.round_to_8_bits`).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from deskside.gguf import TensorInfo

# matmul(x float32 (m, n_in), w uint8 (n_out, row bytes), its tensor) -> float32 (m, n_out)
Matmul = Callable[[Tensor, Tensor, TensorInfo], Tensor]
# pairs(x (tokens, n_in) or (pairs, n_in), w uint8 (experts * rows, row bytes), its tensor,
# ids (tokens, top_k), up) -> (pairs, rows): of every pair of a token and a chosen expert W_e x, or
# silu(W_e x) (Up_e x). NaN where an id is not one of the experts.
Pairs = Callable[[Tensor, Tensor, TensorInfo, Tensor, Tensor | None], Tensor]
# A launch, to be made as launch(*args).
Launch = Callable[..., None]


@dataclass(frozen=True)
class Kernels:
    """None: there is no such kernel, torch's ops serve.

    takes(w, its tensor): whether `matmul` and `pairs` can read a matrix.
    delta_step, attention: `triton.launch.delta_step` and `decode_attention`, one token of each
    sequence; takes_delta(head_dim); takes_attention(k type, v type, head_dim).
    launches(to): a context in which each launch is handed to `to(launch, args)` instead of made.
    """

    takes: Callable[[Tensor, TensorInfo], bool] = lambda w, info: False
    matmul: Matmul | None = None
    pairs: Pairs | None = None
    takes_delta: Callable[[int], bool] = lambda head_dim: False
    delta_step: Callable[..., Tensor] | None = None
    takes_attention: Callable[[str, str, int], bool] = lambda k, v, head_dim: False
    attention: Callable[..., Tensor] | None = None
    splits: Callable[[int], int] = lambda positions: 1  # parts of attention over so many positions
    launches: Callable[
        [Callable[[Launch, tuple[Any, ...]], None]], AbstractContextManager[None]
    ] = lambda to: nullcontext()


NONE = Kernels()
