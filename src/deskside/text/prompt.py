"""A chat as token ids, and where a later turn may diverge from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from deskside.text.tokenizer import CONTROL, Tokenizer

THINK = "<think>"
TAIL = 40  # an opener begins within this many characters of the end


@dataclass(frozen=True)
class Prompt:
    """Token ids to continue.

    marks: lengths at which a later prompt may diverge, so a checkpoint is worth its memory there.
    thinks: whether the answer begins inside <think>.
    """

    tokens: Sequence[int]
    marks: tuple[int, ...] = ()
    thinks: bool = False


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(np.not_equal(a[:n], b[:n]))
    return int(differing[0]) if len(differing) else n


def chat_prompt(tokenizer: Tokenizer, text: str, held: Sequence[int] = ()) -> Prompt:
    """The prompt of a rendered chat, up to the assistant's opener.

    held: tokens computed for the chat so far. Tokenizing an answer's text may give other tokens
    than those generated. If the text is the same, the prompt keeps the computed tokens.

    Marks are set at two places. One is after the opener and before <think>, because a template
    drops the thinking of earlier answers; without <think>, at the end of the last message, for the
    same prompt again. The other is the end of the message before the last one, which the user may
    ask in another way.
    """
    canonical = tokenizer.encode(text, special=True, add_bos=False)
    tokens = _as_computed(tokenizer, canonical, held)
    opener, think = len(tokens), text.rfind(THINK, max(0, len(text) - TAIL))
    if think >= 0:
        before = tokenizer.encode(text[:think], special=True, add_bos=False)
        opener -= len(canonical) - common(canonical, before)
    ends = [i + 1 for i, token in enumerate(tokens) if token in tokenizer.stop_ids]
    if opener == len(tokens) and ends:  # nothing follows it: the same prompt may come again
        opener = ends[-1]
    return Prompt(tokens, (*ends[-2:-1], opener), text.rstrip("\n").endswith(THINK))


def _as_computed(tokenizer: Tokenizer, tokens: list[int], held: Sequence[int]) -> list[int]:
    """`tokens`, with the held ones for as long as both spell the same text. The held part ends
    before a control token, because no merge crosses one."""
    same = common(tokens, held)
    if same == len(held) or same == len(tokens):
        return tokens
    # By bytes from there on: where a control token begins in the text, where a held token ends.
    begins: dict[int, int] = {}
    at = 0
    for i in range(same, len(tokens)):
        if tokenizer.types[tokens[i]] == CONTROL:
            begins[at] = i
        at += len(tokenizer.token_bytes(tokens[i]))
    wanted = b"".join(map(tokenizer.token_bytes, tokens[same:]))
    at, kept = 0, 0
    for n, token in enumerate(held[same:], start=1):
        piece = tokenizer.token_bytes(token)
        if wanted[at : at + len(piece)] != piece:
            break
        at += len(piece)
        if at in begins:
            kept = n
            rest = begins[at]
    return [*held[: same + kept], *tokens[rest:]] if kept else tokens
