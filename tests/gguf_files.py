"""Toy GGUF files for the tests of reader and writer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import BY_NAME, QuantType
from deskside.gguf.writer import GGUFWriter

F32, Q8_0, KSS = BY_NAME["F32"], BY_NAME["Q8_0"], BY_NAME["IQ4_KSS"]

METADATA: dict[str, Any] = {
    "general.architecture": "toy",
    "a.u8": np.uint8(250),
    "a.i8": np.int8(-3),
    "a.u16": np.uint16(65535),
    "a.i16": np.int16(-32768),
    "a.u32": np.uint32(7),
    "a.i32": np.int32(-7),
    "a.u64": np.uint64(2**63),
    "a.i64": np.int64(-(2**62)),
    "a.f32": np.float32(0.1),
    "a.f64": np.float64(0.1),
    "a.true": True,
    "a.text": "naïve ▁ 🙂\n",
    "a.empty": "",
    "a.bytes": np.arange(5, dtype=np.uint8),
    "a.ids": np.array([3, -1], np.int32),
    "a.none": np.zeros(0, np.float32),
    "a.flags": np.array([True, False, True]),
    "a.scores": np.array([0.5, -1e30]),
    "a.tokens": ["", "Ġthe", "\u00ff"],
}

Tensor = tuple[str, QuantType, tuple[int, ...], np.ndarray]


def tensor(name: str, t: QuantType, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    data = rng.integers(0, 60, (int(np.prod(shape[1:])), t.row_bytes(shape[0])), np.uint8)
    return name, t, shape, data


TENSORS = [
    tensor("norm.weight", F32, (5,), 1),
    tensor("a.weight", Q8_0, (64, 3), 2),
    tensor("e.weight", KSS, (256, 2, 3), 3),
    tensor("four.weight", BY_NAME["F16"], (2, 3, 4, 5), 4),
]


def write(
    path: Path, metadata: dict[str, Any], tensors: Sequence[Tensor], alignment: int = 32
) -> Path:
    with GGUFWriter(path, metadata, [t[:3] for t in tensors], alignment) as out:
        for name, _, _, data in tensors:
            out.write(name, data)
    return path


def write_split(folder: Path, count: int = 3) -> list[Path]:
    """Metadata in the first shard, which holds no tensors; the tensors in the others."""
    paths = []
    for no in range(count):
        keys: dict[str, Any] = dict(METADATA) if no == 0 else {}
        keys |= {"split.no": np.uint16(no), "split.count": np.uint16(count)}
        keys["split.tensors.count"] = np.int32(len(TENSORS))
        part = [t for i, t in enumerate(TENSORS) if no == 1 + i % (count - 1)]
        paths.append(write(folder / f"m-{no + 1:05}-of-{count:05}.gguf", keys, part))
    return paths


def refused(path: Path, *parts: str) -> None:
    """Opening fails with one line that names `path` and holds all `parts`."""
    with pytest.raises(DesksideError) as caught:
        GGUF.open(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]
