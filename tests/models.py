"""Tiny random models for tests, each written once a session."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from deskside.convert.synth import synth_file
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.gguf.writer import GGUFWriter

_FOLDER = tempfile.TemporaryDirectory(prefix="deskside-tests-")
PRESETS = ("tiny-moe", "tiny-dense", "tiny-qwen3moe", "tiny-qwen3", "tiny-qwen2", "tiny-llama")
# Narrow and short, so that the NumPy reference stays quick.
SMALL: dict[str, Any] = {"layers": 4, "vocab": 2560}


@cache
def tiny(preset: str = "tiny-moe", types: str = "") -> Path:
    """A small model; `types` makes every matrix of that type, "" takes the preset's own mix."""
    path = Path(_FOLDER.name) / f"{preset}-{types}.gguf"
    rules = [(".", quant_type(types))] if types else []
    synth_file(preset, path, types=rules, **SMALL)
    return path


def rewrite(
    src: Path,
    dst: Path,
    *,
    metadata: Mapping[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    replace: Mapping[str, np.ndarray] | None = None,
    rename: Mapping[str, str] | None = None,
) -> Path:
    """Copy a model with changed metadata (None deletes a key) or tensors.

    `replace` gives a tensor float32 values of another (NumPy) shape.
    """
    file = GGUF.open(src)
    values = {**file.typed_metadata(), **(metadata or {})}
    values = {key: value for key, value in values.items() if value is not None}
    f32 = quant_type("F32")
    replace, rename = replace or {}, rename or {}
    tensors = []
    for name, info in file.tensors.items():
        if name in drop:
            continue
        new = replace.get(name)
        kind, shape = (info.type, info.shape) if new is None else (f32, new.shape[::-1])
        tensors.append((rename.get(name, name), kind, tuple(shape)))
    with GGUFWriter(dst, values, tensors) as writer:
        for name in file.tensors:
            if name not in drop:
                data = replace[name] if name in replace else file.raw(name)
                writer.write(rename.get(name, name), np.ascontiguousarray(data).view(np.uint8))
    return dst
