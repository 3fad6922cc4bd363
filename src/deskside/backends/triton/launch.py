"""Launches the Triton kernels: checks the inputs and selects launch shapes.

The kernels are in `matmul.py` and `sequence.py`, the decoders in `decode.py`. They need the extra
`gpu` (torch, triton).

Tensors must be contiguous and on one CUDA device. Weights are the file's own bytes, uint8. Nothing
here waits for the device. If TRITON_INTERPRET=1 is set before the import, everything runs on the
CPU in Triton's interpreter. The tests compute their values that way.
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

# Up to so many rows of activations, `matvec` multiplies in float32. From three rows on, tensor
# cores need fewer instructions per weight, even with most of their 16 columns empty.
FEW_ROWS = 2
# Up to so many tokens, each pair of token and expert is computed alone: few share an expert.
FEW_TOKENS = 8
# How tl.dot multiplies; other types use float16. It holds a code of up to 8 bits times its scale to
# a relative error of 2^-11. BF16 weights exceed float16's range. F32 needs its precision: routers.
PRECISION = {"F32": "tf32x3", "BF16": "tf32"}
KV_TYPES = {"f16": "F16", "q8_0": "Q8_0", "f32": "F32"}
SPLIT = 512  # positions per split of attention, see `attention_splits`
MAX_SPLITS = 64


@dataclass(frozen=True)
class Config:
    """How a kernel is compiled: its constexpr arguments and the compiler's options."""

    constants: dict[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 2


def power_of_2_part(n: int, limit: int) -> int:
    """The largest power of 2 that divides n, at most `limit`."""
    return min(n & -n, limit)


def up_to_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (n - 1).bit_length()


@lru_cache(maxsize=256)
def weight_constants(type_name: str, n_in: int) -> dict[str, Any]:
    """TYPE, PAIR, N_IN and ROW_BYTES of a matrix. DesksideError if it has no kernel."""
    t = quant_type(type_name)
    if t.name not in PAIR:
        raise DesksideError(
            f"{t.name} has no GPU kernel; these have: {', '.join(PAIR)}. "
            "Place such tensors on the CPU, or quantise the model to one of these types"
        )
    if n_in <= 0 or n_in % 32:
        raise DesksideError(f"GPU kernels need rows of a multiple of 32 weights, not {n_in}")
    return {"TYPE": t.name, "PAIR": PAIR[t.name], "N_IN": n_in, "ROW_BYTES": t.row_bytes(n_in)}


def matvec_config(
    type_name: str, n_in: int, rows: int, *, share: int = 1, grouped: bool = False, fused: bool
) -> Config:
    """How `matvec` is compiled: one warp per few rows of w, so that no sum crosses warps.

    rows: of activations, at most FEW_ROWS.
    """
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
    """How `matmul` is compiled. rows: of activations per matrix; for experts their mean.

    Up to 16 rows and one matrix is decode: there are many small CTAs, so that the whole GPU reads.
    GROUPS is what fits into registers (docs/TRITON.md has the numbers).
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
    """y = x W^T: float32 (rows, n_in), uint8 (n_out, row bytes) -> float32 (rows, n_out).

    DesksideError for a type without a kernel, or tensors of another shape, type or alignment.
    """
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
    """Computes all pairs of a token and a selected expert, in one launch.

    x      float32 (tokens, n_in), or (pairs, n_in) if each pair has its own row
    w, up  uint8 (experts, n_out, row bytes)
    ids    numbers (tokens, chosen); pair token * chosen + i has the expert ids[token, i]

    Returns float32 (pairs, n_out): x W^T with the pair's expert, or silu(x W^T) * (x Up^T) with
    `up`. The result is NaN if an id is not one of the experts: to raise, the host would have to
    wait. DesksideError as `matmul`.
    """
    constants = weight_constants(type_name, n_in)
    _check_input(x, n_in)
    for matrix in (w,) if up is None else (w, up):
        _check_weight(matrix, len(w), n_out, constants["ROW_BYTES"], type_name)
    tokens, chosen = ids.shape
    pairs = tokens * chosen
    if len(x) not in (tokens, pairs):
        raise DesksideError(
            f"experts of {tokens} tokens, {chosen} each, need {tokens} or {pairs} rows of "
            f"activations, not {len(x)}"
        )
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
    y.fill_(torch.nan)  # pairs without a valid expert are in no tile
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
    """Sorts pairs by expert, and cuts them in tiles of at most `block_m` pairs of one expert.

    expert: int32 (pairs,) -> order int32 (pairs,), tiles int32 (max_tiles, 3). A tile is its
    expert and its range [first, last) in `order`. Pairs without a valid expert come last, in no
    tile. The number of tiles needed depends on the ids, which only the device knows. So there are
    as many as could be needed, and the rest are empty.
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
    """The op `gated_delta` for one token of each of n sequences. `state` changes in place.

    qkv             float32 (n, (2 k_heads + v_heads) dim)
    a, b            float32 (n, v_heads)
    ssm_a, dt_bias  float32 (v_heads,)
    state           float32 (slots, v_heads, dim keys, dim values)
    slots           int32 (n,), all different

    Returns float32 (n, v_heads dim). The formula is in `sequence.delta_step`.
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
    """How `attend` is compiled. k_type, v_type: as on the command line: f16, q8_0 or f32.

    group: query heads per KV head. dim: of a head.
    """
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
    """The number of splits of attention over `longest` positions."""
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
    """softmax(scale q K^T) V for one token of each of n sequences. Its k and v are already stored.

    q        float32 (n, heads dim)
    k, v     uint8 (slots, kv_heads, n_ctx, bytes of a row), as in `tape/cache.py`
    slots    int32 (n,)
    lengths  int32 (n,): positions to attend to, at least 1; the token's own is the last
    splits   parts of the positions that are computed in parallel

    Returns float32 (n, heads dim).
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
    """In this context, `to(run, args)` replaces each launch. It may launch with run(*args)."""
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
    """Scale each row by a power of 2 to magnitudes below 1, in float16. Returns rows and powers.

    float16 ends at 65504, and the activations that `down` reads can exceed it. Division by a power
    of 2 is exact.
    """
    if config.constants["PRECISION"] != "f16":
        return x, x.new_ones(len(x))
    exponent = torch.frexp(x.abs().amax(1)).exponent
    scaled = torch.ldexp(x, -exponent[:, None]).to(torch.float16)
    return scaled, torch.ldexp(x.new_ones(len(x)), exponent)


def _check_input(x: torch.Tensor, width: int) -> None:
    if x.dtype != torch.float32 or x.ndim != 2 or x.shape[1] != width or not x.is_contiguous():
        raise DesksideError(
            f"a GPU kernel's input must be contiguous float32 (rows, {width}), "
            f"not {x.dtype} {tuple(x.shape)}"
        )


def _check_weight(w: torch.Tensor, experts: int, n_out: int, row_bytes: int, name: str) -> None:
    size = experts * n_out * row_bytes
    if w.dtype != torch.uint8 or w.numel() != size or not w.is_contiguous() or w.data_ptr() % 4:
        raise DesksideError(
            f"{experts} x {n_out} rows of {name} must be {size} contiguous bytes, aligned to 4, "
            f"not {w.dtype} {tuple(w.shape)}"
        )
