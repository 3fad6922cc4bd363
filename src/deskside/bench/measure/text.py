"""Prompts of exactly so many tokens, cut from real text.

A token is an `int` of a vocabulary, or, for an endpoint that takes only text, a `str` of as many
characters as its tokens have on average: such prompts are exact but for what the average misses.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import random
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from deskside.bench.workload import STDLIB
from deskside.errors import DesksideError

Token = int | str
# Text to tokens; `first` for the beginning of a prompt, where a bos token may belong.
Encode = Callable[[str, bool], list[Token]]

NONCE_TOKENS = 16
LARGEST_FILE = 4 << 20  # bytes; larger files are data
# Folders of the standard library's own that hold no library, or not only Python's.
_LEFT_OUT = frozenset({"test", "tests", "site-packages", "dist-packages", "idlelib"})
_CHARS_A_TOKEN = 4  # to begin with; more is read where that is too few


class Corpus:
    """The text files of a folder, in the order of their names."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root = root
        self.files = files

    @classmethod
    def of(cls, text: str) -> Corpus:
        """A workload's `text`: "stdlib" or a directory. DesksideError if nothing is there."""
        if text == STDLIB:
            root = Path(sysconfig.get_path("stdlib"))
            files = [p for p in _walk(root, _LEFT_OUT) if p.suffix == ".py"]
            advice = "this Python has no sources; name a directory with --text"
        else:
            root = Path(text)
            if not root.is_dir():
                raise DesksideError(f"--text {text}: no such directory")
            files, advice = _walk(root), "there is no text in it"
        corpus = cls(root, [p for p in files if _is_text(p)])
        if not corpus.files:
            raise DesksideError(f"{root}: {advice}")
        return corpus

    def digest(self) -> str:
        """SHA-256 of the names and sizes: whether prompts of a seed are the same again."""
        listed = "".join(f"{self._name(p)} {p.stat().st_size}\n" for p in self.files)
        return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()

    def shuffled(self, key: str) -> Iterator[str]:
        """Text without end: the files in an order that `key` decides, over and over."""
        files = list(self.files)
        random.Random(key).shuffle(files)
        return map(self._read, itertools.cycle(files))

    def sample(self, n: int, key: str) -> str:
        """n characters of `shuffled`."""
        text = ""
        for piece in self.shuffled(key):
            text += piece
            if len(text) >= n:
                break
        return text[:n]

    def in_order(self) -> Iterator[str]:
        """Every file once, under its name."""
        return map(self._read, self.files)

    def _read(self, path: Path) -> str:
        text = path.read_text(encoding="utf-8", errors="replace")
        return f"# {self._name(path)}\n{text}\n"

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    """All files that are not hidden, nor below a hidden folder or one of `left_out`."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f[0] != "." and f not in left_out]
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found)


def _is_text(path: Path) -> bool:
    """Whether the file is neither empty nor data. One that cannot be read is left out."""
    try:
        if not path.is_file() or not 0 < path.stat().st_size <= LARGEST_FILE:
            return False
        with path.open("rb") as file:
            beginning = file.read(4096)
    except OSError:
        return False
    if b"\0" in beginning:
        return False
    try:
        # a character may be cut by the end of what was read
        beginning[: -4 or None].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(beginning.strip())


def nonce(key: str, encode: Encode) -> list[Token]:
    """The beginning of a prompt that no cache knows: NONCE_TOKENS tokens, decided by `key`."""
    return encode(hashlib.sha512(key.encode()).hexdigest(), True)[:NONCE_TOKENS]


def exactly(n: int, pieces: Iterable[str], encode: Encode) -> list[Token]:
    """The first n tokens of a text without end."""
    text, wanted = "", _CHARS_A_TOKEN * n
    for piece in pieces:
        text += piece
        if len(text) < wanted:
            continue
        tokens = encode(text[:wanted], False)
        if len(tokens) >= n:
            return tokens[:n]
        wanted = max(len(text), wanted) + _CHARS_A_TOKEN * (n - len(tokens) + 8)
    raise ValueError("the text ended")


def fresh(n: int, key: str, corpus: Corpus, encode: Encode) -> list[Token]:
    """n tokens that begin with a nonce; `key` decides nonce and text."""
    start = nonce(key, encode)[:n]
    rest = n - len(start)
    return start + (exactly(rest, corpus.shuffled(key), encode) if rest else [])


def part(n: int, i: int, key: str, tree: list[Token], encode: Encode) -> list[Token]:
    """The i-th of the prompts of n tokens that together read the whole tree; the last is shorter.

    Each begins with a nonce, so that it holds n - NONCE_TOKENS tokens of the tree.
    """
    step = text_of_part(n)
    return nonce(f"{key} {i}", encode) + tree[i * step : (i + 1) * step]


def text_of_part(n: int) -> int:
    """Tokens of the tree in a prompt of n tokens."""
    return max(1, n - NONCE_TOKENS)


def tokens_of(corpus: Corpus, encode: Encode) -> list[Token]:
    """All of the corpus, in order."""
    return [token for piece in corpus.in_order() for token in encode(piece, False)]
