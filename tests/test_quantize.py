"""`quantize_file`: which tensors change, what stays, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.convert.quantize import Fallback, parse_rule, quantize_file
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.encoders import encodable, quantize
from deskside.gguf.quants import BY_NAME
from deskside.gguf.writer import GGUFWriter
from tests.gguf_files import METADATA, write_split

SHAPES: dict[str, tuple[int, ...]] = {
    "token_embd.weight": (256, 50),
    "output_norm.weight": (256,),
    "blk.0.attn_q.weight": (256, 64),
    "blk.0.ssm_conv1d.weight": (4, 64),
    "blk.0.ffn_gate_inp.weight": (256, 8),
    "blk.0.ffn_gate_exps.weight": (256, 96, 8),
    "blk.0.ffn_down_exps.weight": (96, 256, 8),
    "blk.0.odd.weight": (40, 6),
    "blk.0.ssm_a": (16,),
    "blk.0.table": (256, 2),
}
ASIDE = {name for name in SHAPES if len(SHAPES[name]) == 1} | {
    "blk.0.ssm_conv1d.weight",
    "blk.0.ffn_gate_inp.weight",
    "blk.0.table",
}


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: rng.standard_normal(shape[::-1]).astype(np.float32) for name, shape in SHAPES.items()
    }


def write_f32(path: Path, weights: dict[str, np.ndarray], metadata: dict[str, Any]) -> Path:
    f32 = BY_NAME["F32"]
    declared = [(name, f32, x.shape[::-1]) for name, x in weights.items()]
    with GGUFWriter(path, metadata, declared) as out:
        for name, x in weights.items():
            out.write(name, x)
    return path


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory, weights: dict[str, np.ndarray]) -> Path:
    keys = METADATA | {"general.file_type": np.uint32(0)}
    return write_f32(tmp_path_factory.mktemp("quantize") / "f32.gguf", weights, keys)


def types(path: Path) -> dict[str, str]:
    return {name: info.type.name for name, info in GGUF.open(path).tensors.items()}


def run(source: Path, out: Path, default: str, *rules: str, threads: int = 2) -> list[Fallback]:
    parsed = [parse_rule(rule) for rule in rules]
    return quantize_file(source, out, BY_NAME[default], parsed, threads)


def test_matrices_change_and_the_rest_stays(
    source: Path, tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    out = tmp_path / "q.gguf"
    fallbacks = run(source, out, "Q8_0")
    model = GGUF.open(out)
    assert [(f.name, f.asked, f.got) for f in fallbacks] == [("blk.0.odd.weight", "Q8_0", "F16")]
    for name, x in weights.items():
        got = model.tensors[name].type.name
        assert got == ("F32" if name in ASIDE else "F16" if "odd" in name else "Q8_0"), name
        expected = quantize(x.reshape(-1, x.shape[-1]), BY_NAME[got])
        assert np.array_equal(model.raw(name), expected), name


def test_metadata_keeps_its_types(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    run(source, out, "IQ4_NL")
    before, after = GGUF.open(source), GGUF.open(out)
    added = {"general.file_type", "general.quantization_version"}
    assert after.types.keys() - before.types.keys() == {"general.quantization_version"}
    for key in before.types.keys() - added:
        assert after.types[key] == before.types[key], key
        assert np.array_equal(after.metadata[key], before.metadata[key]), key
    assert after.metadata["a.ids"].dtype == np.int32


FILE_TYPES = {
    "F32": 0, "F16": 1, "Q8_0": 7, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
    "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38, "Q6_0": 135, "IQ4_K": 140, "IQ5_K": 141,
    "IQ6_K": 142, "IQ4_KS": 145, "IQ4_KSS": 148, "IQ5_KS": 150,
}  # fmt: skip


def test_every_type_that_can_be_written_has_a_file_type() -> None:
    assert FILE_TYPES.keys() == set(encodable())


@pytest.mark.parametrize(("name", "number"), FILE_TYPES.items())
def test_every_type_and_its_file_type(source: Path, tmp_path: Path, name: str, number: int) -> None:
    out = tmp_path / "q.gguf"
    run(source, out, name)
    model = GGUF.open(out)
    assert model.metadata["general.file_type"] == number
    assert model.types["general.file_type"] == 4
    assert model.tensors["blk.0.attn_q.weight"].type.name == name
    model.check_values()


@pytest.mark.parametrize(
    ("asked", "narrow"),
    [
        ("IQ4_KSS", "IQ4_NL"),
        ("Q2_K", "IQ4_NL"),
        ("Q4_K", "IQ4_NL"),
        ("Q5_K", "Q8_0"),
        ("Q6_K", "Q8_0"),
        ("IQ5_KS", "Q6_0"),
        ("IQ6_K", "Q8_0"),
    ],
)
def test_rows_that_do_not_fit_fall_back(
    source: Path, tmp_path: Path, asked: str, narrow: str
) -> None:
    fallbacks = run(source, tmp_path / "q.gguf", asked)
    assert [f[:3] for f in fallbacks] == [
        ("blk.0.ffn_down_exps.weight", asked, narrow),
        ("blk.0.odd.weight", asked, "F16"),
    ]
    assert "96" in fallbacks[0].reason
    assert "256" in fallbacks[0].reason
    assert types(tmp_path / "q.gguf")["blk.0.ffn_down_exps.weight"] == narrow


def test_the_first_matching_rule_wins_also_over_protection(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "q.gguf"
    rules = [r"ffn_(gate|up)_exps=IQ4_KSS", "_exps=q6_k", "gate_inp=BF16", r"a=b|^token=F16"]
    fallbacks = run(source, out, "Q8_0", *rules)
    got = types(out)
    assert got["blk.0.ffn_gate_exps.weight"] == "IQ4_KSS"
    assert got["blk.0.ffn_down_exps.weight"] == "Q8_0"
    assert got["blk.0.ffn_gate_inp.weight"] == "BF16"
    assert got["token_embd.weight"] == "F16"
    assert got["blk.0.attn_q.weight"] == "Q8_0"
    assert fallbacks[0][:3] == ("blk.0.ffn_down_exps.weight", "Q6_K", "Q8_0")


def test_a_rule_for_everything_leaves_vectors_and_narrow_protected_matrices(
    source: Path, tmp_path: Path
) -> None:
    run(source, tmp_path / "q.gguf", "F16", ".=Q8_0")
    got = types(tmp_path / "q.gguf")
    assert got["output_norm.weight"] == got["blk.0.ssm_a"] == "F32"
    assert got["blk.0.ssm_conv1d.weight"] == "F32"
    assert got["blk.0.ffn_gate_inp.weight"] == "Q8_0"


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_and_units_do_not_change_the_bytes(
    source: Path, tmp_path: Path, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(source, tmp_path / "a.gguf", "IQ4_NL", "attn=IQ4_KSS", threads=2)
    monkeypatch.setattr("deskside.convert.quantize._UNIT", 1000)
    run(source, tmp_path / "b.gguf", "IQ4_NL", "attn=IQ4_KSS", threads=threads)
    assert (tmp_path / "a.gguf").read_bytes() == (tmp_path / "b.gguf").read_bytes()


def test_quantised_sources(source: Path, tmp_path: Path) -> None:
    run(source, tmp_path / "q8.gguf", "Q8_0")
    run(tmp_path / "q8.gguf", tmp_path / "q4.gguf", "IQ4_NL", "token_embd=Q8_0")
    q8, q4 = GGUF.open(tmp_path / "q8.gguf"), GGUF.open(tmp_path / "q4.gguf")
    assert np.array_equal(q8.raw("token_embd.weight"), q4.raw("token_embd.weight"))
    x, y = q8.dequantized("blk.0.attn_q.weight"), q4.dequantized("blk.0.attn_q.weight")
    assert np.array_equal(quantize(x, BY_NAME["IQ4_NL"]), q4.raw("blk.0.attn_q.weight"))
    # 0.089: see the bound in test_encoders.
    assert np.sqrt(np.mean((x - y) ** 2) / np.mean(x**2)) < 0.089


def test_a_split_becomes_one_file(tmp_path: Path) -> None:
    paths = write_split(tmp_path)
    run(paths[1], tmp_path / "one.gguf", "F16")
    model = GGUF.open(tmp_path / "one.gguf")
    assert len(model.tensors) == 4
    assert not [key for key in model.metadata if key.startswith("split.")]
    assert model.metadata["a.text"] == METADATA["a.text"]


def test_progress_counts_every_weight(source: Path, tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    quantize_file(source, tmp_path / "q.gguf", BY_NAME["F16"], progress=lambda *a: calls.append(a))
    total = sum(int(np.prod(shape)) for shape in SHAPES.values())
    assert calls[-1][1:] == (total, total)
    assert [done for _, done, _ in calls] == sorted(done for _, done, _ in calls)
    assert {name for name, _, _ in calls} == SHAPES.keys()


@pytest.mark.parametrize("rule", ["=Q8_0", "Q8_0", "x=", "x=Q9_9", "(=Q8_0", "*=Q8_0"])
def test_bad_rules(rule: str) -> None:
    with pytest.raises(DesksideError):
        parse_rule(rule)


def test_a_rule_without_a_matrix_is_a_typo(source: Path, tmp_path: Path) -> None:
    for rule in ("ffn_dwon=Q8_0", "output_norm=Q8_0"):
        with pytest.raises(DesksideError, match=rule.partition("=")[0]):
            run(source, tmp_path / "q.gguf", "F16", rule)
    assert not list(tmp_path.iterdir())


def test_refusals(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DesksideError, match="Q5_1"):
        run(source, tmp_path / "q.gguf", "Q5_1")
    with pytest.raises(DesksideError, match="Q4_0"):
        run(source, tmp_path / "q.gguf", "F16", "attn=Q4_0")
    with pytest.raises(DesksideError, match="threads"):
        run(source, tmp_path / "q.gguf", "F16", threads=0)
    with pytest.raises(DesksideError, match="No such file"):
        run(tmp_path / "none.gguf", tmp_path / "q.gguf", "F16")


def test_source_and_destination_must_differ(source: Path, tmp_path: Path) -> None:
    link = tmp_path / "link.gguf"
    link.symlink_to(source)
    before = source.read_bytes()
    for out in (source, link):
        with pytest.raises(DesksideError, match="same file"):
            run(source, out, "F16")
    shards = write_split(tmp_path)
    with pytest.raises(DesksideError, match="same file"):
        run(shards[0], shards[2], "F16")
    assert source.read_bytes() == before


def test_a_damaged_weight_is_named_and_nothing_is_left(
    tmp_path: Path, weights: dict[str, np.ndarray]
) -> None:
    broken = dict(weights)
    broken["blk.0.attn_q.weight"] = weights["blk.0.attn_q.weight"].copy()
    broken["blk.0.attn_q.weight"][7, 3] = np.nan
    path = write_f32(tmp_path / "bad.gguf", broken, {})
    with pytest.raises(DesksideError, match=r"bad.gguf: tensor 'blk.0.attn_q.weight'.*row 7"):
        run(path, tmp_path / "q.gguf", "IQ4_NL")
    assert [p.name for p in tmp_path.iterdir()] == ["bad.gguf"]
