"""The log-probabilities of a run over a text, on disk: what another run is compared with.

Layout, little endian:

    "DESKLOGP"   8 bytes
    u32          version, 1
    u32          length of the header
    header       JSON, see `Header`
    i32          tokens (windows, ctx), a first token that bos replaced included
    rows         one for each scored position, window after window:
      f32        minus the log-probability of the token that follows in the text
      u32        the most likely token
      f32        step
      u16        codes (n_vocab,)

A row's log-probabilities are `step * code`, less the logarithm of the sum of their exponentials.
`step` spreads the codes over what lies between the least and the most likely token, at most
RANGE nats: whatever is less likely than exp(-RANGE) times the best is stored as that. Rounding to
a code moves a logarithm by step / 2, normalising by as much again, so a log-probability is within
`step` <= RANGE / 65535 = 0.001 nats. The divergence of the model itself from its own file is of
second order: at most step ** 2 / 8.
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
    """Where the rows come from.

    model       name of the file; `sha256` is of all its bytes, of a split's files one after another
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
    """Writes a file under a temporary name, and under its own once it is complete.

    A context manager; DesksideError, before anything is written, if the disk lacks the room or the
    name is that of a file which is something else.
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
        """Append rows: log-probabilities (n, n_vocab), and the tokens (n,) of the text."""
        rows = np.empty(len(logp), self.header.row)
        rows["nll"] = -logp[np.arange(len(logp)), targets]
        rows["top"] = logp.argmax(axis=1)
        above = logp - logp.max(axis=1, keepdims=True) + RANGE
        # Only differences count, so the least likely token that is told apart has code 0.
        above -= np.maximum(above.min(axis=1, keepdims=True), 0)
        np.maximum(above, 0, out=above)
        # As it is read back; a row without differences has nothing to divide.
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
    """A file, mapped: `tokens` int32 (windows, ctx), `rows` with the fields of the layout."""

    path: Path
    header: Header
    tokens: NDArray[np.int32]
    rows: NDArray[np.void]

    @classmethod
    def open(cls, path: Path) -> LogProbs:
        """DesksideError for a file that is something else, damaged or cut short."""
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
            raise DesksideError(f"{path}: has {size} bytes, its header says {expected}: cut short?")
        tokens = np.memmap(path, "<i4", "r", at, shape)
        rows = np.memmap(path, header.row, "r", at + tokens.nbytes, (header.rows,))
        return cls(path, header, tokens, rows)

    def log_probs(self, start: int, end: int) -> Doubles:
        """Log-probabilities (end - start, n_vocab) of rows, normalised."""
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
