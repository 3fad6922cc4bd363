"""When the tokens of a stream came, and the clocks of a run that follow."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

from deskside.bench.record import Run
from deskside.server.client import number


@dataclass
class Arrivals:
    """When tokens came: an event's time and how many of them it brought."""

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
        """Seconds from the request to the first token."""
        return self.events[0][0] - self.began if self.events else None

    def gaps(self) -> list[float]:
        """Seconds between tokens; those that came together share the time since the last event."""
        if not self.events:
            return []
        found = [0.0] * (self.events[0][1] - 1)
        for (before, _), (at, n) in itertools.pairwise(self.events):
            found += [(at - before) / n] * n
        return found


def timed(came: Arrivals, timings: Any, total: float, n: int | None = None) -> Run:
    """A run with its clocks: the server's where it tells them, else those of arrival.

    n: tokens generated, if the server says so; where that differs from what arrived, the gaps
    between tokens are not known.
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
