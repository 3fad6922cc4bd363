"""Reader and writer against the `gguf` package both ways; keys, splits and damaged values."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import QuantType, dequantize
from tests.gguf_files import (
    F32,
    KSS,
    METADATA,
    Q8_0,
    TENSORS,
    patched,
    refused,
    tensor,
    write,
    write_split,
)


def same(a: Any, b: Any) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    return bool(a == b)


@pytest.mark.parametrize("alignment", [32, 8, 4096])
def test_round_trip(tmp_path: Path, alignment: int) -> None:
    model = GGUF.open(write(tmp_path / "m.gguf", METADATA, TENSORS, alignment))
    for key, value in METADATA.items():
        plain = value.item() if isinstance(value, np.generic) else value
        assert same(plain, model.metadata[key]), key
        assert type(model.metadata[key]) is type(plain), key
    for name, t, shape, data in TENSORS:
        info = model.tensors[name]
        assert (info.type, info.shape, info.row_len) == (t, shape, shape[0])
        assert (info.n_rows, info.row_bytes, info.nbytes) == (*data.shape, data.size)
        assert info.offset % alignment == 0
        assert np.array_equal(model.raw(name), data)
        expected = dequantize(data, t, shape[0]).reshape(shape[::-1])
        assert np.array_equal(model.dequantized(name), expected)


def test_writing_typed_metadata_again_gives_the_same_bytes(tmp_path: Path) -> None:
    first = write(tmp_path / "a.gguf", METADATA, TENSORS)
    second = write(tmp_path / "b.gguf", GGUF.open(first).typed_metadata(), TENSORS)
    assert first.read_bytes() == second.read_bytes()


def test_python_numbers_get_the_documented_types(tmp_path: Path) -> None:
    values = {"a": 5, "b": 2**32, "c": -1, "d": -(2**31) - 1, "e": 0.5, "f": False}
    model = GGUF.open(write(tmp_path / "m.gguf", values, []))
    assert model.types == {"a": 4, "b": 10, "c": 5, "d": 11, "e": 6, "f": 7}
    assert model.metadata == values


def test_nested_arrays(tmp_path: Path) -> None:
    nested = [[np.array([1, 2], np.int16)], [np.zeros(0, np.int16), np.array([3], np.int16)]]
    model = GGUF.open(write(tmp_path / "m.gguf", {"n": nested, "t": [["x"], ["y", ""]]}, []))
    got = model.metadata["n"]
    assert [[inner.tolist() for inner in outer] for outer in got] == [[[1, 2]], [[], [3]]]
    assert got[0][0].dtype == np.int16
    assert model.metadata["t"] == [["x"], ["y", ""]]


def test_the_gguf_package_reads_what_we_write(tmp_path: Path) -> None:
    mainline = [t for t in TENSORS if t[1] is not KSS]
    reader = gguf.GGUFReader(write(tmp_path / "m.gguf", METADATA, mainline))
    for key, value in METADATA.items():
        got = reader.get_field(key)
        assert got is not None
        plain = value.item() if isinstance(value, np.generic) else value
        assert got.contents() == (plain.tolist() if isinstance(plain, np.ndarray) else plain), key
        if isinstance(value, np.generic):
            assert got.types[0].name == value.dtype.name.replace("uint", "UINT").upper()
    for ours, theirs in zip(mainline, reader.tensors, strict=True):
        assert (theirs.name, theirs.tensor_type.value) == (ours[0], ours[1].id)
        assert tuple(theirs.shape.tolist()) == ours[2]
        assert theirs.data.tobytes() == ours[3].tobytes()


def test_we_read_what_the_gguf_package_writes(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "toy")
    writer.add_uint64("a.u64", 2**40)
    writer.add_float64("a.f64", 0.1)
    writer.add_array("a.tokens", ["x", "ß"])
    writer.add_array("a.ids", [1, -2])
    writer.add_bool("a.flag", True)
    x = np.arange(128, dtype=np.float32).reshape(2, 64)
    writer.add_tensor("w.weight", x)
    packed = gguf.quants.quantize(x, gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = GGUF.open(tmp_path / "m.gguf")
    assert model.get("general.architecture") == "toy"
    assert (model.get("a.u64"), model.get("a.f64"), model.get("a.flag")) == (2**40, 0.1, True)
    assert (model.get("a.tokens"), model.get("a.ids").tolist()) == (["x", "ß"], [1, -2])
    assert np.array_equal(model.dequantized("w.weight"), x)
    assert model.tensors["q.weight"].shape == (64, 2)
    assert np.array_equal(model.raw("q.weight"), packed)


def test_version_2_is_read(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", METADATA, TENSORS)
    path.write_bytes(patched(path.read_bytes(), 4, struct.pack("<I", 2)))
    assert len(GGUF.open(path).tensors) == len(TENSORS)


def test_raw_is_a_read_only_view(tmp_path: Path) -> None:
    model = GGUF.open(write(tmp_path / "m.gguf", METADATA, TENSORS))
    with pytest.raises(ValueError, match="read-only"):
        model.raw("a.weight")[0, 0] = 1


def test_require(tmp_path: Path) -> None:
    path = write(tmp_path / "m.gguf", METADATA, [])
    model = GGUF.open(path)
    assert model.require("a.u32", int) == 7
    assert model.require("a.u32", float) == 7.0
    assert model.require("a.true", bool) is True
    assert model.require("a.tokens", list) == METADATA["a.tokens"]
    assert model.require("a.ids", np.ndarray).tolist() == [3, -1]
    assert model.get("no.such") is None
    assert model.get("no.such", 3) == 3
    for key, kind in (("no.such", int), ("a.text", int), ("a.true", int), ("a.f32", int)):
        with pytest.raises(DesksideError, match=f"m.gguf: key '{key}'"):
            model.require(key, kind)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    model = GGUF.open(write(tmp_path / "m.gguf", METADATA, TENSORS))
    for access in (model.raw, model.dequantized, lambda name: model.check_values([name])):
        with pytest.raises(DesksideError, match=r"m.gguf: tensor 'gone.weight' is missing"):
            access("gone.weight")


def test_any_shard_opens_the_whole_split(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    for path in paths:
        model = GGUF.open(path)
        assert model.paths == paths
        assert model.metadata["a.text"] == METADATA["a.text"]
        assert model.metadata["split.no"] == 0
        for name, _, _, data in TENSORS:
            assert np.array_equal(model.raw(name), data)
        model.check_values()


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].unlink()
    refused(paths[2], "m-00002-of-00003.gguf", "shard 2 of 3 is missing")


def test_a_shard_under_a_wrong_name(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    refused(paths[0].rename(tmp_path / "model.gguf"), "split.count is 3", "-NNNNN-of-00003.gguf")
    refused(paths[1].rename(tmp_path / "m-00002-of-00004.gguf"), "split.count is 3")


def test_shards_of_different_splits(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    paths[1].write_bytes(paths[2].read_bytes())
    refused(paths[0], "m-00002-of-00003.gguf", "split.no is 2", "1")
    write(paths[1], {"split.no": 1, "split.count": 4}, [])
    refused(paths[0], "m-00002-of-00003.gguf", "split.count is 4", "3")
    write(paths[1], {"split.no": "x", "split.count": 3}, [])
    refused(paths[0], "m-00002-of-00003.gguf", "split.no must be a whole number")


def test_shards_with_too_few_tensors_or_one_twice(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    keys = {"split.no": 1, "split.count": 3}
    write(paths[1], keys, [])
    refused(paths[0], "split.tensors.count is 4", "hold 2 tensors")
    write(paths[1], keys, [TENSORS[1]])
    refused(paths[0], "tensor 'a.weight' appears twice")


def poison_header(data: np.ndarray) -> None:
    data[4, :4] = np.frombuffer(np.float32(np.nan).tobytes(), np.uint8)


def poison_scale(data: np.ndarray) -> None:
    data[4, 34:36] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)


def poison_value(data: np.ndarray) -> None:
    data[4, 8:12] = np.frombuffer(np.float32(-np.inf).tobytes(), np.uint8)


@pytest.mark.parametrize(
    ("t", "poison", "what"),
    [(KSS, poison_header, "scale"), (Q8_0, poison_scale, "scale"), (F32, poison_value, "value")],
)
def test_check_values_names_file_tensor_and_row(
    tmp_path: Path, t: QuantType, poison: Callable[[np.ndarray], None], what: str
) -> None:
    good, bad = tensor("good.weight", t, (256, 3)), tensor("bad.weight", t, (256, 3, 2))
    poison(bad[3])
    model = GGUF.open(write(tmp_path / "m.gguf", {}, [good, bad]))
    model.check_values(["good.weight"])
    with pytest.raises(DesksideError, match=rf"m.gguf: tensor 'bad.weight'.*row 4.*{what}"):
        model.check_values()
