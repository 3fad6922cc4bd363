"""Every refusal of the GGUF reader, by its message."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path

import pytest

from deskside.convert.quantize import quantize_file
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.quants import BY_NAME
from tests.gguf_files import METADATA, TENSORS, patched, refused, write


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str | bytes, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def info(
    name: str | bytes = "w", ne: Sequence[int] = (32,), kind: int = 0, offset: int = 0
) -> bytes:
    shape = struct.pack(f"<I{len(ne)}Q", len(ne), *ne)
    return text(name) + shape + struct.pack("<IQ", kind, offset)


def file_of(keys: Sequence[bytes] = (), infos: Sequence[bytes] = (), data: int = 4096) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(keys))
    body = head + b"".join(keys) + b"".join(infos)
    return body + bytes(-len(body) % 32) + bytes(data)


HUGE = 1 << 60
BAD: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "empty": (b"", ("empty",)),
    "short": (b"GGUF\x03", ("not a GGUF file",)),
    "magic": (patched(file_of(), 0, b"GGML"), ("not a GGUF file",)),
    "version 1": (patched(file_of(), 4, b"\x01"), ("version 1",)),
    "version 9": (patched(file_of(), 4, b"\x09"), ("version 9",)),
    "big-endian": (patched(file_of(), 4, struct.pack(">I", 3)), ("big-endian",)),
    "tensor count": (patched(file_of(), 8, struct.pack("<Q", HUGE)), ("tensor count", str(HUGE))),
    "key count": (patched(file_of(), 16, struct.pack("<Q", HUGE)), ("number of keys", str(HUGE))),
    "key name length": (file_of([struct.pack("<Q", HUGE) + b"abcde"]), ("the name of key 0",)),
    "string length": (
        file_of([key("k", 8, struct.pack("<Q", HUGE))], data=0),
        ("key 'k'", str(HUGE)),
    ),
    "string array length": (
        file_of([key("k", 9, struct.pack("<IQ", 8, HUGE))]),
        ("length of key 'k'", str(HUGE)),
    ),
    "string in an array": (
        file_of([key("k", 9, struct.pack("<IQQ", 8, 1, 2**64 - 1))]),
        ("item 0", "key 'k'"),
    ),
    "strings to the end": (
        file_of([key("k", 9, struct.pack("<IQ", 8, 2) + text("ab") + text("x" * 4))])[:69],
        ("item 1 of key 'k'",),
    ),
    "lengths to the end": (
        file_of([key("k", 9, struct.pack("<IQ", 8, 2) + text("ab") + text("x" * 4))])[:65],
        ("item 1 of key 'k'",),
    ),
    "number array length": (
        file_of([key("k", 9, struct.pack("<IQ", 12, HUGE))]),
        ("length of key 'k'", str(HUGE)),
    ),
    "nested array length": (
        file_of([key("k", 9, struct.pack("<IQ", 9, HUGE))]),
        ("length of key 'k'", str(HUGE)),
    ),
    "nesting": (file_of([key("k", 9, struct.pack("<IQ", 9, 1) * 50)]), ("key 'k'", "deep")),
    "value type": (file_of([key("k", 13, b"")]), ("key 'k'", "type 13")),
    "element type": (file_of([key("k", 9, struct.pack("<IQ", 99, 0))]), ("key 'k'", "type 99")),
    "key UTF-8": (file_of([key(b"k\xff", 7, b"\x01")]), ("name of key 0", "UTF-8")),
    "value UTF-8": (
        file_of([key("tokenizer.k", 8, text(b"\xc3"))]),
        ("key 'tokenizer.k'", "UTF-8"),
    ),
    "item UTF-8": (
        file_of([key("tokenizer.k", 9, struct.pack("<IQ", 8, 2) + text("a") + text(b"\x80"))]),
        ("item 1 of key 'tokenizer.k'", "UTF-8"),
    ),
    "key twice": (file_of([key("k", 7, b"\x01")] * 2), ("key 'k' appears twice",)),
    "alignment 0": (
        file_of([key("general.alignment", 4, bytes(4))]),
        ("general.alignment is 0",),
    ),
    "alignment 24": (
        file_of([key("general.alignment", 4, struct.pack("<I", 24))]),
        ("general.alignment is 24",),
    ),
    "alignment text": (
        file_of([key("general.alignment", 8, text("32"))]),
        ("general.alignment is '32'",),
    ),
    "tensor name length": (
        file_of([], [struct.pack("<Q", HUGE) + bytes(40)]),
        ("name of tensor 0", str(HUGE)),
    ),
    "5 dimensions": (file_of([], [info(ne=(1,) * 5)]), ("'w'", "5 dimensions")),
    "0 dimensions": (file_of([], [info(ne=())]), ("'w'", "0 dimensions")),
    "2^32 dimensions": (
        file_of([], [text("w") + struct.pack("<I", 2**32 - 1) + bytes(64)]),
        ("'w'", "dimensions"),
    ),
    "offset": (file_of([], [info(offset=1 << 50)]), ("'w'", "truncated")),
    "offset overflow": (file_of([], [info(offset=2**64 - 32)]), ("'w'", "truncated")),
    "truncated data": (file_of([], [info(ne=(32, 33))])[:-200], ("'w'", "truncated")),
    "name twice": (file_of([], [info(), info(offset=128)]), ("'w' appears twice",)),
}


# Defects of one tensor: they matter to whoever needs it.
UNUSABLE: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "line break in a name": (file_of([], [info("a\nb", kind=99)]), (r"'a\nb'",)),
    "zero dimension": (file_of([], [info(ne=(32, 0))]), ("'w'", "shape (32, 0)")),
    "shape product": (file_of([], [info(ne=(2**32, 2**32, 2))]), ("'w'", "shape")),
    "unknown type": (file_of([], [info(kind=77)]), ("'w'", "type id 77")),
    "known type": (file_of([], [info(kind=399)]), ("'w'", "Q8_K_R8", "399", "not supported")),
    "row length": (file_of([], [info(ne=(48, 2), kind=8)]), ("'w'", "48", "32", "Q8_0")),
    "row length of a row type": (file_of([], [info(ne=(128,), kind=146)]), ("'w'", "IQ4_KSS")),
    "odd offset": (file_of([], [info(offset=4)]), ("'w'", "offset 4", "alignment 32")),
    "overlap": (
        file_of([], [info("late", offset=64), info("early", ne=(32,))]),
        ("'early'", "'late'", "overlap"),
    ),
    "same place": (file_of([], [info("a"), info("b")]), ("'a'", "'b'", "overlap")),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_tensor_that_cannot_be_read_refuses_those_who_need_it(tmp_path: Path, case: str) -> None:
    data, parts = UNUSABLE[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    model = GGUF.open(path)
    assert model.tensors == {}
    for name in model.unusable:
        for access in (model.tensor, model.raw, model.dequantized):
            with pytest.raises(DesksideError) as caught:
                access(name)
            message = str(caught.value)
            assert "\n" not in message
            assert all(part in message for part in ("bad.gguf", *parts))
    with pytest.raises(DesksideError, match=r"bad\.gguf"):
        quantize_file(path, tmp_path / "out.gguf", BY_NAME["F16"])
    assert not (tmp_path / "out.gguf").exists()


def test_text_that_is_not_utf8_is_kept_as_it_is(tmp_path: Path) -> None:
    path, out = tmp_path / "latin.gguf", tmp_path / "out.gguf"
    keys = [key("general.description", 8, text(b"caf\xe9"))]
    keys += [key("general.tags", 9, struct.pack("<IQ", 8, 2) + text("a") + text(b"\x80b"))]
    path.write_bytes(file_of(keys, [info(b"w\xfe")]))
    model = GGUF.open(path)
    assert model.metadata == {"general.description": "caf\ufffd", "general.tags": ["a", "\ufffdb"]}
    assert list(model.tensors) == ["w\ufffd"]
    quantize_file(path, out, BY_NAME["F16"])
    assert b"caf\xe9" in out.read_bytes()
    assert b"\x80b" in out.read_bytes()


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    data, parts = BAD[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    refused(path, "bad.gguf", *parts)


def test_the_builder_of_bad_files_can_build_a_good_one(tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(file_of([key("k", 7, b"\x02")], [info("a"), info("b", offset=128)]))
    model = GGUF.open(path)
    assert model.metadata == {"k": True}
    assert [t.n_rows for t in model.tensors.values()] == [1, 1]


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    """The data of the last tensor ends the file but for padding, so any shorter file is bad."""
    whole = write(tmp_path / "m.gguf", METADATA, TENSORS).read_bytes()
    end = len(whole) - (-TENSORS[-1][3].size % 32)
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 1500, 7), end - 33, end - 1]:
        path.write_bytes(whole[:size])
        refused(path, "cut.gguf")
    path.write_bytes(whole[:end])
    assert len(GGUF.open(path).tensors) == len(TENSORS)


def test_unreadable_paths(tmp_path: Path) -> None:
    refused(tmp_path / "none.gguf", "none.gguf", "No such file")
    refused(tmp_path, str(tmp_path), "directory")
