"""The table of Triton's kernels for torch devices (`torch/kernels.py`)."""

from __future__ import annotations

from torch import Tensor

from deskside.backends.torch.kernels import Kernels
from deskside.backends.triton import launch
from deskside.backends.triton.decode import PAIR
from deskside.gguf import TensorInfo


def triton_kernels() -> Kernels:
    """Triton's kernels. They run on CUDA, or in Triton's interpreter for tests."""

    def takes(w: Tensor, info: TensorInfo) -> bool:
        aligned = w.data_ptr() % 4 == 0 and w.is_contiguous()
        return info.type.name in PAIR and info.row_len % 32 == 0 and aligned

    def matmul(x: Tensor, w: Tensor, info: TensorInfo) -> Tensor:
        y: Tensor = launch.matmul(x.contiguous(), w, info.type.name, info.row_len, len(w))
        return y

    def pairs(x: Tensor, w: Tensor, info: TensorInfo, ids: Tensor, up: Tensor | None) -> Tensor:
        rows = info.shape[1]
        w, up = (m if m is None else m.view(-1, rows, w.shape[-1]) for m in (w, up))
        name = info.type.name
        y: Tensor = launch.experts_matmul(x.contiguous(), w, name, info.row_len, rows, ids, up)
        return y

    def fills_tiles(head_dim: int) -> bool:  # the kernels' tiles are powers of 2
        return 32 <= head_dim <= 256 and head_dim & (head_dim - 1) == 0

    def takes_attention(k_type: str, v_type: str, head_dim: int) -> bool:
        return fills_tiles(head_dim) and {k_type, v_type} <= set(launch.KV_TYPES)

    return Kernels(
        takes=takes,
        matmul=matmul,
        pairs=pairs,
        takes_delta=fills_tiles,
        delta_step=launch.delta_step,
        takes_attention=takes_attention,
        attention=launch.decode_attention,
        splits=launch.attention_splits,
        launches=launch.launches,
    )
