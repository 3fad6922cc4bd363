"""Perplexity and divergence against their definitions in float64, and the file between two runs."""

from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from msgspec import structs

from deskside import LLM
from deskside.bench.quality import logprobs
from deskside.bench.quality import perplexity as quality
from deskside.bench.quality.logprobs import Header, LogProbs, LogProbWriter
from deskside.errors import DesksideError
from tests.commands import deskside, refused
from tests.models import rewrite, tiny

CTX = 32
TEXT = "".join(chr(97 + n % 26) + " word"[n % 5] for n in range(400))


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(tiny(), ctx=CTX, threads=1)


@pytest.fixture(scope="module")
def other() -> LLM:
    """The same weights but for rounding."""
    return LLM(tiny(), ctx=CTX, threads=1, ctk="q8_0", ctv="q8_0")


def exact(llm: LLM, windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities (scored, n_vocab) by plain softmax in float64, and the tokens."""
    rows, targets = [], []
    for window in windows:
        z = llm.logits(window[:-1].tolist()).astype(np.float64)[CTX // 2 :]
        rows.append(z - np.log(np.exp(z).sum(axis=1, keepdims=True)))
        targets.append(window[CTX // 2 + 1 :])
    return np.concatenate(rows), np.concatenate(targets)


def saved(llm: LLM, windows: np.ndarray, path: Path) -> quality.Perplexity:
    with LogProbWriter(path, quality.header(llm, windows, "text", "0"), windows) as writer:
        return quality.perplexity(llm, windows, "text", writer=writer)


# the engine's part


@pytest.mark.parametrize("first", [0, 5, 16, 30])
def test_logits_come_in_pieces(llm: LLM, first: int) -> None:
    ids = list(range(10, 10 + CTX))
    pieces = [p.copy() for p in llm.logits_from(ids, first, 7)]
    assert all(1 <= len(p) <= 7 for p in pieces)
    steps = [first + 7] + [7] * CTX
    cuts = np.minimum(np.cumsum(steps), CTX)
    chunks = [n for n in np.diff(cuts, prepend=0).tolist() if n]
    assert np.array_equal(np.concatenate(pieces), llm.logits(ids, chunks)[first:])


# perplexity


def test_perplexity_is_what_its_definition_says(llm: LLM) -> None:
    windows = quality.windows(llm, TEXT, "text")
    got = quality.perplexity(llm, windows, "text")
    logp, targets = exact(llm, windows)
    nll = -logp[np.arange(len(logp)), targets]
    # llama.cpp's formula, from the first two moments
    spread = np.sqrt(((nll**2).mean() - nll.mean() ** 2) / (len(nll) - 1))
    assert got.windows == len(windows) > 3 and got.scored == len(windows) * (CTX - 1 - CTX // 2)
    assert got.ppl == pytest.approx(np.exp(nll.mean()), rel=1e-9)
    assert got.error == pytest.approx(spread * got.ppl, rel=1e-6)


def test_pieces_and_blocks_do_not_change_it(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = quality.windows(llm, TEXT, "text", chunks=2)
    whole = quality.perplexity(llm, windows, "text")
    monkeypatch.setattr(quality, "LOGITS_BYTES", 4 * llm.tape.n_vocab * 5)
    monkeypatch.setattr(quality, "BLOCK", llm.tape.n_vocab * 2)
    pieces = quality.perplexity(llm, windows, "text")
    assert pieces.scored == whole.scored
    assert pieces.ppl == pytest.approx(whole.ppl, rel=1e-3)  # steps of other sizes, other rounding


def test_windows_are_the_text_in_order(llm: LLM) -> None:
    ids = llm.tokenize(TEXT)
    windows = quality.windows(llm, TEXT, "text")
    assert windows.ravel().tolist() == ids[: windows.size]
    assert 0 <= len(ids) - windows.size < CTX
    assert len(quality.windows(llm, TEXT, "text", chunks=2)) == 2


def test_bos_takes_the_first_place_of_every_window(llm: LLM, tmp_path: Path) -> None:
    keys = {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": np.uint32(7)}
    with_bos = LLM(rewrite(tiny(), tmp_path / "m.gguf", metadata=keys), ctx=CTX, threads=1)
    windows = quality.windows(with_bos, TEXT, "text")
    plain = [7, *llm.tokenize(TEXT)]
    assert (windows[:, 0] == 7).all()
    assert windows[:, 1:].tolist() == [plain[i + 1 : i + CTX] for i in range(0, windows.size, CTX)]


def test_control_tokens_in_a_text_are_text(llm: LLM) -> None:
    text = "<|im_end|>" * 40
    assert not set(llm.tokenizer.stop_ids) & set(
        quality.windows(llm, text, "text").ravel().tolist()
    )


def test_an_infinite_logit_is_an_error(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = quality.windows(llm, TEXT, "text")

    def broken(*_: Any) -> Iterator[np.ndarray]:
        yield np.full((CTX - 1 - CTX // 2, llm.tape.n_vocab), np.inf, np.float32)

    monkeypatch.setattr(llm, "logits_from", broken)
    with (
        np.errstate(invalid="ignore"),
        pytest.raises(DesksideError, match="window 1 of text: the probability"),
    ):
        quality.perplexity(llm, windows, "text")


# divergence


def test_divergence_is_what_its_definition_says(llm: LLM, other: LLM, tmp_path: Path) -> None:
    windows = quality.windows(llm, TEXT, "text")
    saved(llm, windows, tmp_path / "ref")
    reference = LogProbs.open(tmp_path / "ref")
    got = quality.perplexity(other, windows, "text", reference=reference).divergence
    assert got is not None
    (p, targets), (q, _) = exact(llm, windows), exact(other, windows)
    kl = (np.exp(p) * (p - q)).sum(axis=1)
    # Rounding moves log p by at most `step`, and KL by E|log p/q| times as much, which is at most
    # KL + sqrt(2 KL), and step ** 2 / 8.
    step = float(reference.rows["step"].max())
    slack = step * (kl + np.sqrt(2 * kl)) + step**2 / 8
    assert 1e-7 < got.mean == pytest.approx(kl.mean(), abs=slack.mean())
    assert got.mean_error == pytest.approx(kl.std(ddof=1) / len(kl) ** 0.5, rel=0.05)
    for value, percent in ((got.median, 50), (got.p95, 95), (got.p99, 99), (got.maximum, 100)):
        assert value == pytest.approx(np.percentile(kl, percent), abs=slack.max())
    same = p.argmax(axis=1) == q.argmax(axis=1)
    assert got.top1 == pytest.approx(same.mean())
    at = np.arange(len(p)), targets
    change, dp = p[at] - q[at], np.exp(q[at]) - np.exp(p[at])
    assert got.dp_mean == pytest.approx(dp.mean(), abs=1e-9)
    assert got.dp_rms == pytest.approx(np.sqrt((dp**2).mean()), rel=1e-3)
    assert got.ppl_reference == pytest.approx(np.exp(-p[at].mean()), rel=1e-6)
    assert got.ppl_ratio == pytest.approx(np.exp(change.mean()), rel=1e-6)
    error = got.ppl_ratio * change.std(ddof=1) / len(change) ** 0.5
    assert got.ppl_ratio_error == pytest.approx(error, rel=1e-3)


def test_a_run_does_not_diverge_from_itself(llm: LLM, tmp_path: Path) -> None:
    windows = quality.windows(llm, TEXT, "text")
    first = saved(llm, windows, tmp_path / "ref")
    reference = LogProbs.open(tmp_path / "ref")
    again = quality.perplexity(llm, windows[:2], "text", reference=reference).divergence
    assert again is not None and again.top1 == 1
    assert again.maximum <= float(reference.rows["step"].max()) ** 2 / 8 * 1.01
    assert again.ppl_ratio == pytest.approx(1, abs=1e-6)
    assert first.divergence is None


# the file


def header(n_vocab: int, **changes: Any) -> Header:
    plain = Header("m.gguf", "0", "0", n_vocab, ctx=8, windows=2, first=4, text="t", deskside="0")
    return structs.replace(plain, **changes)


@pytest.mark.parametrize("scale", [0.0, 1e-3, 1.0, 8.0, 300.0])
def test_a_log_probability_is_within_a_step(scale: float, tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    logits = (scale * rng.standard_normal((6, 500))).astype(np.float32)
    logp = quality.log_softmax(logits)
    targets = rng.integers(0, 500, 6).astype(np.int32)
    with LogProbWriter(tmp_path / "f", header(500), np.zeros((2, 8), np.int32)) as writer:
        for i in range(6):
            writer.write(logp[i : i + 1], targets[i : i + 1])
    file = LogProbs.open(tmp_path / "f")
    assert (tmp_path / "f").stat().st_size == header(500).nbytes
    got = file.log_probs(0, 6)
    step = file.rows["step"].astype(np.float64)[:, None]
    near = logp > logp.max(axis=1, keepdims=True) - logprobs.RANGE
    assert (step <= logprobs.RANGE / 65535 * (1 + 1e-6)).all()
    assert (np.abs(got - logp)[near] <= (step + 1e-9 + 0 * logp)[near]).all()
    # What is cut off is stored as less likely than the rest, with no weight to speak of.
    assert np.exp(got[~near]).sum() < 1e-20
    assert np.exp(got).sum(axis=1) == pytest.approx(np.ones(6))
    assert np.array_equal(file.rows["top"], logp.argmax(axis=1))
    assert file.rows["nll"] == pytest.approx(-logp[np.arange(6), targets], rel=1e-6)


def test_it_appears_complete_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, tokens = tmp_path / "f", np.zeros((2, 8), np.int32)
    row = np.log(np.full((1, 4), 0.25))
    with pytest.raises(KeyboardInterrupt), LogProbWriter(path, header(4), tokens) as writer:
        writer.write(row, np.zeros(1, np.int32))
        raise KeyboardInterrupt
    with (
        pytest.raises(DesksideError, match="5 rows were never written"),
        LogProbWriter(path, header(4), tokens) as writer,
    ):
        writer.write(row, np.zeros(1, np.int32))
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("", (), {"free": 100})())
    with pytest.raises(DesksideError, match=r"f: needs 0\.0 MB.*--chunks"):
        LogProbWriter(path, header(4), tokens)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_takes_no_more_is_one_line(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with (
            pytest.raises(DesksideError, match="f: cannot be written: File too large"),
            LogProbWriter(tmp_path / "f", header(200_000), np.zeros((2, 8), np.int32)) as writer,
        ):
            writer.write(np.full((1, 200_000), -12.0), np.zeros(1, np.int32))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list(tmp_path.iterdir())


def test_damaged_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "f"
    with LogProbWriter(path, header(4), np.zeros((2, 8), np.int32)) as writer:
        writer.write(np.log(np.full((6, 4), 0.25)), np.zeros(6, np.int32))
    good = path.read_bytes()
    for bad, said in (
        (good[:-1], "is it truncated"),
        (good + b"x", "is it truncated"),
        (b"", "not a file"),
        (b"GGUF" + good[4:], "not a file"),
        (good[:8] + b"\x02" + good[9:], "version 2"),
        (good.replace(b'"first"', b'"fifth"'), "header is damaged"),
        (good.replace(b'"n_vocab": 4', b'"n_vocab": 0'), "header is damaged"),
        (good.replace(b'"first": 4', b'"first": 7'), "header is damaged"),
        (good[:12] + b"\xff\xff\xff\x7f" + good[16:], "header is damaged"),
    ):
        path.write_bytes(bad)
        with pytest.raises(DesksideError, match=said):
            LogProbs.open(path)
    with pytest.raises(DesksideError, match="cannot be read"):
        LogProbs.open(tmp_path)


# the command


def test_the_command_saves_and_compares(tmp_path: Path) -> None:
    text, ref = tmp_path / "t.txt", tmp_path / "ref"
    text.write_text(TEXT)
    common = ("-m", tiny(), "-c", CTX, "-t", 1)
    first = deskside("perplexity", text, *map(str, common), "--save-logits", ref)
    assert first.returncode == 0, first.stderr
    assert "PPL = " in first.stdout.decode() and "will have 0.0" in first.stderr.decode()
    second = deskside(
        "perplexity", "-", *map(str, common), "--kl", ref, "--json", stdin=TEXT.encode()
    )
    result = json.loads(second.stdout)
    assert result["divergence"]["top1"] == 1 and result["text"] == "stdin"
    assert f"PPL = {result['ppl']:.4f} ± {result['error']:.4f}" in first.stdout.decode()
    third = deskside("perplexity", text, *map(str, common), "--kl", ref, "-ctk", "q8_0")
    assert "KL, p99" in third.stdout.decode()


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    text, ref = tmp_path / "t.txt", tmp_path / "ref"
    text.write_text(TEXT)
    llm = LLM(tiny(), ctx=CTX, threads=1)
    saved(llm, quality.windows(llm, TEXT, "text", chunks=2), ref)
    run = ("perplexity", text, "-m", tiny(), "-c", str(CTX))
    refused(*run[:4], "-c", "1024", part="less than one window of 1024")
    refused("perplexity", "-", *run[2:], stdin=b"", part="stdin is empty")
    refused("perplexity", "-", *run[2:], stdin=b"caf\xe9", part="stdin is not UTF-8 at byte 3")
    refused("perplexity", tmp_path / "none.txt", *run[2:], part="none.txt")
    refused(*run[:4], "-c", "4", part="-c 4")
    refused(*run, "--chunks", "0", part="--chunks 0")
    refused(*run, "--kl", text, part="t.txt: not a file that --save-logits wrote")
    refused(*run, "--kl", ref, part="--chunks 2")
    refused(*run, "--kl", ref, "--save-logits", ref, part="--save-logits in a first run")
    refused(*run[:4], "-c", "64", "--kl", ref, part="use -c 32")
    refused("perplexity", "-", *run[2:], "--kl", ref, "--chunks", "2",
            stdin=b"other " * 99, part="window 1 has other tokens")  # fmt: skip
    refused(*run, "--save-logits", tmp_path / "no" / "ref", part="cannot be written")
    refused(*run, "--save-logits", tmp_path, part="is a folder")
    refused(*run, "--save-logits", text, part="--save-logits did not write it")
    assert text.read_text() == TEXT
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ref", "t.txt"]


def test_another_vocabulary_is_refused(llm: LLM, tmp_path: Path) -> None:
    windows = quality.windows(llm, TEXT, "text", chunks=1)
    saved(llm, windows, tmp_path / "ref")
    pieces = list(llm.file.metadata["tokenizer.ggml.tokens"])
    pieces[-1] += "x"
    path = rewrite(tiny(), tmp_path / "m.gguf", metadata={"tokenizer.ggml.tokens": pieces})
    renamed = LLM(path, ctx=CTX, threads=1)
    with pytest.raises(DesksideError, match="has another vocabulary"):
        reference = LogProbs.open(tmp_path / "ref")
        quality.perplexity(renamed, windows, "text", reference=reference)
