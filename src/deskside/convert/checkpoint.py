"""A Hugging Face checkpoint folder: JSON files and safetensors, single or sharded.

safetensors layout (little endian): u64 header length, a JSON header `{name: {dtype, shape,
data_offsets: [begin, end)}}` with offsets from the end of the header, then the data.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError

# NumPy has no bfloat16: its bits are the upper half of a float32, carried as u16.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
}
_SHARD = re.compile(r".*-(?P<no>\d{5})-of-(?P<count>\d{5})\.safetensors")
MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies: `offset` is absolute in `path`."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int


class Checkpoint:
    """The tensors and JSON files of a folder. Tensors are memory-mapped."""

    def __init__(self, folder: Path, entries: dict[str, Entry]) -> None:
        self.folder = folder
        self.entries = entries
        self._maps: dict[Path, NDArray[np.uint8]] = {}

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read the headers of all shards in model.safetensors.index.json, or where there is no
        index, of the files that the folder has.

        Raises DesksideError for missing or damaged files, naming file and tensor.
        """
        index = folder / "model.safetensors.index.json"
        single = folder / "model.safetensors"
        if single.is_file():
            return cls(folder, read_header(single))
        if not index.is_file():
            return cls(folder, _without_index(folder))
        shard_of = read_json(index).get("weight_map")
        if not isinstance(shard_of, dict) or not all(_is_file_name(s) for s in shard_of.values()):
            raise DesksideError(f"{index}: weight_map must map tensor names to file names")
        shards = {shard: read_header(folder / shard) for shard in sorted(set(shard_of.values()))}
        entries = {}
        for name, shard in shard_of.items():
            if name not in shards[shard]:
                raise DesksideError(
                    f"{folder / shard}: tensor {name} is missing; the index lists it"
                )
            entries[name] = shards[shard][name]
        return cls(folder, entries)

    def view(self, name: str) -> NDArray[Any]:
        """The tensor as stored, read-only: float32, float16, or the u16 bits of bfloat16."""
        entry = self.entries[name]
        if entry.dtype not in DTYPES:
            raise DesksideError(
                f"{entry.path}: tensor {name} is {entry.dtype}; deskside converts "
                f"{', '.join(DTYPES)}: use the checkpoint's unquantised release"
            )
        if entry.path not in self._maps:
            self._maps[entry.path] = np.memmap(entry.path, np.uint8, mode="r")
        dtype = DTYPES[entry.dtype]
        end = entry.offset + math.prod(entry.shape) * dtype.itemsize
        return self._maps[entry.path][entry.offset : end].view(dtype).reshape(entry.shape)


def _without_index(folder: Path) -> dict[str, Entry]:
    """The tensors of all shards, which their names number, or of the only file."""
    files = sorted(folder.glob("*.safetensors"))
    shards = [(file, _SHARD.fullmatch(file.name)) for file in files]
    numbered = [(file, int(m["no"]), int(m["count"])) for file, m in shards if m]
    if len(files) > 1 and len(numbered) == len(files):
        missing = set(range(1, numbered[0][2] + 1)) - {no for _, no, _ in numbered}
        if missing or {count for _, _, count in numbered} != {len(files)}:
            raise DesksideError(
                f"{folder}: {len(files)} files of {numbered[0][2]} shards and no "
                "model.safetensors.index.json; is the checkpoint complete?"
            )
    elif len(files) != 1 or (numbered and numbered[0][2] != 1):
        raise DesksideError(
            f"{folder}: no model.safetensors and no model.safetensors.index.json; "
            "deskside converts safetensors checkpoints only"
        )
    entries: dict[str, Entry] = {}
    for file in files:
        entries |= read_header(file)
    return entries


def to_float32(x: NDArray[Any]) -> NDArray[np.float32]:
    """Values of a view (or of a slice of one): u16 means bfloat16."""
    if x.dtype == DTYPES["BF16"]:
        return (x.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return x.astype(np.float32)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; DesksideError names the file when it is missing or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DesksideError(f"{path}: file is missing; is {path.parent} a checkpoint?") from None
    except OSError as error:
        raise DesksideError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise DesksideError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise DesksideError(f"{path}: expected a JSON object")
    return value


def read_header(path: Path) -> dict[str, Entry]:
    """The tensor table of one safetensors file, each entry checked to lie inside the file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, MAX_HEADER):
                raise DesksideError(
                    f"{path}: header of {length} bytes exceeds the file; truncated?"
                )
            table = json.loads(file.read(length))
    except OSError as error:
        raise DesksideError(f"{path}: {error.strerror}; is the checkpoint complete?") from None
    except (ValueError, RecursionError):
        raise DesksideError(
            f"{path}: the header is not valid JSON; not a safetensors file"
        ) from None
    if not isinstance(table, dict):
        raise DesksideError(f"{path}: the header is not a JSON object; not a safetensors file")
    table.pop("__metadata__", None)
    return {name: _entry(path, name, fields, 8 + length, size) for name, fields in table.items()}


def _entry(path: Path, name: str, fields: object, base: int, size: int) -> Entry:
    match fields:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [int(begin), int(end)]}:
            pass
        case _:
            raise DesksideError(f"{path}: tensor {name}: needs dtype, shape and data_offsets")
    if not all(type(n) is int and n >= 0 for n in shape):
        raise DesksideError(f"{path}: tensor {name}: {shape} is not a shape")
    if not 0 <= begin <= end <= size - base:
        raise DesksideError(
            f"{path}: tensor {name} ends at byte {base + end} of {size}; the file is truncated"
        )
    known = DTYPES.get(dtype)
    if known is not None and end - begin != math.prod(shape) * known.itemsize:
        raise DesksideError(
            f"{path}: tensor {name}: {end - begin} bytes do not hold {dtype} {shape}"
        )
    return Entry(path, dtype, tuple(shape), base + begin)


def _is_file_name(value: object) -> bool:
    return isinstance(value, str) and value == Path(value).name and value not in ("", "..")
