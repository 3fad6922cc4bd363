"""ik_llama.cpp's interleaved types: the bits of 4, 8 or 16 rows of a plain type, in another order.

Files hold them where `llama-quantize --repack` made them (`Q4_K_R4`, `Q8_0_R8`). deskside takes
them apart when it reads them. A group of R rows has the R row headers, then for each block of the
plain type R * block_bytes bytes. Every field of the R blocks is stored by itself, as an array of
bits in another order of its axes. So a field is two lists of axes.

The orders are those of `iqk_repack_tensor` in ik_llama.cpp, ggml/src/iqk/iqk_quantize.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from deskside.gguf.decoders import Bytes
from deskside.gguf.quants import BY_NAME, QuantType

# Bytes that are taken apart at a time.
_CHUNK = 1 << 22


@dataclass(frozen=True)
class _Field:
    """A field of a block. at: its first byte in R interleaved blocks, and in one plain block.

    axes: "interleaved > plain", slowest first, with sizes on the left; r is the row. The last axes
    count units of `bits` bits within a byte, from its lowest. A digit on the right is a place on an
    axis of two whose other place another field fills.
    """

    at: int
    to: int
    bits: int
    axes: str

    def move(self, packed: Bytes, plain: Bytes) -> None:
        """packed (N, R * block_bytes) -> plain (N, R, block_bytes), which begins as zeros."""
        n, rows = plain.shape[:2]
        left, right = (side.split() for side in self.axes.split(">"))
        sizes = {axis[0]: int(axis[1:] or rows) for axis in left}
        (packed_axes, packed_units), (plain_axes, plain_units) = (
            _split(axes, sizes, 8 // self.bits) for axes in (list(sizes), right)
        )
        kind: np.dtype[Any] = np.dtype(np.uint8)
        if packed_axes[-1] == plain_axes[-1] == "b" and sizes["b"] == 4:  # four bytes as one word
            kind, packed_axes, plain_axes = np.dtype("<u4"), packed_axes[:-1], plain_axes[:-1]
        nbytes = math.prod(sizes[a] for a in packed_axes) * kind.itemsize
        source = np.ascontiguousarray(packed[:, self.at : self.at + nbytes]).view(kind)
        source = source.reshape(n, *(sizes[a] for a in packed_axes))
        moved = np.zeros((n, *(sizes[a] for a in plain_axes)), kind)
        mask = kind.type(((1 << self.bits) - 1) * sum(1 << 8 * i for i in range(kind.itemsize)))
        within = [a for a in dict.fromkeys(packed_units + plain_units) if a in sizes]
        for values in product(*(range(sizes[a]) for a in within)):
            fixed = dict(zip(within, values, strict=True))
            down, up = (
                kind.type(self.bits * _place(units, sizes, fixed))
                for units in (packed_units, plain_units)
            )
            free = [a for a in packed_axes if a not in fixed]
            order = [1 + free.index(a) for a in plain_axes if a not in fixed]
            units = source[_at(packed_axes, fixed)].transpose(0, *order) >> down & mask
            moved[_at(plain_axes, fixed)] |= units << up
        own = plain[:, :, self.to :]
        filled = moved.view(np.uint8).reshape(n, rows, -1)
        own[:, :, : filled.shape[2]] |= filled


def _split(axes: list[str], sizes: dict[str, int], per_byte: int) -> tuple[list[str], list[str]]:
    """Axes that count bytes, and the last ones, which count the units of a byte."""
    at, units = len(axes), 1
    while units < per_byte:
        at -= 1
        units *= sizes.get(axes[at], 2)
    return axes[:at], axes[at:]


def _place(axes: list[str], sizes: dict[str, int], fixed: dict[str, int]) -> int:
    """The number of a unit within its byte."""
    place = 0
    for axis in axes:
        place = place * sizes.get(axis, 2) + (fixed[axis] if axis in fixed else int(axis))
    return place


def _at(axes: list[str], fixed: dict[str, int]) -> tuple[slice | int, ...]:
    return (slice(None), *(fixed.get(a, slice(None)) for a in axes))


@dataclass(frozen=True)
class Interleave:
    """How a type id of ik_llama.cpp stores `rows` rows of a plain type."""

    id: int
    name: str
    type: QuantType
    rows: int
    fields: tuple[_Field, ...]

    @property
    def unit(self) -> int:
        """Bytes of a row that are taken together: a block, or two weights of BF16."""
        return max(self.type.block_bytes, 4)

    def fits(self, row_len: int, rows: int) -> bool:
        """Whether a matrix of `rows` rows can be stored so; its blocks are whole."""
        whole = (self.type.row_bytes(row_len) - self.type.row_header) % self.unit == 0
        return whole and rows % self.rows == 0

    def plain(self, data: Bytes) -> Bytes:
        """uint8 (rows, row_bytes) of whole groups of rows -> the plain type's rows, same shape."""
        head, r, (n, row_bytes) = self.type.row_header, self.rows, data.shape
        out = np.empty(data.shape, np.uint8)
        step = r * max(1, _CHUNK // (r * row_bytes))
        for start in range(0, n, step):
            groups = np.ascontiguousarray(data[start : start + step]).reshape(-1, r * row_bytes)
            own = out[start : start + step].reshape(len(groups), r, row_bytes)
            own[:, :, :head] = groups[:, : r * head].reshape(len(groups), r, head)
            packed = groups[:, r * head :].reshape(-1, r * self.unit)
            blocks = np.zeros((len(packed), r, self.unit), np.uint8)
            for field in self.fields:
                field.move(packed, blocks)
            parts = blocks.reshape(len(groups), -1, r, self.unit).swapaxes(1, 2)
            own[:, :, head:] = parts.reshape(len(groups), r, -1)
        return out


def _half(at: int, to: int) -> _Field:
    """An fp16 a row."""
    return _Field(at, to, 8, "r b2 > r b")


def _by_byte(at: int, to: int, n: int) -> _Field:
    """n bytes a row: the first of all rows, then the second."""
    return _Field(at, to, 8, f"j{n} r > r j")


# Nibbles of 32 or 256 weights in blocks of 32, and in pairs of blocks; fifth bits of those.
_NIBBLES_32 = "a2 v2 r b4 c2 > r c a b v"
_NIBBLES = "g8 a2 v2 r b4 c2 > r g c a b v"
_NIBBLES_64 = "g4 v2 a2 e2 r b4 c2 > r g e c a b v"
_QUARTERS = "g2 p4 e2 r b4 q4 > r g e q b p"
_K_HEADER = (
    _half(0, 0),
    _half(8, 2),
    # scales and minima: their high two bits, their low four bits; see decoders._k_scales
    _Field(16, 4, 2, "j4 r t2 s2 > r s j 1 t"),
    _Field(32, 4, 2, "j4 r s2 t2 > r s j 0 t"),
    _by_byte(48, 12, 4),
)
_IQK_HEADER = (
    _half(0, 0),
    _Field(8, 2, 1, "s2 r k2 t4 > r k t s"),
    _Field(16, 4, 2, "p4 r k4 > r k p"),
    _Field(32, 8, 4, "j4 v2 r c2 > r c j v"),
)
_FIFTH_BITS = "p8 r b4 c2 e2 d2 > r e d c b p"


def _of(type_id: int, name: str, *fields: _Field) -> Interleave:
    plain, _, rows = name.rpartition("_R")
    return Interleave(type_id, name, BY_NAME[plain], int(rows), fields)


INTERLEAVED: dict[int, Interleave] = {
    i.id: i
    for i in (
        _of(202, "Q4_0_R8", _half(0, 0), _Field(16, 2, 8, "a4 r b4 > r a b")),
        _of(
            206, "Q5_0_R4", _half(0, 0), _Field(8, 2, 1, "r b4 k2 t2 m2 > r m k t b"),
            _Field(24, 6, 4, _NIBBLES_32),
        ),
        _of(208, "Q8_0_R8", _half(0, 0), _Field(16, 2, 8, "a8 r b4 > r a b")),
        _of(
            210, "Q2_K_R4", _half(0, 80), _half(8, 82), _by_byte(16, 0, 16),
            _Field(80, 16, 2, _QUARTERS),
        ),
        _of(
            211, "Q3_K_R4", _half(0, 108), _by_byte(8, 104, 4), _by_byte(24, 96, 8),
            _Field(56, 0, 1, "p8 r b4 q8 > r q b p"), _Field(184, 32, 2, _QUARTERS),
        ),
        _of(212, "Q4_K_R4", *_K_HEADER, _Field(64, 16, 4, _NIBBLES_64)),
        _of(
            213, "Q5_K_R4", *_K_HEADER, _Field(64, 16, 1, "p8 r b4 e2 c2 d2 > r e d c b p"),
            _Field(192, 48, 4, _NIBBLES_64),
        ),
        _of(
            214, "Q6_K_R4", _half(0, 208), _by_byte(8, 192, 16),
            _Field(72, 128, 2, "g2 p4 e2 r b4 c2 d2 > r g e d c b p"),
            _Field(328, 0, 4, "g2 v2 f2 a2 e2 r b4 c2 > r g f e c a b v"),
        ),
        _of(220, "IQ4_NL_R4", _half(0, 0), _Field(8, 2, 4, _NIBBLES_32)),
        _of(
            223, "IQ4_XS_R8", _half(0, 0), _Field(16, 2, 2, "s2 r k2 t2 > r k t s"),
            _Field(32, 4, 4, "e2 v2 r c2 > r c e v"),
            _Field(64, 8, 4, "g8 v2 a2 r b4 c2 > r g a c b v"),
        ),
        _of(230, "BF16_R16", _Field(0, 0, 8, "r b4 > r b")),
        _of(
            233, "Q6_0_R4", _half(0, 0), _Field(8, 2, 2, "s2 r b4 t2 c2 > r c b t s"),
            _Field(40, 10, 4, _NIBBLES_32),
        ),
        _of(339, "IQ4_K_R4", *_IQK_HEADER, _Field(64, 16, 4, _NIBBLES)),
        _of(
            340, "IQ5_K_R4", *_IQK_HEADER, _Field(64, 16, 4, _NIBBLES_64),
            _Field(576, 144, 1, _FIFTH_BITS),
        ),
        _of(344, "IQ4_KS_R4", _by_byte(0, 0, 8), _Field(32, 8, 4, _NIBBLES)),
        _of(
            352, "IQ5_KS_R4", _by_byte(0, 0, 8), _Field(32, 8, 4, _NIBBLES_64),
            _Field(544, 136, 1, _FIFTH_BITS),
        ),
    )
}  # fmt: skip
