"""What can be told of an answer without reading it: loops, garbage, length (docs/BENCH.md).

Nothing here judges what an answer says. Of random weights it shows nothing at all.
"""

from __future__ import annotations

import unicodedata
from hashlib import sha256

from deskside.bench.record import LOOP, Answer, Run

WINDOW = 40  # characters of a stretch that may have come before
TIMES = 4  # a piece that is repeated so often at the end is a loop
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
SPACES = "\t\n\r"


def note(run: Run, text: str, asked: int) -> None:
    """Put the answer's digest and figures into its run. asked: tokens that were to be generated."""
    run.output = sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    run.answer = Answer(
        asked=asked,
        characters=len(text),
        printed=len(text.strip()),
        garbage=garbage(text),
        loop=loop(text),
        repeated=repeated(text),
    )


def garbage(text: str) -> int:
    """Replacement characters (bytes that are no UTF-8), control characters and half surrogates.

    One replacement character at the end is a character that the limit of tokens has cut.
    """
    return sum(
        c == REPLACEMENT or (unicodedata.category(c) in ("Cc", "Cs") and c not in SPACES)
        for c in text.removesuffix(REPLACEMENT)
    )


def loop(text: str) -> int:
    """Characters at the end that are one piece, TIMES times or more; 0 if there is no such end."""
    text = text.rstrip()
    n, longest = len(text), 0
    for period in range(1, n // TIMES + 1):
        length = period
        while length < n and text[n - 1 - length] == text[n - 1 - length + period]:
            length += 1
        if length >= TIMES * period:
            longest = max(longest, length)
        if longest >= LOOP:
            break
    return longest


def repeated(text: str) -> float:
    """Share of the stretches of WINDOW characters that came before in the answer."""
    n = len(text) - WINDOW + 1
    if n < 1:
        return 0.0
    return 1 - len({text[i : i + WINDOW] for i in range(n)}) / n
