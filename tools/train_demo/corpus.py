"""Collect the training text that ships with Python: library sources and the language topics.

Everything comes from the running interpreter's own standard library (PSF licence); nothing is
downloaded. Files are held out by a hash of their path, so the split is the same on every run.
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

STDLIB = Path(sysconfig.get_path("stdlib"))
HELD_OUT_PERCENT = 3
HELD_OUT_SALT = "deskside-demo-1"
PIECE_CHARS = 6000
MAX_FILE_BYTES = 320_000
# Third-party trees, character tables, and files that hold deliberately broken or generated text.
EXCLUDED = re.compile(
    r"site-packages/|__pycache__|^encodings/|^_sysconfigdata|^pydoc_data/|^ensurepip/_bundled"
    r"|^lib2to3/tests/data|bad_|badsyntax|^test/encoded_modules|^test/test_unicode|^turtledemo/"
    r"|^test/(cjk|multibyte|xmltestdata|crashers|test_ucn|test_codec)|^html/entities|^msilib"
)
TEST = re.compile(r"(^|/)(tests?|idle_test)/")


@dataclass(frozen=True)
class SourceFile:
    """A standard-library source; ``name`` is its path below the library, with forward slashes."""

    name: str
    text: str

    @property
    def is_test(self) -> bool:
        return TEST.search(self.name) is not None

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def words(text: str) -> list[str]:
    """Keeps long word lists readable in the source."""
    return text.split()


def hashed_percent(key: str) -> float:
    """A stable pseudo-random number in [0, 100) for a string."""
    digest = hashlib.sha256(f"{HELD_OUT_SALT}:{key}".encode()).digest()
    return int.from_bytes(digest[:8], "little") / 2**64 * 100


def is_held_out(key: str) -> bool:
    return hashed_percent(key) < HELD_OUT_PERCENT


def source_files() -> Iterator[SourceFile]:
    """All usable sources of the standard library in sorted order."""
    for path in sorted(STDLIB.rglob("*.py")):
        name = path.relative_to(STDLIB).as_posix()
        if EXCLUDED.search(name) or path.stat().st_size > MAX_FILE_BYTES:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        if len(text) > 200:
            yield SourceFile(name, text.replace("\t", "    "))


def language_topics() -> dict[str, str]:
    """The language-reference topics that ``help()`` shows, as plain text."""
    from pydoc_data.topics import topics

    return {name: text.strip() + "\n" for name, text in topics.items()}


def pieces(text: str, limit: int = PIECE_CHARS) -> Iterator[str]:
    """Split a file before top-level statements into pieces of about ``limit`` characters.

    The pieces are shuffled when training; starting them at ``def``, ``class`` or a decorator also
    teaches the model to begin a text that way.
    """
    begin = 0
    starts = [
        m.start()
        for m in re.finditer(r"^(?=(?:async def|def|class|@|[A-Z*][^\n]*\n[*=]))", text, re.M)
    ]
    for start, following in pairwise([*starts, len(text)]):
        inside_decorated = text[:start].rstrip("\n").rsplit("\n", 1)[-1].startswith("@")
        if start > begin and following - begin > limit and not inside_decorated:
            yield text[begin:start].strip("\n") + "\n"
            begin = start
    yield text[begin:].strip("\n") + "\n"
