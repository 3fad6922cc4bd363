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
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from deskside.errors import DesksideError
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
    """Where a tensor lies. shape: in ggml order. offset: absolute, in the file `path`."""

    name: str
    type: QuantType
    shape: tuple[int, ...]
    path: Path
    offset: int

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


def show(name: str) -> str:
    """A name from a file, quoted on one line and shortened for an error message."""
    return repr(name if len(name) <= 80 else name[:77] + "...")


class Truncated(DesksideError):
    """The bytes end before the header does: more of the file may mend it."""


class Cursor:
    """Reads values off a buffer; every read is checked against the bytes left in `path`."""

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
            raise self.fail(f"{what} is not valid UTF-8: {bytes(raw[:40])!r}") from None

    def strings(self, n: int, what: str) -> list[str]:
        """`string` n times, in a fast loop: vocabularies have 250,000 entries."""
        view, end, pos = self.view, len(self.view), self.pos
        unpack = struct.Struct("<Q").unpack_from
        out: list[str] = []
        try:
            for _ in range(n):
                start = pos + 8
                pos = start + unpack(view, pos)[0]
                if pos > end:
                    break
                out.append(str(view[start:pos], "utf-8"))
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
    """One file: its keys and tensors, validated against its own size."""

    path: Path
    map: mmap.mmap
    metadata: dict[str, Any]
    types: dict[str, int]
    tensors: list[TensorInfo]

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
        for i in range(n_keys):
            key = at.string(f"the name of key {i}")
            if key in metadata:
                raise at.fail(f"key {show(key)} appears twice")
            types[key] = at.u32(f"the type of key {show(key)}")
            metadata[key] = at.value(types[key], f"key {show(key)}")
        infos = [_tensor_info(at, i) for i in range(n_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
            raise at.fail(f"general.alignment is {alignment!r:.40}, not a power of two")
        data_start = -(-at.pos // alignment) * alignment
        tensors = [_placed(at, info, data_start, alignment, complete) for info in infos]
        _check_names_and_overlap(at, tensors)
        return cls(path, mapped, metadata, types, tensors)

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


def _tensor_info(at: Cursor, i: int) -> TensorInfo:
    """Read one entry; `offset` is still relative to the data section."""
    name = at.string(f"the name of tensor {i}")
    what = f"tensor {show(name)}"
    n_dims = at.u32(what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise at.fail(f"{what} has {n_dims} dimensions; 1 to {MAX_DIMS} are possible")
    shape = struct.unpack(f"<{n_dims}Q", at.take(8 * n_dims, what))
    if 0 in shape or math.prod(shape) >= 1 << 63:
        raise at.fail(f"{what} has the impossible shape {shape}")
    kind, offset = at.u32(what), at.u64(what)
    if kind in UNSUPPORTED:
        raise at.fail(f"{what} has type {UNSUPPORTED[kind]} (id {kind}), which is not supported")
    if kind not in TYPES:
        raise at.fail(f"{what} has the unknown type id {kind}")
    if shape[0] % TYPES[kind].block:
        raise at.fail(
            f"{what} has rows of {shape[0]} weights, not a multiple of the "
            f"{TYPES[kind].block} weights of a {TYPES[kind].name} block"
        )
    return TensorInfo(name, TYPES[kind], shape, at.path, offset)


def _placed(
    at: Cursor, info: TensorInfo, data_start: int, alignment: int, complete: bool
) -> TensorInfo:
    """Make the offset absolute. A tensor of a `complete` file must lie within it."""
    if info.offset % alignment:
        raise at.fail(
            f"tensor {show(info.name)} has offset {info.offset}, "
            f"not a multiple of the alignment {alignment}"
        )
    start, size = data_start + info.offset, len(at.view)
    if complete and start + info.nbytes > size:
        raise at.fail(
            f"tensor {show(info.name)} ends at byte {start + info.nbytes}, but the file "
            f"has {size} bytes: it is truncated or damaged, fetch it again"
        )
    return TensorInfo(info.name, info.type, info.shape, info.path, start)


def _check_names_and_overlap(at: Cursor, tensors: list[TensorInfo]) -> None:
    seen: set[str] = set()
    for t in tensors:
        if t.name in seen:
            raise at.fail(f"tensor {show(t.name)} appears twice")
        seen.add(t.name)
    ordered = sorted(tensors, key=lambda t: t.offset)
    for before, after in pairwise(ordered):
        if before.offset + before.nbytes > after.offset:
            raise at.fail(f"tensors {show(before.name)} and {show(after.name)} overlap")
