"""Encoders of ik's types with two codebooks. A bit beside each scale says which.

Stored scales are whole multiples of one scale: of a superblock (IQ*_K) or of a row (IQ*_KS, _KSS).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.gguf.decoders import CODEBOOKS, CODEBOOKS_5, CODEBOOKS_6, Bytes, Floats
from deskside.gguf.scale_search import (
    TINY,
    as_float,
    best_scale,
    ends,
    half,
    pack_nibbles,
    reciprocal,
    search_tables,
    snap,
    snap_table,
)


@dataclass(frozen=True)
class _Multiples:
    """The whole numbers low, low + step .. high: what a stored scale may be."""

    low: int
    high: int
    step: int = 1

    def unit(self, scales: Floats) -> Floats:
        """(N, k) scales -> (N,): the one that the largest is `low` times; positive if it can be."""
        largest: Floats = scales[np.arange(len(scales)), np.abs(scales).argmax(axis=1)]
        if self.low == -self.high:
            largest, end = np.abs(largest), self.high
        else:
            end = self.low
        return largest / np.float32(end)

    def nearest(self, v: Floats) -> Floats:
        steps = np.rint((v - self.low) / self.step)
        whole: Floats = np.clip(self.low + self.step * steps, self.low, self.high)
        return whole.astype(np.float32)


_ODD_BYTE = _Multiples(-127, 127, 2)
_SIX_BITS = _Multiples(-32, 31)
_BYTE = _Multiples(-127, 127)


@dataclass(frozen=True)
class _Code:
    """Codes of a type: its codebooks, with their tables."""

    books: Floats
    tables: list[Floats]
    snaps: list[NDArray[np.uint8]]

    @classmethod
    def of(cls, books: Floats, reach: int) -> _Code:
        return cls(
            books,
            [search_tables(book, ends(book, reach)) for book in books],
            [snap_table(book) for book in books],
        )

    def snap(self, v: Floats, book: int) -> Bytes:
        """Index of the nearest code to each v."""
        return snap(v, self.snaps[book])


@dataclass(frozen=True)
class _Coded:
    """Rows or superblocks, N of them, with k sub-blocks each."""

    d: Floats  # (N,): the scale that sub-blocks have multiples of
    multiples: NDArray[np.int16]  # (N, k)
    book: Bytes  # (N, k): the codebook of each sub-block
    index: Bytes  # (N, k, size)


def _encode(
    x: Floats,
    size: int,
    code: _Code,
    multiples: _Multiples,
    stored: Callable[[Floats], Floats],
    snap: Callable[[Floats, int], Bytes] | None = None,
) -> _Coded:
    """Codes x (N, n) in sub-blocks of `size`; `stored`: N scales as the file holds them.

    Every codebook is tried with the scale as stored. At the end d is fitted again to the codes.
    """
    snap = snap or code.snap
    rows, n = x.shape
    peak = np.abs(x).max(axis=1)
    b = (x * reciprocal(peak)[:, None]).reshape(-1, size)
    found = [best_scale(b, tables) for tables in code.tables]
    first = np.argmax([gain for _, gain in found], axis=0)
    scales = np.choose(first, [scale for scale, _ in found]).reshape(rows, -1)
    # relative to the peak, as it will be read
    unit = stored(multiples.unit(scales) * peak) * reciprocal(peak)
    d = np.repeat(unit, n // size)
    inverse = reciprocal(d)
    w = b * b
    best = np.full(len(b), np.inf, np.float32)
    of_block = np.zeros(len(b), np.int16)
    book_of_block = np.zeros(len(b), np.uint8)
    index = np.zeros(b.shape, np.uint8)
    fit = np.zeros(b.shape, np.float32)
    for book, (scale, _) in enumerate(found):
        multiple = multiples.nearest(scale * inverse)
        candidate = snap(b * reciprocal(d * multiple)[:, None], book)
        y = code.books[book][candidate] * multiple[:, None]
        error = np.einsum("bi,bi->b", w, (b - y * d[:, None]) ** 2)
        take = error < best
        best[take] = error[take]
        of_block[take] = multiple[take]
        book_of_block[take] = book
        index[take] = candidate[take]
        fit[take] = y[take]
    fx = np.einsum("bi,bi,bi->b", w, fit, b).reshape(rows, -1).sum(axis=1)
    ff = np.einsum("bi,bi,bi->b", w, fit, fit).reshape(rows, -1).sum(axis=1)
    return _Coded(
        fx / np.maximum(ff, TINY) * peak,
        of_block.reshape(rows, -1),
        book_of_block.reshape(rows, -1),
        index.reshape(rows, -1, size),
    )


_FOUR, _FIVE, _SIX = (
    _Code.of(books, reach) for books, reach in ((CODEBOOKS, 7), (CODEBOOKS_5, 5), (CODEBOOKS_6, 3))
)


# By code index: 1 if its four bits have an odd number of ones. By codebook and parity: the nearest
# code of that parity. Borders between codes of equal parity are multiples of 1/2 too.
_ODD = np.array([bin(i).count("1") & 1 for i in range(16)], np.uint8)


def _parity_snap(book: Floats, odd: int) -> NDArray[np.uint8]:
    members = np.flatnonzero(odd == _ODD).astype(np.uint8)
    return members[snap_table(book[members])]


_PARITY_SNAP = [[_parity_snap(book, odd) for odd in (0, 1)] for book in CODEBOOKS]


def _even_snap(v: Floats, book: int) -> Bytes:
    """Nearest codes of v (N, 32) such that each IQ4_KSS word has an even number of set bits.

    Word k holds elements 2k, 2k+1, 2k+16, 2k+17. In a word with odd parity one element moves to a
    code of the other parity: the one that raises sum(w (v - code)^2) least. Here w is v^2 plus its
    mean. With v^2 alone, only the small weights of a block would move.
    """
    index = snap(v, _FOUR.snaps[book])
    odd = _ODD[index]
    even_code, odd_code = (snap(v, table) for table in _PARITY_SNAP[book])
    other = np.where(odd, even_code, odd_code)
    codes = CODEBOOKS[book]
    w = v * v + np.einsum("bi,bi->b", v, v)[:, None] / 32
    cost = ((v - codes[other]) ** 2 - (v - codes[index]) ** 2) * w
    words, others, costs = (_by_word(a) for a in (index, other, cost))
    broken = np.bitwise_xor.reduce(_ODD[words], axis=2) == 1
    cheapest = np.arange(4) == costs.argmin(axis=2)[:, :, None]
    fixed = np.where(cheapest & broken[:, :, None], others, words)
    return np.asarray(fixed.reshape(-1, 8, 2, 2).swapaxes(1, 2).reshape(-1, 32), np.uint8)


def _by_word(a: NDArray[Any]) -> NDArray[Any]:
    """(N, 32) -> (N, 8, 4): the elements of each IQ4_KSS word."""
    return a.reshape(-1, 2, 8, 2).swapaxes(1, 2).reshape(-1, 8, 4)


def _float32(d: Floats) -> Floats:
    return d


def _float16(d: Floats) -> Floats:
    return as_float(half(d))[:, 0]


def _row_scaled(x: Floats, coded: _Coded) -> tuple[Bytes, Bytes]:
    """Row header (rows, 4); scale bytes (rows, n / 32): the odd multiple + 127, with the book as
    its lowest bit."""
    header = coded.d.astype("<f4")[:, None].view(np.uint8)
    return header, (coded.multiples + 127).astype(np.uint8) | coded.book


def _iq4_ks(x: Floats) -> Bytes:
    coded = _encode(x, 32, _FOUR, _ODD_BYTE, _float32)
    header, scales = _row_scaled(x, coded)
    qs = pack_nibbles(coded.index).reshape(len(x), -1, 128)
    blocks = np.concatenate([scales.reshape(len(x), -1, 8), qs], axis=2)
    return np.hstack([header, blocks.reshape(len(x), -1)])


def _iq4_kss(x: Floats) -> Bytes:
    """See `decoders.unpack_kss`: v is the prefix XOR from the top bit of a word of even parity."""
    coded = _encode(x, 32, _FOUR, _ODD_BYTE, _float32, _even_snap)
    header, scales = _row_scaled(x, coded)
    v = pack_nibbles(coded.index).view("<u2")
    for shift in (1, 2, 4, 8):
        v = v ^ v >> shift
    bits = np.unpackbits(scales[:, :, None], axis=2, bitorder="little")
    return np.hstack([header, (v | bits).astype("<u2").view(np.uint8).reshape(len(x), -1)])


def _five_bits(index: Bytes) -> tuple[Bytes, Bytes]:
    """Codes of N superblocks -> qs (N, 128), qh (N, 32): see `decoders._five_bits`."""
    q = index.reshape(-1, 8, 32)
    qs = pack_nibbles((q & 15).reshape(-1, 4, 64)).reshape(-1, 128)
    return qs, np.packbits(q >> 4, axis=1, bitorder="little").reshape(-1, 32)


def _iq5_ks(x: Floats) -> Bytes:
    coded = _encode(x, 32, _FIVE, _ODD_BYTE, _float32)
    header, scales = _row_scaled(x, coded)
    blocks = np.hstack([scales.reshape(-1, 8), *_five_bits(coded.index)])
    return np.hstack([header, blocks.reshape(len(x), -1)])


def _sixteenths(x: Floats, code: _Code, multiples: _Multiples) -> tuple[_Coded, Bytes]:
    """Codes of superblocks of 16 sub-blocks, and the blocks' heads: fp16 d, and bits that say the
    codebooks."""
    coded = _encode(x.reshape(-1, 256), 16, code, multiples, _float16)
    extra = np.packbits(coded.book, axis=1, bitorder="little")
    return coded, np.hstack([half(coded.d), extra])


def _six_bit_scales(multiples: NDArray[np.int16]) -> tuple[Bytes, Bytes]:
    """(N, 16) -> high bits (N, 4), low bits (N, 8): see `decoders._six_bit_scales`."""
    u = (multiples + 32).astype(np.uint8)
    pairs = (u & 15).reshape(-1, 8, 2)
    fours = (u >> 4).reshape(-1, 4, 4) << np.arange(0, 8, 2, dtype=np.uint8)
    high: Bytes = np.bitwise_or.reduce(fours, axis=2)
    return high, pack_nibbles(pairs)[:, :, 0]


def _iq4_k(x: Floats) -> Bytes:
    coded, head = _sixteenths(x, _FOUR, _SIX_BITS)
    qs = pack_nibbles(coded.index.reshape(-1, 8, 32)).reshape(-1, 128)
    return np.hstack([head, *_six_bit_scales(coded.multiples), qs])


def _iq5_k(x: Floats) -> Bytes:
    coded, head = _sixteenths(x, _FIVE, _SIX_BITS)
    return np.hstack([head, *_six_bit_scales(coded.multiples), *_five_bits(coded.index)])


def _iq6_k(x: Floats) -> Bytes:
    coded, head = _sixteenths(x, _SIX, _BYTE)
    q = coded.index.reshape(-1, 8, 32)
    qs = pack_nibbles((q & 15).reshape(-1, 4, 64)).reshape(-1, 128)
    high = (q >> 4).reshape(-1, 2, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    qh = np.bitwise_or.reduce(high, axis=2).reshape(-1, 64)
    return np.hstack([head, coded.multiples.astype(np.int8).view(np.uint8), qs, qh])


IK_ENCODERS: dict[str, Callable[[Floats], Bytes]] = {
    "IQ4_K": _iq4_k,
    "IQ5_K": _iq5_k,
    "IQ6_K": _iq6_k,
    "IQ4_KS": _iq4_ks,
    "IQ4_KSS": _iq4_kss,
    "IQ5_KS": _iq5_ks,
}
