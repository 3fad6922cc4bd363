"""One answer being generated: prompt, tokens, text, timings.

A sequence knows no file and no backend. Whoever computes its tokens hands it the logits.
"""

from __future__ import annotations

import time
from collections.abc import Collection

import numpy as np
from numpy.typing import NDArray

from deskside.engine.load import Part
from deskside.engine.results import Chunk, Completion, Timings
from deskside.engine.sampler import Sampler, SamplingParams
from deskside.engine.slots import Slot
from deskside.text.streaming import StopStrings, StreamDecoder
from deskside.text.tokenizer import Tokenizer

CLOSE = 8  # tokens; to compute so few again costs less than a step of their own


class Sequence:
    """A prompt and its answer so far. Only one thread at a time may use it.

    prompt: (n,) int32 token ids.
    ctx: tokens that a slot holds.
    banned: (n_vocab,) bool, ids that are never chosen.
    marks: prompt lengths at which to keep a checkpoint.
    began: `time.perf_counter()` when the request came; None = now.

    `start` gives it a slot. Then repeat until `done`: `next_part`, compute it, `computed`.
    `stop_reason` is "stop", "length", "context", or the reason given to `end`.
    """

    def __init__(
        self,
        prompt: NDArray[np.int32],
        params: SamplingParams,
        tokenizer: Tokenizer,
        *,
        ctx: int,
        banned: NDArray[np.bool_],
        marks: Collection[int] = (),
        began: float | None = None,
    ) -> None:
        self.prompt = prompt
        self.slot: Slot | None = None
        self.tokens: list[int] = []
        self.timings = Timings()
        self.stop_reason = ""
        self._began = time.perf_counter() if began is None else began
        self._prefill_began = self._first = 0.0
        self._marks = sorted(marks)
        self._wants_checkpoints = bool(marks)
        self._tokenizer = tokenizer
        self._stop_ids = tokenizer.stop_ids
        if params.ignore_eos:
            banned = banned.copy()
            banned[list(self._stop_ids)] = True
        self._sampler = Sampler(params, len(banned), banned)
        for token in prompt.tolist():
            self._sampler.accept(token)
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(params.stop)
        room, limit = ctx - len(prompt), params.max_tokens
        limit = room + 1 if limit is None or limit < 0 else min(limit, room + 1)
        self._limit = limit
        self._at_limit = "length" if limit <= room else "context"

    @property
    def seed(self) -> int:
        return self._sampler.seed

    @property
    def done(self) -> bool:
        return bool(self.stop_reason)

    def start(self, slot: Slot) -> None:
        """Take a slot, and reuse what it holds of the prompt."""
        self.slot = slot
        self._prefill_began = time.perf_counter()
        n = self.timings.cached_tokens = slot.reuse(self.prompt.tolist())
        self.timings.prompt_tokens = len(self.prompt) - n
        if n and any(n < mark <= n + CLOSE for mark in self._marks):
            slot.save()  # close enough to the mark, and saves a step
            self._marks = [mark for mark in self._marks if mark > n + CLOSE]

    def next_part(self, max_tokens: int) -> Part:
        """The next tokens to compute, at most `max_tokens`.

        A step ends at a mark. Only the last known token wants logits.
        """
        assert self.slot is not None
        at = len(self.slot.tokens)
        if at >= len(self.prompt):
            return Part(self.slot, np.array(self.tokens[-1:], np.int32), np.array([0]))
        stop = next((mark for mark in self._marks if mark > at), len(self.prompt))
        piece = self.prompt[at : min(at + max_tokens, stop, len(self.prompt))]
        whole = at + len(piece) == len(self.prompt)
        return Part(self.slot, piece, np.arange(len(piece) - whole, len(piece)))

    def computed(self, logits: NDArray[np.float32] | None) -> list[Chunk]:
        """Note that the part of `next_part` is computed, and sample the next token.

        logits: float32 (n_vocab,); None if the part wanted none.
        Returns the text that became final. DamagedLogits leaves the answer as it was.
        """
        assert self.slot is not None
        if len(self.slot.tokens) in self._marks:
            self.slot.save()
        if logits is None:
            return []
        if not self.tokens:
            self.timings.prompt_seconds = time.perf_counter() - self._prefill_began
            if self._limit == 0:
                return self._end(self._at_limit)
        token = self._sampler.sample(logits)
        now = time.perf_counter()
        if not self.tokens:
            self._first = now
            self.timings.first_seconds = now - self._began
        if token in self._stop_ids:
            return self._end("stop")
        return self._accept(token, now)

    def _accept(self, token: int, now: float) -> list[Chunk]:
        assert self.slot is not None
        if self._wants_checkpoints and self._tokenizer.token_bytes(token).isspace():
            self.slot.save(replace=True)  # a template trims the spaces that end an answer
        self._sampler.accept(token)
        self.tokens.append(token)
        self.timings.decode_seconds = now - self._first
        self.timings.generated_tokens = len(self.tokens)
        text, hit = self._stops.push(self._decoder.push(token))
        chunks = [Chunk(token, text)]
        if hit:
            self.stop_reason = "stop"
        elif len(self.tokens) == self._limit:
            chunks += self._end(self._at_limit)
        return chunks

    def _end(self, reason: str) -> list[Chunk]:
        """End, and release the text that was held back, if there is any."""
        text, hit = self._stops.push(self._decoder.flush())
        self.stop_reason = "stop" if hit else reason
        text += "" if hit else self._stops.flush()
        return [Chunk(None, text)] if text else []

    def end(self, reason: str) -> None:
        """Stop here, between two steps. Another sequence may take the slot from now on."""
        self.stop_reason = self.stop_reason or reason

    def completion(self, text: str) -> Completion:
        """The result so far, whose chunks joined are `text`."""
        return Completion(text, self.tokens, self.timings, self.stop_reason, self.seed)
