"""The kernels that take the place of torch's ops on a device, and what they take.

`torch_ops` asks the table, op by op: where a kernel is there and takes the shapes, it runs;
otherwise the twin in torch does. Both get the same inputs: activations that meet quantised weights
are rounded to 8 bits per block of 32 before (`torch_quants.round_to_8_bits`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextvars import ContextVar
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
# Set while a section is recorded on an emulated device: given each launch and its arguments, to
# note and carry out.
LAUNCHES: ContextVar[Callable[[Callable[..., None], tuple[Any, ...]], None] | None] = ContextVar(
    "LAUNCHES", default=None
)


@dataclass(frozen=True)
class Kernels:
    """None: there is no such kernel, torch's ops serve.

    takes(w, its tensor): whether `matmul` and `pairs` can read a matrix.
    delta_step, attention: `triton_kernels.delta_step` and `decode_attention`, one token of each
    sequence; takes_delta(head_dim); takes_attention(k type, v type, head_dim).
    """

    takes: Callable[[Tensor, TensorInfo], bool] = lambda w, info: False
    matmul: Matmul | None = None
    pairs: Pairs | None = None
    takes_delta: Callable[[int], bool] = lambda head_dim: False
    delta_step: Callable[..., Tensor] | None = None
    takes_attention: Callable[[str, str, int], bool] = lambda k, v, head_dim: False
    attention: Callable[..., Tensor] | None = None
    splits: Callable[[int], int] = lambda positions: 1  # parts of attention over so many positions


NONE = Kernels()


def triton_kernels() -> Kernels:
    """Those of `triton_kernels`, which run on CUDA, or in Triton's interpreter; none without
    Triton."""
    try:
        tk: Any = importlib.import_module("deskside.backends.triton_kernels")
        readable = importlib.import_module("deskside.backends.triton_decode").PAIR
    except ImportError:
        return NONE

    def takes(w: Tensor, info: TensorInfo) -> bool:
        aligned = w.data_ptr() % 4 == 0 and w.is_contiguous()
        return info.type.name in readable and info.row_len % 32 == 0 and aligned

    def matmul(x: Tensor, w: Tensor, info: TensorInfo) -> Tensor:
        y: Tensor = tk.matmul(x.contiguous(), w, info.type.name, info.row_len, len(w))
        return y

    def pairs(x: Tensor, w: Tensor, info: TensorInfo, ids: Tensor, up: Tensor | None) -> Tensor:
        rows = info.shape[1]
        w, up = (m if m is None else m.view(-1, rows, w.shape[1]) for m in (w, up))
        name = info.type.name
        y: Tensor = tk.experts_matmul(x.contiguous(), w, name, info.row_len, rows, ids, up)
        return y

    def fills_tiles(head_dim: int) -> bool:
        return 32 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0

    def takes_attention(k_type: str, v_type: str, head_dim: int) -> bool:
        return fills_tiles(head_dim) and {k_type, v_type} <= set(tk.KV_TYPES)

    return Kernels(
        takes=takes,
        matmul=matmul,
        pairs=pairs,
        takes_delta=fills_tiles,
        delta_step=tk.delta_step,
        takes_attention=takes_attention,
        attention=tk.decode_attention,
        splits=tk.attention_splits,
    )
