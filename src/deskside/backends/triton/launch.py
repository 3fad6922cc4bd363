"""The GPU's quantised ops: checks, launch shapes, launches. The kernels are in `triton_matmul` and
`triton_sequence`, the decoders in `triton_decode`. Needs the extra `gpu` (torch, triton).

Tensors are on one CUDA device and contiguous; weights are the file's own bytes, uint8. Nothing here
waits for the device. With TRITON_INTERPRET=1 in the environment before this module is imported, all
of it runs on the CPU in Triton's interpreter: that is how the tests get their values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from triton.runtime.interpreter import InterpretedFunction

from deskside.backends.triton import matmul as triton_matmul
from deskside.backends.triton import sequence as triton_sequence
from deskside.backends.triton.decode import PAIR
from deskside.errors import DesksideError
from deskside.gguf.quants import quant_type

# Up to so many rows of activations are multiplied in float32, without tensor cores. From three rows
# on those need fewer instructions a weight, even with most of their 16 columns empty.
FEW_ROWS = 2
# Up to so many tokens, pairs of token and expert are treated one by one: few share an expert.
FEW_TOKENS = 8
# How tl.dot multiplies: float16 operands hold every code of a 4- to 8-bit type with its scale to
# 2^-11; BF16 weights do not fit float16's range; F32 is what routers are kept in.
PRECISION = {"F32": "tf32x3", "BF16": "tf32"}
KV_TYPES = {"f16": "F16", "q8_0": "Q8_0", "f32": "F32"}
SPLIT = 512  # positions that a part of attention is worth, see `attention_splits`
MAX_SPLITS = 64


@dataclass(frozen=True)
class Config:
    """What a kernel is compiled for: its constexpr arguments and the compiler's options."""

    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


def power_of_2_part(n: int, limit: int) -> int:
    """The largest power of 2 that divides n, at most `limit`."""
    return min(n & -n, limit)


def up_to_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=256)
def weight_constants(type_name: str, n_in: int) -> dict[str, Any]:
    """TYPE, PAIR, N_IN and ROW_BYTES of a matrix; DesksideError where it has no kernel."""
    t = quant_type(type_name)
    if t.name not in PAIR:
        raise DesksideError(
            f"{t.name} has no GPU kernel; these have: {', '.join(PAIR)}. "
            "Place such tensors on the CPU, or quantise them anew"
        )
    if n_in <= 0 or n_in % 32:
        raise DesksideError(f"GPU kernels need rows of a multiple of 32 weights, not {n_in}")
    return {"TYPE": t.name, "PAIR": PAIR[t.name], "N_IN": n_in, "ROW_BYTES": t.row_bytes(n_in)}


def matvec_config(
    type_name: str, n_in: int, rows: int, *, share: int = 1, grouped: bool = False, fused: bool
) -> Config:
    """One warp with a few rows of w, so that nothing crosses warps. `rows`: at most FEW_ROWS."""
    return Config(
        weight_constants(type_name, n_in)
        | {
            "ROWS": up_to_power_of_2(rows),
            "SHARE": share,
            "GROUPED": grouped,
            "FUSED": fused,
            "BLOCK_N": 2 if fused or rows > 1 else 4,
            "GROUPS": power_of_2_part(n_in // 32, 16),
        },
        num_warps=1,
    )


def matmul_config(
    type_name: str, n_in: int, rows: int, *, share: int = 1, grouped: bool = False, fused: bool
) -> Config:
    """`rows`: how many rows of activations meet a matrix, on average where there are many.

    Up to 16 rows of one matrix are decode: many small CTAs, so that all of the GPU reads. What
    GROUPS there are, is what fits into registers (docs/TRITON.md has the numbers).
    """
    constants = weight_constants(type_name, n_in)
    few = rows <= 16 and not grouped
    block_m = min(max(16, up_to_power_of_2(rows)), 64)
    precision = PRECISION.get(constants["TYPE"], "f16")
    groups = 4 if few else 1 if (fused and block_m == 64) or precision == "tf32x3" else 2
    return Config(
        constants
        | {
            "SHARE": share,
            "GROUPED": grouped,
            "FUSED": fused,
            "PRECISION": precision,
            "BLOCK_M": block_m,
            "BLOCK_N": 16 if few else 64,
            "GROUPS": power_of_2_part(n_in // 32, groups),
        },
        num_warps=1 if few else 4,
    )


def matmul(x: torch.Tensor, w: torch.Tensor, type_name: str, n_in: int, n_out: int) -> torch.Tensor:
    """y = x W^T: float32 (rows, n_in), uint8 (n_out, row bytes) -> float32 (rows, n_out)."""
    constants = weight_constants(type_name, n_in)
    _check_input(x, n_in)
    _check_weight(w, 1, n_out, constants["ROW_BYTES"], type_name)
    rows = len(x)
    y = torch.empty((rows, n_out), dtype=torch.float32, device=x.device)
    if rows == 0:
        return y
    if rows <= FEW_ROWS:
        config = matvec_config(type_name, n_in, rows, fused=False)
        grid = (_tiles(n_out, config.constants["BLOCK_N"]), 1, 1)
        _launch(triton_matmul.matvec, grid, config, x, w, None, None, y, rows, n_out, 1)
        return y
    config = matmul_config(type_name, n_in, rows, fused=False)
    grid = _grid(_tiles(rows, config.constants["BLOCK_M"]), n_out, config)
    scaled, scale = _scaled(x, config)
    args = (scaled, scale, w, None, None, None, y, rows, n_out)
    _launch(triton_matmul.matmul, grid, config, *args)
    return y


def experts_matmul(
    x: torch.Tensor,
    w: torch.Tensor,
    type_name: str,
    n_in: int,
    n_out: int,
    ids: torch.Tensor,
    up: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every pair of a token and a chosen expert, in one launch; pairs are numbered token by token.

    x: float32 (tokens, n_in), or (pairs, n_in) where each pair has its own row. w and up: uint8
    (experts, n_out, row bytes); ids: integer (tokens, chosen) -> float32 (pairs, n_out): x W^T of
    the pair's expert, or silu(x W^T) (x Up^T); NaN where its id is not one of the experts, for to
    raise the host would have to wait.
    """
    constants = weight_constants(type_name, n_in)
    _check_input(x, n_in)
    for matrix in (w,) if up is None else (w, up):
        _check_weight(matrix, len(w), n_out, constants["ROW_BYTES"], type_name)
    tokens, chosen = ids.shape
    pairs = tokens * chosen
    if len(x) not in (tokens, pairs):
        raise DesksideError(f"experts of {tokens} tokens, {chosen} each, got {len(x)} rows")
    y = torch.empty((pairs, n_out), dtype=torch.float32, device=x.device)
    fused, share = up is not None, pairs // max(len(x), 1)
    if pairs == 0:
        return y
    expert = ids.reshape(-1).to(torch.int32)
    if tokens <= FEW_TOKENS:
        config = matvec_config(type_name, n_in, 1, share=share, grouped=True, fused=fused)
        grid = (_tiles(n_out, config.constants["BLOCK_N"]), pairs, 1)
        few = (x, w, up, expert, y, pairs, n_out, len(w))
        _launch(triton_matmul.matvec, grid, config, *few)
        return y
    y.fill_(torch.nan)  # for pairs in no tile
    mean = -(-pairs // len(w))
    config = matmul_config(type_name, n_in, mean, share=share, grouped=True, fused=fused)
    order, tiles = sort_pairs(expert, len(w), config.constants["BLOCK_M"])
    grid = _grid(len(tiles), n_out, config)
    scaled, scale = _scaled(x, config)
    args = (scaled, scale, w, up, tiles, order, y, pairs, n_out)
    _launch(triton_matmul.matmul, grid, config, *args)
    return y


def sort_pairs(
    expert: torch.Tensor, n_experts: int, block_m: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs sorted by expert, and the tiles of at most `block_m` of them that a grid works on.

    expert: int32 (pairs,) -> order int32 (pairs,), tiles int32 (at most needed, 3): expert,
    first and last + 1 place in the order. Pairs of experts that there are not come last, in no
    tile. How many tiles are needed depends on the ids, which only the device knows, so there are as
    many as could be; those left over are empty.
    """
    known = (expert >= 0) & (expert < n_experts)
    expert = torch.where(known, expert, n_experts).long()
    order = torch.argsort(expert, stable=True).to(torch.int32)
    counts = torch.zeros(n_experts + 1, dtype=torch.int64, device=expert.device)
    counts = counts.scatter_add_(0, expert, torch.ones_like(expert))[:n_experts]
    ends, tile_ends = counts.cumsum(0), (-(-counts // block_m)).cumsum(0)
    pairs = len(expert)
    max_tiles = min(pairs, pairs // block_m + n_experts)
    tile = torch.arange(max_tiles, device=expert.device)
    of = torch.searchsorted(tile_ends, tile, right=True).clamp(max=n_experts - 1)
    within = tile - (tile_ends[of] - -(-counts[of] // block_m))
    first = ends[of] - counts[of] + within * block_m
    last = torch.minimum(first + block_m, ends[of])
    return order, torch.stack([of, first, last], 1).to(torch.int32)


def delta_config(dim: int) -> Config:
    return Config({"DIM": dim, "COLUMNS": min(dim, 32)})


def delta_step(
    qkv: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    ssm_a: torch.Tensor,
    dt_bias: torch.Tensor,
    state: torch.Tensor,
    slots: torch.Tensor,
    *,
    k_heads: int,
    eps: float,
) -> torch.Tensor:
    """The tape's `gated_delta` for one token of each of n sequences; `state` changes in place.

    qkv: (n, (2 k_heads + v_heads) dim); a, b: (n, v_heads); ssm_a, dt_bias: (v_heads,); state:
    float32 (slots, v_heads, dim, dim); slots: int32 (n,), all different -> (n, v_heads dim).
    """
    _, v_heads, dim, _ = state.shape
    _check_input(qkv, (2 * k_heads + v_heads) * dim)
    n = len(qkv)
    out = torch.empty((n, v_heads * dim), dtype=torch.float32, device=qkv.device)
    if n == 0:
        return out
    config = delta_config(dim)
    grid = (dim // config.constants["COLUMNS"], v_heads, n)
    args = (qkv, a, b, ssm_a, dt_bias, slots, state, out, k_heads, v_heads, eps)
    _launch(triton_sequence.delta_step, grid, config, *args)
    return out


def attention_config(k_type: str, v_type: str, group: int, dim: int) -> Config:
    """The cache's types by their names on the command line (f16, q8_0, f32)."""
    k, v = (weight_constants(KV_TYPES[t], dim) for t in (k_type, v_type))
    return Config(
        {
            "K_TYPE": k["TYPE"],
            "V_TYPE": v["TYPE"],
            "K_BYTES": k["ROW_BYTES"],
            "V_BYTES": v["ROW_BYTES"],
            "GROUP": group,
            "DIM": dim,
            "TILE": 32,
            "PRECISION": "tf32x3" if "F32" in (k["TYPE"], v["TYPE"]) else "f16",
        }
    )


def attention_splits(longest: int) -> int:
    """Parts that the positions are shared out to: from lengths the host knows."""
    return min(MAX_SPLITS, max(1, -(-longest // SPLIT)))


def decode_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    slots: torch.Tensor,
    lengths: torch.Tensor,
    *,
    k_type: str,
    v_type: str,
    dim: int,
    scale: float,
    splits: int,
) -> torch.Tensor:
    """softmax(scale q K^T) V for one token of each of n sequences, whose k and v are stored.

    q: float32 (n, heads dim); k, v: uint8 (slots, kv_heads, n_ctx, bytes of a row), as `cache`
    lays them out; slots, lengths: int32 (n,), lengths at least 1 -> float32 (n, heads dim).
    """
    n, kv_heads, n_ctx = len(q), k.shape[1], k.shape[2]
    group = q.shape[1] // (dim * kv_heads)
    _check_input(q, group * kv_heads * dim)
    out = torch.empty_like(q)
    if n == 0:
        return out
    config = attention_config(k_type, v_type, group, dim)
    part = q.new_empty((n, kv_heads, splits, group, dim))
    stats = q.new_empty((n, kv_heads, splits, group, 2))
    args = (q, k, v, slots, lengths, part, stats, kv_heads, n_ctx, scale)
    _launch(triton_sequence.attend, (splits, kv_heads, n), config, *args)
    merging = merge_config(group, dim, splits)
    grid = (group, n * kv_heads, 1)
    _launch(triton_sequence.merge, grid, merging, part, stats, out, splits)
    return out


def merge_config(group: int, dim: int, splits: int) -> Config:
    return Config({"GROUP": group, "DIM": dim, "SPLITS": up_to_power_of_2(splits)})


def _launch(kernel: Any, grid: tuple[int, int, int], config: Config, *args: Any) -> None:
    if not args[0].is_cuda and not isinstance(kernel, InterpretedFunction):
        raise DesksideError(
            "Triton kernels need tensors on a CUDA device (or TRITON_INTERPRET=1, for tests)"
        )
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    run = partial(kernel[grid], **config.constants, **options)
    _LAUNCHING.get()(run, args)


def _launch_now(run: Callable[..., None], args: tuple[Any, ...]) -> None:
    run(*args)


_LAUNCHING: ContextVar[Callable[[Callable[..., None], tuple[Any, ...]], None]] = ContextVar(
    "_LAUNCHING", default=_launch_now
)


@contextmanager
def launches(to: Callable[[Callable[..., None], tuple[Any, ...]], None]) -> Iterator[None]:
    """In the block every launch is handed to `to(run, args)`, which may make it: run(*args)."""
    token = _LAUNCHING.set(to)
    try:
        yield
    finally:
        _LAUNCHING.reset(token)


def _tiles(n: int, block: int) -> int:
    return -(-n // block)


def _grid(m_tiles: int, n_out: int, config: Config) -> tuple[int, int, int]:
    return m_tiles, _tiles(n_out, config.constants["BLOCK_N"]), 1


def _scaled(x: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows divided by a power of 2, largest magnitude below 1, and those powers.

    float16 ends at 65504, and activations before `down` pass that. Powers of 2 round nothing.
    """
    if config.constants["PRECISION"] != "f16":
        return x, x.new_ones(len(x))
    exponent = torch.frexp(x.abs().amax(1)).exponent
    scaled = torch.ldexp(x, -exponent[:, None]).to(torch.float16)
    return scaled, torch.ldexp(x.new_ones(len(x)), exponent)


def _check_input(x: torch.Tensor, width: int) -> None:
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != width or not x.is_contiguous():
        raise DesksideError(
            f"a GPU kernel's input is contiguous float32 (rows, {width}), "
            f"not {x.dtype} {tuple(x.shape)}"
        )


def _check_weight(w: torch.Tensor, experts: int, n_out: int, row_bytes: int, name: str) -> None:
    size = experts * n_out * row_bytes
    if w.dtype != torch.uint8 or w.numel() != size or not w.is_contiguous() or w.data_ptr() % 4:
        raise DesksideError(
            f"{experts} x {n_out} rows of {name} are {size} contiguous bytes, aligned to 4, "
            f"not {w.dtype} {tuple(w.shape)}"
        )
