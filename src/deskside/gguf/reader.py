"""Reader of GGUF models: one file or a split, memory-mapped. `header.py` has the layout."""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.gguf.header import SCALARS, Header, TensorInfo, show
from deskside.gguf.quants import dequantize, non_finite_rows

__all__ = ["GGUF", "TensorInfo"]

T = TypeVar("T")

_CHECK_BYTES = 1 << 24
_SHARD = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)


@dataclass
class GGUF:
    """Metadata and tensors of a model.

    metadata: Python scalars, NumPy arrays of numbers or booleans, and lists of strings.
    types: the GGUF type id of every key's value. unusable: why other tensors cannot be read, by
    name: no reason to refuse a file to those who do not need them.
    """

    path: Path
    paths: list[Path] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    types: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, TensorInfo] = field(default_factory=dict)
    unusable: dict[str, DesksideError] = field(default_factory=dict)
    _odd: dict[str, Any] = field(default_factory=dict, repr=False)
    _maps: dict[Path, mmap.mmap] = field(default_factory=dict, repr=False)
    _read: dict[str, NDArray[np.uint8]] = field(default_factory=dict, repr=False)
    # The interleaved tensor that was read last, in plain rows: callers ask piece by piece.
    _plain: tuple[str, NDArray[np.uint8]] | None = field(default=None, repr=False)

    @classmethod
    def open(cls, path: str | Path, *, complete: bool = True) -> GGUF:
        """Open a file, or a whole split by the name of any shard. DesksideError for a bad file.

        complete=False needs the headers only, for a file that is still downloading.
        """
        path = Path(path)
        named = Header.read(path, complete=complete)
        count = named.split_count()
        model = cls(path)
        if count <= 1:
            model._add(named)
            return model
        shard = _SHARD.fullmatch(path.name)
        if shard is None or int(shard["count"]) != count:
            raise DesksideError(
                f"{path}: split.count is {count}, so its name must end in -NNNNN-of-{count:05}.gguf"
            )
        for no in range(count):
            file = path.with_name(f"{shard['stem']}-{no + 1:05}-of-{count:05}.gguf")
            if not os.path.exists(file):
                raise DesksideError(f"{file}: shard {no + 1} of {count} is missing")
            header = named if file == path else Header.read(file, complete=complete)
            header.expect_shard(no, count)
            model._add(header)
        declared = model.metadata.get("split.tensors.count")
        found = len(model.tensors) + len(model.unusable)
        if declared is not None and declared != found:
            raise DesksideError(
                f"{path}: split.tensors.count is {declared}, "
                f"but the {count} shards hold {found} tensors"
            )
        return model

    def _add(self, header: Header) -> None:
        """Add a shard. If several shards have a key, the first shard's value counts."""
        self.paths.append(header.path)
        self._maps[header.path] = header.map
        self.metadata = header.metadata | self.metadata
        self.types = header.types | self.types
        self._odd = header.odd | self._odd
        names = [t.name for t in header.tensors] + list(header.unusable)
        for name in names:
            if name in self.tensors or name in self.unusable:
                raise DesksideError(f"{header.path}: tensor {show(name)} appears twice")
        self.tensors |= {t.name: t for t in header.tensors}
        self.unusable |= header.unusable

    def tensor(self, name: str) -> TensorInfo:
        """The tensor called `name`. DesksideError if it is missing or cannot be read."""
        info = self.tensors.get(name)
        if info is None:
            missing = DesksideError(f"{self.path}: tensor {show(name)} is missing")
            raise self.unusable.get(name, missing)
        return info

    def raw(self, tensor: str | TensorInfo) -> NDArray[np.uint8]:
        """The stored bytes: uint8 (n_rows, row_bytes), read-only.

        A view of the mapped file, or of memory after `read_in`. Rows that do not follow each other
        are copied; interleaved rows are copied as plain ones.
        """
        t = self.tensor(tensor) if isinstance(tensor, str) else tensor
        if t.name in self._read:
            return self._read[t.name]
        data = self._stored(t)
        if t.interleaved is None:
            return data.reshape(t.n_rows, t.row_bytes)
        last = self._plain
        if last is None or last[0] != t.name:
            last = t.name, t.interleaved.plain(data.reshape(t.n_rows, t.row_bytes))
            last[1].flags.writeable = False
            self._plain = last
        return last[1]

    def matrices(self, tensor: str | TensorInfo) -> NDArray[np.uint8]:
        """As `raw`, but (matrices, rows, row_bytes), and a view of the mapped file also where other
        rows lie between the matrices."""
        t = self.tensor(tensor) if isinstance(tensor, str) else tensor
        if t.interleaved is None and t.name not in self._read:
            return self._stored(t)
        return self.raw(t).reshape(t.n_matrices, -1, t.row_bytes)

    def _stored(self, t: TensorInfo) -> NDArray[np.uint8]:
        n, rows = t.n_matrices, t.matrix_bytes // t.row_bytes
        whole = (n - 1) * t.matrix_stride + t.matrix_bytes
        flat = np.frombuffer(self._maps[t.path], np.uint8, whole, t.offset)
        steps = (t.matrix_stride, t.row_bytes, 1)
        return as_strided(flat, (n, rows, t.row_bytes), steps, writeable=False)

    def read_in(self, tensors: Iterable[str | TensorInfo]) -> None:
        """Read these tensors into memory. `raw` returns that memory from now on."""
        for tensor in tensors:
            held = self.raw(tensor).copy()
            held.flags.writeable = False
            self._read[tensor if isinstance(tensor, str) else tensor.name] = held

    def dequantized(self, tensor: str | TensorInfo) -> NDArray[np.float32]:
        """All weights as float32, in NumPy order: shape = reversed(ne)."""
        t = self.tensor(tensor) if isinstance(tensor, str) else tensor
        return dequantize(self.raw(t), t.type, t.row_len).reshape(t.shape[::-1])

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default`."""
        return self.metadata.get(key, default)

    def require(self, key: str, kind: type[T]) -> T:
        """The value of `key` as `kind` (int, float, bool, str, list or numpy.ndarray).

        A float may be stored as a whole number. DesksideError names file and key if the key is
        missing or has another type.
        """
        if key not in self.metadata:
            raise DesksideError(f"{self.path}: key {show(key)} is missing")
        value = self.metadata[key]
        if kind is float and type(value) is int:
            value = float(value)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise DesksideError(
                f"{self.path}: key {show(key)} must be {kind.__name__}, "
                f"but it holds {type(value).__name__}"
            )
        return value

    def typed_metadata(self) -> dict[str, Any]:
        """`metadata` for `GGUFWriter`, with NumPy scalars of the file's types, and text as it is
        in the file: lone surrogates stand for bytes that are not UTF-8."""
        return {
            key: SCALARS[self.types[key]].type(value) if self.types[key] in SCALARS else value
            for key, value in (self.metadata | self._odd).items()
        }

    def check_values(self, tensors: Iterable[str | TensorInfo] | None = None) -> None:
        """Search float tensors and the scales of quantised ones for NaN and Inf.

        Reads all tensors, or those given, in chunks of bounded size. DesksideError names file,
        tensor and row of the first one found.
        """
        for tensor in self.tensors if tensors is None else tensors:
            t = self.tensor(tensor) if isinstance(tensor, str) else tensor
            step = max(1, _CHECK_BYTES // t.row_bytes)
            for number, matrix in enumerate(self.matrices(t)):
                for start in range(0, len(matrix), step):
                    bad = non_finite_rows(matrix[start : start + step], t.type)
                    if bad.size:
                        raise _not_finite(t, number * len(matrix) + start + int(bad[0]))


def _not_finite(t: TensorInfo, row: int) -> DesksideError:
    what = "value" if t.type.block == 1 else "scale"
    return DesksideError(
        f"{t.path}: tensor {show(t.name)} ({t.type.name}), row {row}: "
        f"a {what} is NaN or Inf; the file is damaged or was quantised wrongly"
    )
