"""Reads the header of one GGUF file, version 2 or 3: keys and tensors, nothing trusted.

Layout, little endian:

    file    "GGUF", u32 version, u64 tensor count, u64 key count, keys, tensors
    key     name (u64 length + bytes), u32 type, value
    tensor  name, u32 number of dimensions, u64 ne[] (ne[0], the row length, varies fastest),
            u32 type, u64 offset into the data section

The data section starts at the next multiple of `general.alignment`. Every count and length is
checked against the bytes left before anything is allocated.
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deskside.errors import DesksideError
from deskside.gguf.interleave import INTERLEAVED, Interleave
from deskside.gguf.quants import TYPES, UNSUPPORTED, QuantType

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
# Value types of the metadata: the NumPy dtype of each scalar, and the two that have none.
SCALARS: dict[int, np.dtype[Any]] = {
    code: np.dtype(name)
    for code, name in {
        0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4",
        6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
    }.items()
}  # fmt: skip
STRING, ARRAY = 8, 9
_MAX_NESTING = 8
_MIN_KEY_BYTES = 8 + 4 + 1
_MIN_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies. shape: in ggml order. offset: absolute, in the file `path`.

    A tensor may be rows of another: source is that one's name, and stride the bytes from one matrix
    (of an expert) to the next where the other's rows lie between them, else 0.

    interleaved: how the file mixes the rows of `type`, if it does. `GGUF.raw` has them plain; who
    reads the file itself takes them apart with it.
    """

    name: str
    type: QuantType
    shape: tuple[int, ...]
    path: Path
    offset: int
    interleaved: Interleave | None = None
    source: str = ""
    stride: int = 0

    @property
    def row_len(self) -> int:
        return self.shape[0]

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        return self.type.row_bytes(self.row_len)

    @property
    def nbytes(self) -> int:
        return self.n_rows * self.row_bytes

    @property
    def n_matrices(self) -> int:
        return math.prod(self.shape[2:])

    @property
    def matrix_bytes(self) -> int:
        return math.prod(self.shape[1:2]) * self.row_bytes

    @property
    def matrix_stride(self) -> int:
        """Bytes from one matrix to the next."""
        return self.stride or self.matrix_bytes

    def rows(self, name: str, first: int, n: int) -> TensorInfo:
        """Rows `first` to `first + n` of each matrix, as a tensor `name`. DesksideError where the
        file mixes them with others."""
        if self.interleaved and (first % self.interleaved.rows or n % self.interleaved.rows):
            raise DesksideError(
                f"{self.path}: tensor {show(self.name)} mixes {self.interleaved.rows} rows, so its "
                f"rows {first} to {first + n} cannot be told apart"
            )
        return replace(
            self,
            name=name,
            shape=(self.row_len, n, *self.shape[2:]),
            offset=self.offset + first * self.row_bytes,
            source=self.name,
            stride=self.matrix_stride if self.n_matrices > 1 else 0,
        )


def show(name: str) -> str:
    """A name from a file, quoted on one line and shortened for an error message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


class Truncated(DesksideError):
    """The bytes end before the header does: more of the file may mend it."""


class Unusable(DesksideError):
    """A tensor that cannot be read; the rest of its file can."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(reason)
        self.name = name


class Cursor:
    """Reads values off a buffer; every read is checked against the bytes left in `path`.

    lenient: bytes of strings that are no UTF-8 become lone surrogates; else they are an error.
    """

    lenient = False

    def __init__(self, buffer: mmap.mmap, path: Path) -> None:
        self.view = memoryview(buffer)
        self.path = path
        self.pos = 0

    @property
    def left(self) -> int:
        return len(self.view) - self.pos

    def fail(self, reason: str) -> DesksideError:
        return DesksideError(f"{self.path}: {reason}")

    def short(self, reason: str) -> Truncated:
        return Truncated(f"{self.path}: {reason}")

    def take(self, size: int, what: str) -> memoryview:
        if size > self.left:
            raise self.short(
                f"{what} needs {size} bytes at {self.pos}, but only {self.left} remain"
            )
        self.pos += size
        return self.view[self.pos - size : self.pos]

    def u32(self, what: str) -> int:
        return int(struct.unpack("<I", self.take(4, what))[0])

    def u64(self, what: str) -> int:
        return int(struct.unpack("<Q", self.take(8, what))[0])

    def count(self, what: str, min_bytes: int) -> int:
        """A u64 number of items of `min_bytes` or more each."""
        n = self.u64(what)
        if n * min_bytes > self.left:
            raise self.short(f"{what} is {n}, more than the remaining {self.left} bytes can hold")
        return n

    def string(self, what: str) -> str:
        raw = self.take(self.u64(what), what)
        try:
            return str(raw, "utf-8")
        except UnicodeDecodeError:
            if self.lenient:
                return str(raw, "utf-8", "surrogateescape")
            raise self.fail(f"{what} is not valid UTF-8: {bytes(raw[:40])!r}") from None

    def strings(self, n: int, what: str) -> list[str]:
        """`string` n times, in a fast loop: vocabularies have 250,000 entries."""
        view, end, pos = self.view, len(self.view), self.pos
        errors = "surrogateescape" if self.lenient else "strict"
        unpack = struct.Struct("<Q").unpack_from
        out: list[str] = []
        try:
            for _ in range(n):
                start = pos + 8
                pos = start + unpack(view, pos)[0]
                if pos > end:
                    break
                out.append(str(view[start:pos], "utf-8", errors))
        except struct.error:
            pos = end + 1
        except UnicodeDecodeError:
            raise self.fail(f"item {len(out)} of {what} is not valid UTF-8") from None
        if pos > end:
            raise self.short(f"the file ends within item {len(out)} of {what}")
        self.pos = pos
        return out

    def value(self, kind: int, what: str) -> Any:
        if kind == STRING:
            return self.string(what)
        if kind == ARRAY:
            return self.array(what, 1)
        dtype = SCALARS.get(kind)
        if dtype is None:
            raise self.fail(f"{what} has the unknown value type {kind}")
        return np.frombuffer(self.take(dtype.itemsize, what), dtype)[0].item()

    def array(self, what: str, depth: int) -> Any:
        kind = self.u32(what)
        if kind == STRING:
            return self.strings(self.count(f"the length of {what}", 8), what)
        if kind == ARRAY:
            if depth == _MAX_NESTING:
                raise self.fail(f"{what} nests arrays more than {_MAX_NESTING} deep")
            n = self.count(f"the length of {what}", 12)
            return [self.array(what, depth + 1) for _ in range(n)]
        dtype = SCALARS.get(kind)
        if dtype is None:
            raise self.fail(f"{what} has the unknown array element type {kind}")
        n = self.count(f"the length of {what}", dtype.itemsize)
        raw = self.take(n * dtype.itemsize, what)
        if dtype == np.bool_:
            return np.frombuffer(raw, np.uint8) != 0
        return np.frombuffer(raw, dtype).copy()


@dataclass
class Header:
    """One file: its keys and tensors, validated against its own size.

    unusable: why tensors cannot be read, by name: it matters to those who need them only. odd:
    text of `metadata` that is not UTF-8, with lone surrogates for its bytes.
    """

    path: Path
    map: mmap.mmap
    metadata: dict[str, Any]
    types: dict[str, int]
    tensors: list[TensorInfo]
    unusable: dict[str, DesksideError] = field(default_factory=dict)
    odd: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path, *, complete: bool = True) -> Header:
        """complete: the file must hold the tensors' data too; False needs the header only."""
        mapped = _map(path)
        at = Cursor(mapped, path)
        if at.left < 24 or at.take(4, "the magic") != MAGIC:
            raise at.fail("this is not a GGUF file (it does not start with a GGUF header)")
        version = at.u32("the version")
        if version & 0xFFFF == 0:
            raise at.fail("this is a big-endian GGUF file; deskside reads little-endian ones")
        if version not in (2, 3):
            raise at.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        n_tensors = at.u64("the tensor count")
        n_keys = at.count("the number of keys", _MIN_KEY_BYTES)
        if n_tensors * _MIN_TENSOR_BYTES > at.left:
            raise at.short(f"the tensor count is {n_tensors}, more than the file can hold")
        metadata: dict[str, Any] = {}
        types: dict[str, int] = {}
        odd: dict[str, Any] = {}
        for i in range(n_keys):
            key = at.string(f"the name of key {i}")
            if key in metadata:
                raise at.fail(f"key {show(key)} appears twice")
            types[key] = at.u32(f"the type of key {show(key)}")
            # Token and template texts are computed with, descriptions are not.
            at.lenient = not key.startswith("tokenizer.")
            value = at.value(types[key], f"key {show(key)}")
            metadata[key] = _well_formed(value) if at.lenient else value
            if metadata[key] is not value:
                odd[key] = value
            at.lenient = False
        entries = [_entry(at, i) for i in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise at.fail(f"general.alignment is {alignment!r:.40}, not a power of two")
        data_start = -(-at.pos // alignment) * alignment
        tensors: list[TensorInfo] = []
        unusable: dict[str, DesksideError] = {}
        seen: set[str] = set()
        for entry in entries:
            if entry.name in seen:
                raise at.fail(f"tensor {show(entry.name)} appears twice")
            seen.add(entry.name)
            try:
                info = _tensor_info(at, entry)
                tensors.append(_placed(at, info, data_start, alignment, complete))
            except Unusable as reason:
                unusable[reason.name] = reason
        unusable |= _overlaps(at, tensors)
        tensors = [t for t in tensors if t.name not in unusable]
        return cls(path, mapped, metadata, types, tensors, unusable, odd)

    def split_count(self) -> int:
        return self._split_key("split.count") or 1

    def expect_shard(self, no: int, count: int) -> None:
        for key, wanted in (("split.count", count), ("split.no", no)):
            found = self._split_key(key)
            if found != wanted:
                raise DesksideError(
                    f"{self.path}: {key} is {found}, but by its name it should be {wanted}"
                )

    def _split_key(self, key: str) -> int | None:
        value = self.metadata.get(key)
        if value is not None and type(value) is not int:
            raise DesksideError(f"{self.path}: {key} must be a whole number")
        return value


def _map(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "the file is empty"
        raise DesksideError(f"{path}: cannot be read: {reason}") from None


def _well_formed(value: Any) -> Any:
    """Text with U+FFFD for lone surrogates; the same object where there are none."""
    if isinstance(value, list):
        texts = [_well_formed(item) for item in value]
        return value if all(a is b for a, b in zip(texts, value, strict=True)) else texts
    if not isinstance(value, str) or value.isascii():
        return value
    text = value.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    return value if text == value else text


class _Entry(NamedTuple):
    """A tensor as the header lists it; `offset` is relative to the data section."""

    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


def _entry(at: Cursor, i: int) -> _Entry:
    at.lenient = True
    name = _well_formed(at.string(f"the name of tensor {i}"))
    at.lenient = False
    what = f"tensor {show(name)}"
    n_dims = at.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise at.fail(f"{what} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = struct.unpack(f"<{n_dims}Q", at.take(8 * n_dims, what))
    return _Entry(name, shape, at.u32(what), at.u64(what))


def _unusable(at: Cursor, name: str, reason: str) -> Unusable:
    return Unusable(name, f"{at.path}: tensor {show(name)} {reason}")


def _tensor_info(at: Cursor, entry: _Entry) -> TensorInfo:
    """`offset` is still relative to the data section. Unusable where it cannot be read."""
    name, shape, kind, offset = entry
    if 0 in shape or math.prod(shape) >= 1 << 63:
        raise _unusable(at, name, f"has the impossible shape {shape}")
    if kind in UNSUPPORTED:
        reason = f"has type {UNSUPPORTED[kind]} (id {kind}), which is not supported"
        raise _unusable(at, name, reason)
    interleaved = INTERLEAVED.get(kind)
    t = interleaved.type if interleaved else TYPES.get(kind)
    if t is None:
        raise _unusable(at, name, f"has the unknown type id {kind}")
    if shape[0] % t.block:
        raise _unusable(
            at,
            name,
            f"has rows of {shape[0]} weights, not a multiple of the "
            f"{t.block} weights of a {t.name} block",
        )
    if interleaved and not interleaved.fits(shape[0], math.prod(shape[1:2])):
        raise _unusable(
            at,
            name,
            f"has {math.prod(shape[1:2])} rows of {shape[0]} weights, which "
            f"{interleaved.name} cannot hold: it mixes {interleaved.rows} rows",
        )
    return TensorInfo(name, t, shape, at.path, offset, interleaved)


def _placed(
    at: Cursor, info: TensorInfo, data_start: int, alignment: int, complete: bool
) -> TensorInfo:
    """Make the offset absolute. A tensor of a `complete` file must lie within it."""
    if info.offset % alignment:
        reason = f"has offset {info.offset}, not a multiple of the alignment {alignment}"
        raise _unusable(at, info.name, reason)
    start, size = data_start + info.offset, len(at.view)
    if complete and start + info.nbytes > size:
        raise at.fail(
            f"tensor {show(info.name)} ends at byte {start + info.nbytes}, but the file "
            f"has {size} bytes: it is truncated or damaged, fetch it again"
        )
    return replace(info, offset=start)


def _overlaps(at: Cursor, tensors: list[TensorInfo]) -> dict[str, DesksideError]:
    """Why tensors that share bytes are unusable: at least one of them is not what it seems."""
    found: dict[str, DesksideError] = {}
    ordered = sorted(tensors, key=lambda t: t.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            reason = at.fail(f"tensors {show(before.name)} and {show(after.name)} overlap")
            found[before.name] = found[after.name] = reason
    return found
