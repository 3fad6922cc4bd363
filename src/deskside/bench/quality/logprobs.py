"""Files with the log-probabilities of a run over a text, to compare another run with.

Layout, little endian:

    "DESKLOGP"   8 bytes
    u32          version, 1
    u32          length of the header
    header       JSON, see `Header`
    i32          tokens (windows, ctx), with bos where it replaced a first token
    rows         one for each scored position, window after window:
      f32        minus the log-probability of the token that follows in the text
      u32        the most likely token
      f32        step
      u16        codes (n_vocab,)

A row's log-probabilities are `step * code`, minus the logarithm of the sum of their exponentials.
The codes span the range from the least to the most likely token, at most RANGE nats. A token less
likely than exp(-RANGE) times the best is stored as that limit.

Rounding to a code changes a logarithm by at most step / 2, and normalising by as much again. So
the error of a log-probability is at most `step` <= RANGE / 65535 = 0.001 nats. The divergence of a
model from its own file is of second order: at most step ** 2 / 8.
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any, Self

import msgspec
import numpy as np
from msgspec import Meta, Struct
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.files import WholeFile

MAGIC = b"DESKLOGP"
VERSION = 1
RANGE = 64.0
_CODES = 65535
_PREFIX = struct.Struct("<8sII")
_MAX_HEADER = 1 << 20

Doubles = NDArray[np.float64]


Count = Annotated[int, Meta(ge=1)]


class Header(Struct, frozen=True, forbid_unknown_fields=True):
    """The source of the rows.

    model       name of the model file
    sha256      of all bytes of the model; for a split model, of its files one after another
    vocabulary  SHA-256 of the tokens' spellings
    first       position of a window's first row; a window has ctx - 1 - first rows
    settings    options of the engine, as used
    """

    model: str
    sha256: str
    vocabulary: str
    n_vocab: Count
    ctx: Count
    windows: Count
    first: Count
    text: str
    deskside: str
    settings: dict[str, Any] = {}

    @property
    def rows(self) -> int:
        return self.windows * (self.ctx - 1 - self.first)

    @property
    def row(self) -> np.dtype[Any]:
        codes = ("codes", "<u2", (self.n_vocab,))
        return np.dtype([("nll", "<f4"), ("top", "<u4"), ("step", "<f4"), codes])

    @property
    def row_bytes(self) -> int:
        return 12 + 2 * self.n_vocab

    def encoded(self) -> bytes:
        return json.dumps(msgspec.to_builtins(self)).encode()

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        tokens = 4 * self.windows * self.ctx
        return _PREFIX.size + len(self.encoded()) + tokens + self.rows * self.row_bytes


class LogProbWriter:
    """A context manager that writes a file under a temporary name, and renames it when complete.

    DesksideError, before anything is written, if the disk is too full, or if another kind of file
    has this name.
    """

    def __init__(self, path: Path, header: Header, tokens: NDArray[np.int32]) -> None:
        self.path = path
        self.header = header
        self._file = WholeFile(path)
        target = self._file.target
        try:
            other = target.is_plain and path.exists() and _beginning(path) != MAGIC
        except OSError as error:
            raise target.failure(error) from None
        if other:
            raise DesksideError(
                f"{path}: exists, and --save-logits did not write it; name another file"
            )
        target.need_room(header.nbytes, "score fewer windows (--chunks)")
        self._tokens = tokens
        self._left = header.rows

    def __enter__(self) -> Self:
        text = self.header.encoded()
        try:
            self._file.open()
            self._file.write(_PREFIX.pack(MAGIC, VERSION, len(text)) + text)
            self._file.write(self._tokens.astype("<i4").tobytes())
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
                if self._left:
                    raise DesksideError(f"{self.path}: {self._left} rows were never written")
                self._file.keep()
        finally:
            self._file.discard()

    def write(self, logp: Doubles, targets: NDArray[np.int32]) -> None:
        """Append n rows. logp: (n, n_vocab), in nats. targets: (n,), the tokens of the text."""
        rows = np.empty(len(logp), self.header.row)
        rows["nll"] = -logp[np.arange(len(logp)), targets]
        rows["top"] = logp.argmax(axis=1)
        above = logp - logp.max(axis=1, keepdims=True) + RANGE
        # Only differences count. So code 0 is the least likely token, or the limit of RANGE.
        above -= np.maximum(above.min(axis=1, keepdims=True), 0)
        np.maximum(above, 0, out=above)
        # float32, as it is read back. Avoid 0 / 0 in a row without differences.
        rows["step"] = above.max(axis=1) / _CODES
        step = rows["step"].astype(np.float64)
        step[step == 0] = 1
        rows["codes"] = np.minimum(np.rint(above / step[:, None]), _CODES)
        self._left -= len(rows)
        if not self._file.is_open or self._left < 0:
            raise ValueError("the file is not open, or has all its rows")
        self._file.write(rows.tobytes())


def _beginning(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(len(MAGIC))


@dataclass(frozen=True)
class LogProbs:
    """A mapped file. tokens: int32 (windows, ctx). rows: records with the fields of the layout."""

    path: Path
    header: Header
    tokens: NDArray[np.int32]
    rows: NDArray[np.void]

    @classmethod
    def open(cls, path: Path) -> LogProbs:
        """Map a file. DesksideError if it is another kind of file, damaged or truncated."""
        try:
            size = path.stat().st_size
            with path.open("rb") as file:
                prefix = file.read(_PREFIX.size)
                if len(prefix) < _PREFIX.size or prefix[:8] != MAGIC:
                    raise DesksideError(f"{path}: not a file that --save-logits wrote")
                _, version, length = _PREFIX.unpack(prefix)
                if version != VERSION:
                    raise DesksideError(
                        f"{path}: version {version}; this deskside reads version {VERSION}"
                    )
                header = _header(file.read(min(length, _MAX_HEADER)), path)
        except OSError as error:
            raise DesksideError(f"{path}: cannot be read: {error.strerror}") from None
        at = _PREFIX.size + length
        shape = (header.windows, header.ctx)
        expected = at + 4 * header.windows * header.ctx + header.rows * header.row_bytes
        if size != expected:
            raise DesksideError(
                f"{path}: has {size} bytes, its header says {expected}: is it truncated?"
            )
        tokens = np.memmap(path, "<i4", "r", at, shape)
        rows = np.memmap(path, header.row, "r", at + tokens.nbytes, (header.rows,))
        return cls(path, header, tokens, rows)

    def log_probs(self, start: int, end: int) -> Doubles:
        """Normalised log-probabilities (end - start, n_vocab) of rows, in nats."""
        rows = self.rows[start:end]
        logp: Doubles = rows["codes"] * rows["step"].astype(np.float64)[:, None]
        peak = logp.max(axis=1, keepdims=True)
        logp -= peak + np.log(np.exp(logp - peak).sum(axis=1, keepdims=True))
        return logp


def _header(raw: bytes, path: Path) -> Header:
    try:
        header = msgspec.json.decode(raw, type=Header)
    except (ValueError, RecursionError) as failure:
        raise DesksideError(f"{path}: the header is damaged: {failure}") from None
    if header.first > header.ctx - 2:
        raise DesksideError(f"{path}: the header is damaged: a window has no rows")
    return header
