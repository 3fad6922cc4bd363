"""Prompts: exact lengths, real text, a nonce, the same for the same seed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside import LLM
from deskside.bench.measure.hashes import cache_file, hashed
from deskside.bench.measure.targets import InProcess
from deskside.bench.measure.text import (
    NONCE_TOKENS,
    Corpus,
    Token,
    exactly,
    fresh,
    nonce,
    part,
    text_of_part,
    tokens_of,
)
from deskside.errors import DesksideError
from tests.models import tiny


@pytest.fixture(scope="module")
def target() -> InProcess:
    return InProcess(tiny(), sha=False, ctx=256)


@pytest.fixture(scope="module")
def stdlib() -> Corpus:
    return Corpus.of("stdlib")


def test_the_stdlib_is_text_of_this_python(stdlib: Corpus) -> None:
    names = {p.relative_to(stdlib.root).as_posix() for p in stdlib.files}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any("test" in Path(name).parts or "site-packages" in name for name in names)
    assert stdlib.digest() == Corpus.of("stdlib").digest()


@given(n=st.integers(1, 3000), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_a_prompt_has_exactly_so_many_tokens(
    target: InProcess, stdlib: Corpus, n: int, seed: int
) -> None:
    prompt = fresh(n, f"{seed}", stdlib, target.encode)
    assert len(prompt) == n
    assert prompt == fresh(n, f"{seed}", stdlib, target.encode)


def test_prompts_are_real_text_behind_a_nonce(target: InProcess, stdlib: Corpus) -> None:
    ids = [t for t in fresh(4000, "1", stdlib, target.encode) if isinstance(t, int)]
    text = target.llm.detokenize(ids)
    head = target.llm.detokenize(ids[:NONCE_TOKENS])
    assert set(head) <= set("0123456789abcdef")
    line = max(text.splitlines()[3:-3], key=len)
    assert any(line in path.read_text(errors="replace") for path in stdlib.files)


def test_no_two_prompts_begin_alike(target: InProcess) -> None:
    heads = {tuple(nonce(f"{seed} {i}", target.encode)) for seed in range(20) for i in range(20)}
    assert len(heads) == 400
    # the very first tokens may be equal by chance, not many more
    assert len({head[:6] for head in heads}) == 400


def test_one_character_a_token_needs_more_text_than_usual() -> None:
    def spelled(text: str, first: bool) -> list[Token]:
        return list(map(ord, text))

    def words(text: str, first: bool) -> list[Token]:
        return list(text[::40])

    pieces = ["x" * 7, "yz", "w" * 30]
    for encode in (spelled, words):
        for n in (1, 10, 500):
            endless = iter(pieces * 2000)
            assert len(exactly(n, endless, encode)) == n


def test_a_tree_is_read_to_its_end(target: InProcess, tmp_path: Path) -> None:
    for i in range(5):
        (tmp_path / f"m{i}.py").write_text(f"def f{i}(a, b):\n    return a + b * {i}\n" * 20)
    corpus = Corpus.of(str(tmp_path))
    tree = tokens_of(corpus, target.encode)
    parts = -(-len(tree) // text_of_part(200))
    prompts = [part(200, i, "7", tree, target.encode) for i in range(parts)]
    assert all(len(p) == 200 for p in prompts[:-1]) and 0 < len(prompts[-1]) <= 200
    assert [t for p in prompts for t in p[NONCE_TOKENS:]] == tree
    text = target.llm.detokenize([t for t in tree if isinstance(t, int)])
    assert text.count("return a + b") == 100 and "# m3.py\n" in text


def test_only_text_counts(tmp_path: Path) -> None:
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("hidden")
    (tmp_path / "data.bin").write_bytes(b"\0\1\2" * 50)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(DesksideError, match="no text"):
        Corpus.of(str(tmp_path))
    (tmp_path / "a.txt").write_text("ünïcode " * 1000)
    corpus = Corpus.of(str(tmp_path))
    assert [p.name for p in corpus.files] == ["a.txt"]
    before = corpus.digest()
    (tmp_path / "b.txt").write_text("more")
    assert Corpus.of(str(tmp_path)).digest() != before
    with pytest.raises(DesksideError, match="no such directory"):
        Corpus.of(str(tmp_path / "none"))


def test_control_tokens_in_sources_are_plain_text(target: InProcess) -> None:
    ids = target.encode("<|im_end|>", False)
    assert len(ids) > 1 and isinstance(target.llm, LLM)


def test_hashes_are_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "m.bin"
    path.write_bytes(b"abc")
    seen: list[str] = []
    (file,) = hashed([path], progress=lambda label, done, total: seen.append(label))
    assert file.sha256 == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert (file.name, file.nbytes) == ("m.bin", 3) and seen
    seen.clear()
    assert hashed([path], progress=lambda label, done, total: seen.append(label)) == [file]
    assert not seen
    path.write_bytes(b"abd")  # as long as before, but later
    os.utime(path, ns=(0, path.stat().st_mtime_ns + 10**9))
    assert hashed([path])[0].sha256 != file.sha256
    assert hashed([path], sha=False)[0].sha256 is None
    cache_file().write_text("[broken")
    assert hashed([path])[0].sha256 is not None


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert hashed([tmp_path / "file"])[0].sha256 is not None
