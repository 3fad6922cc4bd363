"""Writer of GGUF v3 files: first the header, then the tensors' data, in declared order."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.files import WholeFile
from deskside.gguf.header import ARRAY, DEFAULT_ALIGNMENT, MAGIC, MAX_DIMS, SCALARS, STRING, show
from deskside.gguf.quants import QuantType

_TYPE_ID = {dtype: code for code, dtype in SCALARS.items()}
# ggml's readers refuse longer names: GGML_MAX_NAME is 64 with the terminating zero.
_MAX_NAME_BYTES = 63


class GGUFWriter:
    """Context manager that writes a GGUF file under a temporary name and renames it at the end.

    First the disk must have room for all of it; `advice` tells how to need less.

    tensors: (name, type, shape in ggml order). Metadata values get these types: bool -> bool;
    int -> u32, or u64, i32, i64 if it does not fit; float -> f32; str -> string; list of str ->
    string array; NumPy array or scalar -> its own type; list of arrays or lists -> nested array.
    At the end of the block every byte must have been written. After an error no file remains.
    """

    def __init__(
        self,
        path: str | Path,
        metadata: Mapping[str, Any],
        tensors: Sequence[tuple[str, QuantType, tuple[int, ...]]],
        alignment: int = DEFAULT_ALIGNMENT,
        *,
        advice: str = "",
    ) -> None:
        self.path = Path(path)
        self._advice = advice
        if alignment <= 0 or alignment & (alignment - 1):
            raise DesksideError(f"{path}: alignment {alignment} is not a power of two")
        self._alignment = alignment
        meta = {key: value for key, value in metadata.items() if key != "general.alignment"}
        if alignment != DEFAULT_ALIGNMENT:
            meta["general.alignment"] = alignment
        self._names = [name for name, _, _ in tensors]
        self._left = [self._tensor_bytes(*tensor) for tensor in tensors]
        if len(set(self._names)) < len(self._names):
            twice = next(name for name in self._names if self._names.count(name) > 1)
            raise DesksideError(f"{path}: tensor {show(twice)} is declared twice")
        self._header = self._encode(meta, tensors)
        header = len(self._header) + -len(self._header) % alignment
        self.nbytes = header + sum(size + -size % alignment for size in self._left)
        self._current = 0
        self._file = WholeFile(self.path)

    def __enter__(self) -> GGUFWriter:
        self._file.target.need_room(self.nbytes, self._advice)
        try:
            self._file.open()
            self._put(self._header)
            self._pad()
        except BaseException:
            self._file.discard()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            self._file.discard()

    def write(self, name: str, chunk: bytes | bytearray | memoryview | NDArray[Any]) -> None:
        """Append bytes to tensor `name`, which must be the first unfinished one."""
        if isinstance(chunk, np.ndarray):
            chunk = np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data
        size = memoryview(chunk).nbytes
        expected = self._names[self._current] if self._current < len(self._names) else None
        if name != expected:
            raise DesksideError(f"{self.path}: data for {show(name)} came, {expected!r} is next")
        if size > self._left[self._current]:
            raise DesksideError(
                f"{self.path}: tensor {show(name)} got {size} bytes, "
                f"{self._left[self._current]} were still to come"
            )
        self._put(chunk)
        self._left[self._current] -= size
        if not self._left[self._current]:
            self._current += 1
            self._pad()

    def _tensor_bytes(self, name: str, t: QuantType, shape: tuple[int, ...]) -> int:
        what = f"{self.path}: tensor {show(name)}"
        if len(name.encode()) > _MAX_NAME_BYTES:
            raise DesksideError(f"{what} has a name of more than {_MAX_NAME_BYTES} bytes")
        if not 1 <= len(shape) <= MAX_DIMS or min(shape) < 1:
            raise DesksideError(f"{what} has the impossible shape {shape}")
        if shape[0] % t.block:
            raise DesksideError(
                f"{what}: rows of {shape[0]} weights do not fit {t.name} (blocks of {t.block})"
            )
        return t.row_bytes(shape[0]) * int(np.prod(shape[1:], dtype=object))

    def _encode(
        self,
        metadata: Mapping[str, Any],
        tensors: Sequence[tuple[str, QuantType, tuple[int, ...]]],
    ) -> bytes:
        out = [MAGIC, struct.pack("<IQQ", 3, len(tensors), len(metadata))]
        for key, value in metadata.items():
            code, payload = self._value(key, value)
            out += [_string(key), struct.pack("<I", code), payload]
        offset = 0
        for (name, t, shape), size in zip(tensors, self._left, strict=True):
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
            out += [_string(name), dims, struct.pack("<IQ", t.id, offset)]
            offset += size + -size % self._alignment
        return b"".join(out)

    def _value(self, key: str, value: Any) -> tuple[int, bytes]:
        """The GGUF type id and the bytes of a metadata value."""
        if isinstance(value, str):
            return STRING, _string(value)
        if isinstance(value, list | tuple):
            return ARRAY, self._list(key, value)
        if isinstance(value, np.ndarray) and value.ndim == 1:
            code = self._type_id(key, value.dtype)
            body = value.astype(SCALARS[code], copy=False).tobytes()
            return ARRAY, struct.pack("<IQ", code, value.size) + body
        scalar = value if isinstance(value, np.generic) else self._scalar(key, value)
        code = self._type_id(key, scalar.dtype)
        return code, scalar.astype(SCALARS[code]).tobytes()

    def _list(self, key: str, items: Sequence[Any]) -> bytes:
        if all(isinstance(item, str) for item in items):
            encoded = [_string(item) for item in items]
            return struct.pack("<IQ", STRING, len(items)) + b"".join(encoded)
        if all(isinstance(item, np.ndarray | list | tuple) for item in items):
            nested = [self._value(key, item)[1] for item in items]
            return struct.pack("<IQ", ARRAY, len(items)) + b"".join(nested)
        raise DesksideError(f"{self.path}: key {show(key)}: use a NumPy array for numbers")

    def _scalar(self, key: str, value: Any) -> np.generic:
        if isinstance(value, bool):
            return np.bool_(value)
        if isinstance(value, float):
            return np.float32(value)
        if isinstance(value, int):
            for kind in (np.uint32, np.uint64) if value >= 0 else (np.int32, np.int64):
                if np.iinfo(kind).min <= value <= np.iinfo(kind).max:
                    return kind(value)
        raise DesksideError(f"{self.path}: key {show(key)} cannot hold {value!r:.60}")

    def _type_id(self, key: str, dtype: np.dtype[Any]) -> int:
        code = _TYPE_ID.get(dtype.newbyteorder("<"))
        if code is None:
            raise DesksideError(f"{self.path}: key {show(key)}: GGUF has no {dtype} values")
        return code

    def _put(self, data: bytes | bytearray | memoryview) -> None:
        if not self._file.is_open:
            raise DesksideError(f"{self.path}: the writer is not open")
        self._file.write(data)

    def _pad(self) -> None:
        self._put(bytes(-self._file.tell() % self._alignment))

    def _finish(self) -> None:
        if self._current < len(self._names):
            raise DesksideError(
                f"{self.path}: tensor {show(self._names[self._current])} "
                f"is {self._left[self._current]} bytes short"
            )
        self._file.keep()


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw
