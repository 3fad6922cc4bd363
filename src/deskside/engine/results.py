"""Results of a generation: chunks of text, the completion, timings."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timings:
    """Tokens and seconds of each phase.

    prompt_tokens      prompt tokens that prefill computed
    cached_tokens      prompt tokens that were in the cache already
    prompt_seconds     prefill of `prompt_tokens` tokens
    first_seconds      from the call to the first generated token
    generated_tokens   tokens of the answer
    decode_seconds     from the first to the last generated token: `generated_tokens - 1` steps
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    prompt_seconds: float = 0.0
    first_seconds: float = 0.0
    generated_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Computed prompt tokens per second; 0 if nothing was computed."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after the first; 0 for a single token."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0


@dataclass(frozen=True)
class Chunk:
    """One piece of an answer: a token, and the text that is final since then (may be empty).

    token: None for text that was held back and is released at the end.
    """

    token: int | None
    text: str


@dataclass(frozen=True)
class Completion:
    """A finished answer.

    stop_reason: "stop" (end token or stop string), "length" (max_tokens), "context" (full), or the
    reason given to `Sequence.end`.
    seed: of the sampler, to repeat the answer.
    """

    text: str
    tokens: list[int]
    timings: Timings
    stop_reason: str
    seed: int
