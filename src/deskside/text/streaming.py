"""Text while it is generated: holds back unfinished characters and possible stop strings."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from deskside.errors import DesksideError
from deskside.text.tokenizer import Tokenizer


class StreamDecoder:
    """Text of tokens as they come, in whole characters.

    Bytes of an unfinished character are held until the next token completes it. Bytes that cannot
    become a character turn into U+FFFD as soon as that is certain. So the pieces, joined, equal
    `Tokenizer.decode` of all tokens.
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
        """End the stream. Returns U+FFFD if it stopped inside a character, else nothing."""
        return self._utf8.decode(b"", final=True)


class StopStrings:
    """Cuts a stream of text before the first stop string to be completed.

    The emitted text does not depend on how the stream is chunked. The stop string that ends first
    counts; of several that end together, the longest. Text that may begin a stop string is held
    back until that is certain.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        self._stops = tuple(stops)
        if "" in self._stops:
            raise DesksideError("stop: an empty stop string would stop at once")
        self._held = ""
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """(text to show, whether a stop string was reached). After a hit: ("", True)."""
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
        """End the stream. Returns the text held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a proper prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
