"""Chooses the tokens of the next step, and hands the logits back to their sequences."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from deskside.engine.load import Part
from deskside.engine.results import Chunk
from deskside.engine.sequence import Sequence

Scheduled = list[tuple[Sequence, Part]]


def schedule(
    sequences: Iterable[Sequence],
    max_tokens: int,
    max_outputs: int,
    max_prefill: int | None = None,
) -> Scheduled:
    """The parts of the next step. Skips sequences that are done.

    Decoding sequences come first, with one token each. Pieces of prompts fill the rest of the step,
    in the given order.

    max_tokens: most tokens of a step. max_outputs: most tokens whose logits are wanted.
    max_prefill: most prompt tokens in a step that also decodes, so that decoding waits less.
    """
    left = [s for s in sequences if not s.done]
    decoding, prefilling = [s for s in left if s.tokens], [s for s in left if not s.tokens]
    parts: Scheduled = []
    for s in decoding[: min(max_tokens, max_outputs)]:
        parts.append((s, s.next_part(1)))
    room = max_tokens - len(parts)
    if parts and max_prefill is not None:
        room = min(room, max_prefill)
    for s in prefilling:
        if room == 0 or len(parts) == max_outputs:
            break
        parts.append((s, s.next_part(room)))
        room -= len(parts[-1][1].tokens)
    return parts


def accept(parts: Scheduled, logits: NDArray[np.float32]) -> list[tuple[Sequence, Chunk]]:
    """Hand each sequence its row of the logits (wanted rows, n_vocab), if it wanted one.

    Returns the text that became final. DamagedLogits for NaN or +Inf.
    """
    chunks, rows = [], iter(logits)
    for s, part in parts:
        made = s.computed(next(rows) if len(part.outputs) else None)
        chunks += [(s, chunk) for chunk in made]
    return chunks
