"""Arrival times of a stream's tokens, and the times of a run that follow from them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from deskside.bench.record import Run
from deskside.server.client import number


@dataclass
class Arrivals:
    """Arrival times of events, and the number of tokens in each."""

    began: float
    events: list[tuple[float, int]] = field(default_factory=list)

    def add(self, at: float, n: int) -> None:
        if n > 0:
            self.events.append((at, n))

    @property
    def n(self) -> int:
        return sum(n for _, n in self.events)

    @property
    def first(self) -> float | None:
        """Seconds from the request to the first token; None before it."""
        return self.events[0][0] - self.began if self.events else None

    def gaps(self) -> list[float]:
        """Seconds between tokens. Tokens of one event share the time since the last event."""
        if not self.events:
            return []
        found = [0.0] * (self.events[0][1] - 1)
        for (before, _), (at, n) in itertools.pairwise(self.events):
            found += [(at - before) / n] * n
        return found


def timed(came: Arrivals, timings: Any, total: float, n: int | None = None) -> Run:
    """A run with its times: those that the server reports, else those of arrival.

    n: generated tokens that the server reports. If fewer or more arrived, the gaps are unknown.
    """
    made = came.n if n is None else n
    gaps = came.gaps() if made == came.n else []
    arrived = came.events[-1][0] - came.events[0][0] if came.events else 0.0
    prefill, decode = number(timings, "prompt_ms"), number(timings, "predicted_ms")
    run = Run(
        index=0,
        name="",
        generated_tokens=made,
        first_seconds=came.first,
        decode_seconds=arrived,
        total_seconds=total,
        gaps=gaps,
        clock="stream",
    )
    if prefill is not None and decode is not None:
        run.clock = "server"
        run.prefill_seconds, run.decode_seconds = prefill / 1000, decode / 1000
    return run
