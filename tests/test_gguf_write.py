"""The writer's temporary file and its refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.writer import GGUFWriter
from tests.gguf_files import F32, Q8_0, TENSORS, write


def leftovers(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def test_a_failed_write_leaves_nothing_and_keeps_the_old_file(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", {}, [])
    before = path.read_bytes()
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), GGUFWriter(path, {}, [TENSORS[0][:3]]) as out:
            out.write(TENSORS[0][0], TENSORS[0][3])
            raise error
    assert leftovers(tmp_path) == ["m.gguf"]
    assert path.read_bytes() == before


def test_a_tensor_can_come_in_chunks(tmp_path: Path) -> None:
    name, t, shape, data = TENSORS[2]
    with GGUFWriter(tmp_path / "m.gguf", {}, [(name, t, shape)]) as out:
        for row in data:
            out.write(name, row[:100])
            out.write(name, bytes(row[100:]))
    assert np.array_equal(GGUF.open(tmp_path / "m.gguf").raw(name), data)


def test_missing_surplus_and_disordered_data(tmp_path: Path) -> None:
    path, declared = tmp_path / "m.gguf", [t[:3] for t in TENSORS[:2]]
    with pytest.raises(DesksideError, match=r"'norm.weight' is 4 bytes short"):  # noqa: SIM117
        with GGUFWriter(path, {}, declared) as out:
            out.write("norm.weight", bytes(16))
    with pytest.raises(DesksideError, match=r"'norm.weight' got 21 bytes"):  # noqa: SIM117
        with GGUFWriter(path, {}, declared) as out:
            out.write("norm.weight", bytes(21))
    with pytest.raises(DesksideError, match=r"'a.weight'.*'norm.weight' is next"):  # noqa: SIM117
        with GGUFWriter(path, {}, declared) as out:
            out.write("a.weight", bytes(34))
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "tensors", "part"),
    [
        ({"k": None}, [], "'k'"),
        ({"k": 2**64}, [], "'k'"),
        ({"k": [1, 2]}, [], "'k'"),
        ({"k": np.zeros(2, np.complex64)}, [], "'k'"),
        ({"k": np.zeros((2, 2))}, [], "'k'"),
        ({}, [("w" * 64, F32, (1,))], "name"),
        ({}, [("w", F32, ())], "shape"),
        ({}, [("w", F32, (1, 0))], "shape"),
        ({}, [("w", F32, (1, 1, 1, 1, 1))], "shape"),
        ({}, [("w", Q8_0, (40,))], "Q8_0"),
        ({}, [("w", F32, (1,)), ("w", F32, (1,))], "twice"),
    ],
)
def test_what_cannot_be_written(
    tmp_path: Path, metadata: dict[str, Any], tensors: list[Any], part: str
) -> None:
    with pytest.raises(DesksideError, match=part), GGUFWriter(tmp_path / "m", metadata, tensors):
        pass
    assert leftovers(tmp_path) == []


def test_an_unwritable_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(DesksideError, match=r"m.gguf: cannot be written: No such file"),
        GGUFWriter(tmp_path / "none" / "m.gguf", {}, []),
    ):
        pass
