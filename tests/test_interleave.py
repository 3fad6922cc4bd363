"""ik_llama.cpp's interleaved types: taken apart to the bytes of the plain type."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest

from deskside.backends.experts.copies import Source
from deskside.convert.quantize import quantize_file
from deskside.convert.recipes import recipe
from deskside.convert.synth import synth_file
from deskside.engine import LLM
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.interleave import INTERLEAVED, Interleave
from deskside.gguf.quants import TYPES, UNSUPPORTED, QuantType, quant_type
from tests import ik_ggml
from tests.gguf_files import tensor, write

KINDS = pytest.mark.parametrize("kind", INTERLEAVED.values(), ids=lambda kind: kind.name)


def row_len(kind: Interleave) -> int:
    return 3 * max(kind.type.block, 32)


def plain_rows(kind: Interleave, rows: int, seed: int = 0) -> np.ndarray:
    n = row_len(kind)
    return np.random.default_rng(seed).integers(0, 256, (rows, kind.type.row_bytes(n)), np.uint8)


def repacked(kind: Interleave, data: np.ndarray, n: int) -> np.ndarray:
    """The same rows as ik_llama.cpp interleaves them."""
    if kind.name == "BF16_R16":
        return ik_ggml.interleave_bf16(data)
    type_id, out = ik_ggml.interleave(kind.type.id, data, n)
    assert type_id == kind.id
    return out


@pytest.mark.external
@KINDS
def test_rows_are_those_that_ik_llama_cpp_interleaved(kind: Interleave) -> None:
    data = plain_rows(kind, 3 * kind.rows)
    packed = repacked(kind, data, row_len(kind))
    assert not np.array_equal(packed, data)
    assert np.array_equal(kind.plain(packed), data)


@KINDS
def test_it_is_a_permutation_of_bits(kind: Interleave, monkeypatch: pytest.MonkeyPatch) -> None:
    """No bit is lost or doubled, whatever the size of the pieces."""
    data = plain_rows(kind, 4 * kind.rows)
    ones = np.full_like(data, 255)
    assert np.array_equal(kind.plain(ones), ones)
    whole = kind.plain(data)
    assert np.bitwise_count(whole).sum() == np.bitwise_count(data).sum()
    monkeypatch.setattr("deskside.gguf.interleave._CHUNK", 1)
    assert np.array_equal(kind.plain(data), whole)
    assert np.array_equal(
        kind.plain(data[kind.rows : 2 * kind.rows]), whole[kind.rows :][: kind.rows]
    )


def test_ids_are_told_apart() -> None:
    assert not INTERLEAVED.keys() & (TYPES.keys() | UNSUPPORTED.keys())


def needed_but_refused(path: Path, *parts: str) -> None:
    """The file opens; whoever needs its tensor "w" gets one line that holds all `parts`."""
    file = GGUF.open(path)
    with pytest.raises(DesksideError) as caught:
        file.tensor("w")
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


def test_rows_that_make_no_whole_group_are_refused(tmp_path: Path) -> None:
    for type_id, block, nbytes, shape in ((212, 256, 144, (256, 6)), (230, 1, 2, (7, 16))):
        t = QuantType(type_id, "mixed", block, nbytes)
        path = write(tmp_path / f"{type_id}.gguf", {}, [tensor("w", t, shape)])
        needed_but_refused(path, str(path), "'w'", INTERLEAVED[type_id].name)
    t = QuantType(212, "mixed", 256, 144)
    path = write(tmp_path / "experts.gguf", {}, [tensor("w", t, (256, 2, 2))])
    needed_but_refused(path, "2 rows", "Q4_K_R4")  # groups do not cross experts


@pytest.mark.external
def test_a_repacked_file_is_the_plain_file(tmp_path: Path) -> None:
    """By way of ik's own `llama-quantize --repack`: the reader, the reference and the CPU."""
    f32, path, packed = (tmp_path / f"{n}.gguf" for n in ("f32", "plain", "packed"))
    wide = {"vocab_size": 512, "moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
    rules = [("", quant_type("F32"))]
    synth_file("tiny-moe", f32, layers=4, experts=8, overrides=wide, types=rules)
    quantize_file(f32, path, recipe("Q4_K_M"))
    command = [str(ik_ggml.llama_quantize()), "--repack", str(path), str(packed), "Q4_K_R4", "1"]
    subprocess.run(command, check=True, capture_output=True)
    plain, mixed = GGUF.open(path), GGUF.open(packed)
    found = {t.interleaved.name for t in mixed.tensors.values() if t.interleaved}
    assert {"Q4_K_R4", "Q6_K_R4"} <= found
    assert mixed.tensors.keys() == plain.tensors.keys()
    for name in plain.tensors:
        assert np.array_equal(mixed.raw(name), plain.raw(name)), name
    ids = np.random.default_rng(0).integers(0, 512, 20).tolist()
    for backend in ("cpu", "reference"):
        a, b = (LLM(p, ctx=64, threads=1, backend=backend).logits(ids) for p in (path, packed))
        assert np.array_equal(a, b), backend
    # what is streamed to a device is read expert by expert
    info = next(t for t in mixed.tensors.values() if t.interleaved and len(t.shape) == 3)
    one = np.empty(info.nbytes // info.shape[2], np.uint8)
    Source().read(info, 2, one)
    rows = mixed.raw(info.name)[2 * info.shape[1] : 3 * info.shape[1]]
    assert np.array_equal(one, rows.reshape(-1))
    quantize_file(packed, tmp_path / "again.gguf", recipe("Q4_K_M"))
    assert np.array_equal(GGUF.open(tmp_path / "again.gguf").raw(info.name), plain.raw(info.name))
