"""What a generation gives back: chunks of text, a completion, its clocks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Timings:
    """Seconds on the clocks that are kept apart.

    prompt_seconds     prefill of `prompt_tokens` tokens (`cached_tokens` more were in the cache)
    first_seconds      from the call to the first generated token
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
        """Prompt tokens per second; 0 where nothing was computed."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second after the first; 0 for a single token."""
        steps = self.generated_tokens - 1
        return steps / self.decode_seconds if steps > 0 and self.decode_seconds else 0.0


@dataclass(frozen=True)
class Chunk:
    """A step of generation: the token and the text that it made certain (may be empty)."""

    token: int | None
    text: str


@dataclass(frozen=True)
class Completion:
    """stop_reason: "stop" (end token or stop string), "length" (max_tokens) or "context"."""

    text: str
    tokens: list[int]
    timings: Timings
    stop_reason: str
    seed: int
