"""Text while it is generated: bytes that are no character yet, stop strings that may follow."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from deskside.errors import DesksideError
from deskside.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of tokens as they come; never half a character.

    Bytes of an unfinished character are held until the next token completes it. A byte sequence
    that cannot become a character turns into U+FFFD as soon as that is certain, so the pieces
    joined equal `Tokenizer.decode` of all the tokens.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_control: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_control = skip_control
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that `token` completes; may be empty."""
        if self._skip_control and self._tokenizer.is_control(token):
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """The end of the stream: U+FFFD if it stopped inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string to be completed.

    However the stream is chunked, the emitted text is the same: the stop string that ends first
    counts (the longest of those ending together), and text that may be the beginning of one is
    held back until it is settled.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if "" in self._stops:
            raise DesksideError("stop: an empty stop string would stop at once")
        self._held = ""
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text safe to show, whether a stop string was reached). After a hit: ("", True)."""
        if self.hit:
            return "", True
        text = self._held + text
        found = [(at + len(s), at) for s in self._stops if (at := text.find(s)) >= 0]
        if found:
            self.hit, self._held = True, ""
            return text[: min(found)[1]], True
        keep = max((_overlap(text, s) for s in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """The end of the stream: what was held back after all."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning, not the whole, of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
