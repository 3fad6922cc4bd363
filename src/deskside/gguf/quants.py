"""The quant types: a table row each. `decoders.py` has the layouts of their blocks.

A row of `n` weights is an optional row header, then `n / block` blocks of `block_bytes` bytes. Rows
follow each other without padding. All integers and floats are little endian.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.gguf.decoders import DECODERS, ROW_SCALED, Bytes, Floats


@dataclass(frozen=True)
class QuantType:
    """How a row of weights is stored. id: the type id in GGUF. Sizes are in bytes.

    block: weights per block. scales: offsets of the fp16 scales (d, dmin or m) within a block.
    """

    id: int
    name: str
    block: int
    block_bytes: int
    row_header: int = 0
    scales: tuple[int, ...] = ()

    def row_bytes(self, n: int) -> int:
        """Bytes of a row of `n` weights; `n` must be a multiple of the block."""
        if n <= 0 or n % self.block:
            raise DesksideError(
                f"a row of {n} weights cannot be stored as {self.name}: "
                f"the length must be a positive multiple of {self.block}"
            )
        return self.row_header + n // self.block * self.block_bytes


# Weights of these types are multiplied with float32 activations, all others with 8-bit ones.
FLOAT_TYPES = frozenset({"F32", "F16", "BF16"})
TYPES: dict[int, QuantType] = {
    t.id: t
    for t in (
        QuantType(0, "F32", 1, 4),
        QuantType(1, "F16", 1, 2),
        QuantType(2, "Q4_0", 32, 18, scales=(0,)),
        QuantType(3, "Q4_1", 32, 20, scales=(0, 2)),
        QuantType(6, "Q5_0", 32, 22, scales=(0,)),
        QuantType(7, "Q5_1", 32, 24, scales=(0, 2)),
        QuantType(8, "Q8_0", 32, 34, scales=(0,)),
        QuantType(10, "Q2_K", 256, 84, scales=(80, 82)),
        QuantType(11, "Q3_K", 256, 110, scales=(108,)),
        QuantType(12, "Q4_K", 256, 144, scales=(0, 2)),
        QuantType(13, "Q5_K", 256, 176, scales=(0, 2)),
        QuantType(14, "Q6_K", 256, 210, scales=(208,)),
        QuantType(20, "IQ4_NL", 32, 18, scales=(0,)),
        QuantType(23, "IQ4_XS", 256, 136, scales=(0,)),
        QuantType(24, "I8", 1, 1),
        QuantType(25, "I16", 1, 2),
        QuantType(26, "I32", 1, 4),
        QuantType(27, "I64", 1, 8),
        QuantType(28, "F64", 1, 8),
        QuantType(30, "BF16", 1, 2),
        QuantType(39, "MXFP4", 32, 17),
        QuantType(133, "Q6_0", 32, 26, scales=(0,)),
        QuantType(139, "IQ4_K", 256, 144, scales=(0,)),
        QuantType(140, "IQ5_K", 256, 176, scales=(0,)),
        QuantType(141, "IQ6_K", 256, 212, scales=(0,)),
        QuantType(144, "IQ4_KS", 256, 136, row_header=4),
        QuantType(146, "IQ4_KSS", 256, 128, row_header=4),
        QuantType(152, "IQ5_KS", 256, 168, row_header=4),
    )
}
BY_NAME: dict[str, QuantType] = {t.name: t for t in TYPES.values()}

# Types that files may hold but deskside does not read: for the error message.
UNSUPPORTED: dict[int, str] = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 40: "NVFP4", 137: "IQ2_K", 138: "IQ3_K",
    145: "IQ2_KS", 155: "IQ4_KT", 156: "IQ3_KS", 157: "IQ2_KL", 216: "IQ2_XXS_R4",
    217: "IQ2_XS_R4", 218: "IQ3_XXS_R4", 219: "IQ1_S_R4", 221: "IQ3_S_R4", 222: "IQ2_S_R4",
    229: "IQ1_M_R4", 337: "IQ2_K_R4", 338: "IQ3_K_R4", 353: "MXFP4_R8", 397: "Q8_K_R16",
    398: "Q8_KV_R8", 399: "Q8_K_R8",
}  # fmt: skip


def quant_type(name: str) -> QuantType:
    """The type called `name`, upper or lower case. DesksideError lists the known names."""
    found = BY_NAME.get(name.strip().upper())
    if found is None:
        raise DesksideError(f"unknown quant type {name!r}; known types: {', '.join(BY_NAME)}")
    return found


def dequantize(data: Bytes, t: QuantType, n: int) -> Floats:
    """Decode rows of `n` weights: uint8 (rows, t.row_bytes(n)) -> float32 (rows, n).

    DesksideError if `n` or the shape of `data` does not fit the type.
    """
    row_bytes = t.row_bytes(n)
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != row_bytes:
        raise DesksideError(
            f"rows of {n} weights in {t.name} are uint8 (rows, {row_bytes}), "
            f"not {data.dtype} {data.shape}"
        )
    rows = data.shape[0]
    blocks = np.ascontiguousarray(data[:, t.row_header :]).reshape(-1, t.block_bytes)
    # A damaged file may hold infinite scales. `GGUF.check_values` reports them; no warning here.
    with np.errstate(invalid="ignore", over="ignore"):
        if t.row_header:
            d = np.ascontiguousarray(data[:, : t.row_header]).view("<f4")
            per_block = np.repeat(d, n // t.block, axis=0)
            return ROW_SCALED[t.name](blocks, per_block).reshape(rows, n)
        return DECODERS[t.name](blocks).reshape(rows, n)


def non_finite_rows(data: Bytes, t: QuantType) -> NDArray[np.intp]:
    """Indices of the rows of uint8 (rows, row_bytes) with a NaN or Inf value, scale or header."""
    rows = data.shape[0]
    bad = np.zeros(rows, np.bool_)
    if t.name in _EXPONENT:
        dtype, mask = _EXPONENT[t.name]
        bad |= ((np.ascontiguousarray(data).view(dtype) & mask) == mask).any(axis=1)
    if t.row_header:
        dtype, mask = _EXPONENT["F32"]
        header = np.ascontiguousarray(data[:, :4]).view(dtype)
        bad |= ((header & mask) == mask)[:, 0]
    dtype, mask = _EXPONENT["F16"]
    blocks = data[:, t.row_header :].reshape(rows, -1, t.block_bytes)
    for at in t.scales:
        scale = np.ascontiguousarray(blocks[:, :, at : at + 2]).view(dtype)
        bad |= ((scale & mask) == mask).any(axis=(1, 2))
    if t.name == "MXFP4":  # from here its largest code exceeds float32
        bad |= (blocks[:, :, 0] > 252).any(axis=1)
    return np.flatnonzero(bad)


# Storage integer and exponent mask of the float types. An exponent of all ones is NaN or Inf.
_EXPONENT: dict[str, tuple[str, int]] = {
    "F16": ("<u2", 0x7C00),
    "BF16": ("<u2", 0x7F80),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
