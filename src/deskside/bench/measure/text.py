"""Cuts prompts with an exact number of tokens from real text.

A token is the `int` of a vocabulary. For an endpoint that takes only text, a token is a `str` with
the average number of characters per token; the length of such prompts is approximate.
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
# Tokenizes text. The second argument says whether it begins a prompt, where bos may be needed.
Encode = Callable[[str, bool], list[Token]]

NONCE_TOKENS = 16
LARGEST_FILE = 4 << 20  # bytes; larger files are data
# Folders beside the standard library that are not part of it.
_LEFT_OUT = frozenset({"test", "tests", "site-packages", "dist-packages", "idlelib"})
_CHARS_A_TOKEN = 4  # first guess; if it is too low, more text is read


class Corpus:
    """The text files of a folder, in the order of their names."""

    def __init__(self, root: Path, files: list[Path]) -> None:
        self.root = root
        self.files = files

    @classmethod
    def of(cls, text: str) -> Corpus:
        """The corpus of a workload's `text`. DesksideError if it holds no text.

        text: "stdlib" or a directory.
        """
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
        """SHA-256 of names and sizes. If it is equal, a seed gives the same prompts."""
        listed = "".join(f"{self._name(p)} {p.stat().st_size}\n" for p in self.files)
        return hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()

    def shuffled(self, key: str) -> Iterator[str]:
        """Endless text: all files, again and again, in an order that `key` decides."""
        files = list(self.files)
        random.Random(key).shuffle(files)
        return map(self._read, itertools.cycle(files))

    def sample(self, n: int, key: str) -> str:
        """The first n characters of `shuffled`."""
        text = ""
        for piece in self.shuffled(key):
            text += piece
            if len(text) >= n:
                break
        return text[:n]

    def in_order(self) -> Iterator[str]:
        """Yield every file once, each after its name."""
        return map(self._read, self.files)

    def _read(self, path: Path) -> str:
        text = path.read_text(encoding="utf-8", errors="replace")
        return f"# {self._name(path)}\n{text}\n"

    def _name(self, path: Path) -> str:
        name = path.relative_to(self.root).as_posix()
        return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _walk(root: Path, left_out: frozenset[str] = frozenset()) -> list[Path]:
    """All files, except hidden ones and those in hidden folders or in `left_out`."""
    found: list[Path] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [f for f in folders if f[0] != "." and f not in left_out]
        found += [Path(folder, name) for name in names if name[0] != "."]
    return sorted(found)


def _is_text(path: Path) -> bool:
    """Whether the file holds text. Empty, binary and unreadable files do not."""
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
        # The end of the part that was read may cut a character.
        beginning[: -4 or None].decode("utf-8")
    except UnicodeDecodeError:
        return False
    return bool(beginning.strip())


def nonce(key: str, encode: Encode) -> list[Token]:
    """NONCE_TOKENS tokens that `key` decides. They begin a prompt, so that no cache knows it."""
    return encode(hashlib.sha512(key.encode()).hexdigest(), True)[:NONCE_TOKENS]


def exactly(n: int, pieces: Iterable[str], encode: Encode) -> list[Token]:
    """The first n tokens of an endless text."""
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
    """n tokens that begin with a nonce. `key` decides both nonce and text."""
    start = nonce(key, encode)[:n]
    rest = n - len(start)
    return start + (exactly(rest, corpus.shuffled(key), encode) if rest else [])


def part(n: int, i: int, key: str, tree: list[Token], encode: Encode) -> list[Token]:
    """The i-th prompt of those that together read the tree, n tokens each. The last is shorter.

    A prompt begins with a nonce, so it holds n - NONCE_TOKENS tokens of the tree.
    """
    step = text_of_part(n)
    return nonce(f"{key} {i}", encode) + tree[i * step : (i + 1) * step]


def text_of_part(n: int) -> int:
    """Tokens of the tree in a prompt of n tokens."""
    return max(1, n - NONCE_TOKENS)


def tokens_of(corpus: Corpus, encode: Encode) -> list[Token]:
    """All of the corpus, in order."""
    return [token for piece in corpus.in_order() for token in encode(piece, False)]
