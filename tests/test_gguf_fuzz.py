"""Damaged files: whatever the bytes, the reader answers or raises DesksideError, memory bounded."""

from __future__ import annotations

import itertools
import struct
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from tests.gguf_files import METADATA, TENSORS, write

HEADER = 960

# The toy file has 2 KB and 1,900 weights. A parsed value costs at most some 120 bytes of Python
# objects per 9 bytes of file, and its weights and their decoding a few float arrays: 1 MB is
# generous, and far below anything that follows a forged count.
MEMORY = 1 << 20

HOSTILE = [0, 1, 3, 8, 9, 12, 31, *(2**k for k in (15, 31, 40, 60, 63)), 2**32 - 1, 2**64 - 1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@pytest.fixture(scope="module")
def valid(folder: Path) -> bytes:
    nested = {"a.nested": [["x"], ["y", "z"]]}
    return write(folder / "valid.gguf", METADATA | nested, TENSORS, alignment=64).read_bytes()


_serial = itertools.count()


def survive(folder: Path, data: bytes) -> None:
    """Read everything there is in a file of these bytes."""
    path = folder / f"{next(_serial)}.gguf"
    path.write_bytes(data)
    tracemalloc.start()
    try:
        model = GGUF.open(path)
        model.typed_metadata()
        for name in model.tensors:
            model.dequantized(name)
        model.check_values()
    except DesksideError as e:
        assert "\n" not in str(e)
        assert len(str(e)) < 600
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        path.unlink()
    assert peak < MEMORY


def test_the_valid_file_passes(folder: Path, valid: bytes) -> None:
    survive(folder, valid)
    model = GGUF.open(folder / "valid.gguf")
    assert min(t.offset for t in model.tensors.values()) == HEADER
    model.check_values()


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_flipped_bytes(folder: Path, valid: bytes, data: st.DataObject) -> None:
    damaged = bytearray(valid)
    places = st.integers(0, len(valid) - 1)
    for at in data.draw(st.lists(places, min_size=1, max_size=6)):
        damaged[at] = data.draw(st.integers(0, 255))
    survive(folder, bytes(damaged))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_hostile_numbers(folder: Path, valid: bytes, data: st.DataObject) -> None:
    """8 or 4 bytes anywhere in the header become a number that a count or offset should not be."""
    damaged = bytearray(valid)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, HEADER))
        number = data.draw(st.sampled_from(HOSTILE))
        raw = struct.pack("<Q", number)[: data.draw(st.sampled_from([4, 8]))]
        damaged[at : at + len(raw)] = raw
    survive(folder, bytes(damaged))


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_cut_and_spliced_files(folder: Path, valid: bytes, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, len(valid)))
    end = data.draw(st.integers(0, len(valid)))
    survive(folder, valid[:start] + valid[end:])


@settings(max_examples=150, deadline=None)
@given(tail=st.binary(max_size=300), counts=st.tuples(*[st.integers(0, 6)] * 2))
def test_noise_behind_a_valid_start(folder: Path, tail: bytes, counts: tuple[int, int]) -> None:
    survive(folder, b"GGUF" + struct.pack("<IQQ", 3, *counts) + tail)


def test_every_header_field_at_its_largest(folder: Path, valid: bytes) -> None:
    """All ones over every 8 bytes of the header in turn: no count or length is believed."""
    for at in range(4, HEADER):
        survive(folder, valid[:at] + b"\xff" * 8 + valid[at + 8 :])
