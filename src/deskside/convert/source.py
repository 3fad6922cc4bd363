"""The two ends of a conversion: a checkpoint's config, read with care, and the tensors to write."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.convert.checkpoint import Checkpoint
from deskside.errors import DesksideError

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

# Not part of the text model, or derived from the config.
_SKIPPED = re.compile(r"(model\.)?visual\.|.*\.rotary_emb\.inv_freq$")
_PREFIXES = re.compile(r"^(model\.language_model\.|language_model\.model\.)")


@dataclass(frozen=True)
class Output:
    """One GGUF tensor: the rows of `parts` (2-D views of the checkpoint), stacked.

    `rows()` reorders the rows of a single part, `cols()` the columns, `apply` maps the values.
    `shape` is in ggml order. Tensors that are not `narrow` are F32 whatever the output type.
    """

    name: str
    shape: tuple[int, ...]
    parts: Sequence[NDArray[Any]]
    narrow: bool = True
    rows: Callable[[], Indices] | None = None
    cols: Callable[[], Indices] | None = None
    apply: Callable[[Floats], Floats] | None = None


class Config:
    """config.json's text part, with checked access."""

    def __init__(self, path: Path, values: dict[str, Any]) -> None:
        self.path = path
        nested = values.get("text_config")
        nested = nested if isinstance(nested, dict) else {}
        self.values: dict[str, Any] = {**values, **nested}
        self.tied = any(v.get("tie_word_embeddings") for v in (values, nested))
        # Older configs keep rope_theta, rope_scaling and partial_rotary_factor at the top.
        rope = self.values.get("rope_parameters") or self.values.get("rope_scaling") or {}
        if not isinstance(rope, dict):
            raise self.bad("rope_parameters", "must be an object")
        self.rope: dict[str, Any] = {
            key: self.values[key]
            for key in ("rope_theta", "partial_rotary_factor")
            if self.values.get(key) is not None
        } | rope

    def whole(self, key: str, default: int | None = None) -> int:
        """A whole number >= 1 that fits the u32 of GGUF's hyper-parameters."""
        value = self.values.get(key)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value < 2**32:
            raise self.bad(key, f"is {value!r}; expected a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return self._number(self.values, key, default)

    def rope_number(self, key: str, default: float | None = None) -> float:
        return self._number(self.rope, key, default)

    def must(self, key: str, *allowed: object) -> None:
        """Refuse a variant that the GGUF architecture cannot express; absent keys are fine."""
        if key in self.values and self.values[key] not in allowed:
            raise self.bad(key, f"is {self.values[key]!r}, which this architecture cannot express")

    def bad(self, key: str, what: str) -> DesksideError:
        return DesksideError(f"{self.path}: {key} {what}")

    def _number(self, source: dict[str, Any], key: str, default: float | None) -> float:
        value = source.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
            raise self.bad(key, f"is {value!r}; expected a number above 0")
        return float(value)


class Outputs:
    """Collects GGUF tensors from a checkpoint, checking each source's presence and shape."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.tensors: list[Output] = []
        self._stored = {
            _PREFIXES.sub("model.", name).replace("model.mtp.", "mtp.", 1): name
            for name in checkpoint.entries
            if not _SKIPPED.match(name)
        }
        self._unread = set(self._stored)

    def has(self, source: str) -> bool:
        return source in self._stored

    def take(self, source: str, *shape: int) -> NDArray[Any]:
        """The view of a source tensor, whose shape the config dictates."""
        folder = self.checkpoint.folder
        if source not in self._stored:
            raise DesksideError(
                f"{folder}: tensor {source} is missing; is the checkpoint complete?"
            )
        view = self.checkpoint.view(self._stored[source])
        if view.shape != shape:
            raise DesksideError(
                f"{folder}: tensor {source} has shape {list(view.shape)}; "
                f"config.json says {list(shape)}"
            )
        self._unread.discard(source)
        return view

    def add(self, name: str, source: str, *shape: int, **how: Any) -> None:
        """`source` as GGUF tensor `name`; a vector is always stored as F32."""
        view = self.take(source, *shape)
        if len(shape) == 1:
            how["narrow"] = False
        self.tensors.append(Output(name, shape[::-1], [np.atleast_2d(view)], **how))

    def stack(self, name: str, parts: Sequence[NDArray[Any]]) -> None:
        """One matrix per expert."""
        n_rows, n_cols = parts[0].shape
        self.tensors.append(Output(name, (n_cols, n_rows, len(parts)), parts))

    def drop(self, source: str) -> None:
        self._unread.discard(source)

    def finish(self) -> list[Output]:
        """All tensors; refuses to leave weights of the checkpoint out."""
        if self._unread:
            first = min(self._unread)
            raise DesksideError(
                f"{self.checkpoint.folder}: tensor {first} (and {len(self._unread) - 1} more) "
                "has no place in the GGUF architecture"
            )
        return self.tensors
