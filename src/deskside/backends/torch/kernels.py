"""The table of kernels that replace torch's ops on a device.

`ops.py` asks the table, op by op. If there is a kernel and it takes the inputs, it runs. If not,
torch's ops run. Both get the same inputs: activations for quantised weights are already rounded to
8 bits per block of 32 (`quants.round_to_8_bits`).
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
# ids (tokens, top_k), up) -> (pairs, rows): for every pair of a token and a selected expert e,
# W_e x without `up`, else silu(W_e x) * (Up_e x). NaN if an id is not one of the experts.
Pairs = Callable[[Tensor, Tensor, TensorInfo, Tensor, Tensor | None], Tensor]
# A launch. Call it as launch(*args).
Launch = Callable[..., None]


@dataclass(frozen=True)
class Kernels:
    """The kernels of a device. None: there is no such kernel, so torch's ops run.

    takes            takes(w, its tensor): whether `matmul` and `pairs` can read the matrix
    takes_delta      takes_delta(head_dim): whether `delta_step` can run
    delta_step       as `triton.launch.delta_step`: one token of each sequence
    takes_attention  takes_attention(k type, v type, head_dim): whether `attention` can run
    attention        as `triton.launch.decode_attention`: one token of each sequence
    splits           splits(positions): into how many parts `attention` splits the positions
    launches         launches(to): in this context, `to(launch, args)` replaces each launch
    """

    takes: Callable[[Tensor, TensorInfo], bool] = lambda w, info: False
    matmul: Matmul | None = None
    pairs: Pairs | None = None
    takes_delta: Callable[[int], bool] = lambda head_dim: False
    delta_step: Callable[..., Tensor] | None = None
    takes_attention: Callable[[str, str, int], bool] = lambda k, v, head_dim: False
    attention: Callable[..., Tensor] | None = None
    splits: Callable[[int], int] = lambda positions: 1
    launches: Callable[
        [Callable[[Launch, tuple[Any, ...]], None]], AbstractContextManager[None]
    ] = lambda to: nullcontext()


NONE = Kernels()
