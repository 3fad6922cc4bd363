"""Ceilings: the model's bytes and multiply-adds, divided by sampled limits of the machine."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deskside.bench.record import Ceiling, Run
from deskside.machine import rates
from deskside.tape.cost import Work, bound

# A sample of the limits stays valid for HOLDS seconds, and for SHARE times as long as it took. So
# many short runs are not slowed down by sampling.
HOLDS = 5.0
SHARE = 10.0


@dataclass(frozen=True)
class Roof:
    """What a target's ceiling depends on. `ubatch`: tokens that prefill computes at once."""

    work: Work
    threads: int
    ubatch: int
    ctk: str
    ctv: str
    isa: str = ""

    def decode_bytes(self, depth: float) -> float:
        """Bytes that decode reads per token, with `depth` tokens in the context."""
        # Average the caches of both types: half of each is keys, half is values.
        kinds = (self.ctk, self.ctv)
        return sum(self.work.decode(round(depth), kind)["bytes"] for kind in kinds) / len(kinds)

    def over(self, run: Run, bandwidth: float, compute: float) -> Ceiling:
        """The ceiling of a run.

        bandwidth: bytes per second. compute: int8 multiply-adds per second. Both are sampled close
        to the run.
        """
        found = Ceiling(bandwidth=bandwidth, compute=compute)
        if run.generated_tokens > 1:
            depth = run.depth + run.generated_tokens / 2
            found.decode_bytes = self.decode_bytes(depth)
            needed = {
                "bytes": found.decode_bytes,
                "macs": self.work.macs + self.work.head_macs,
            }
            found.decode_rate, found.decode_limit = bound(needed, bandwidth, compute)
        if run.prompt_tokens:
            needed = self.work.prefill(run.prompt_tokens, self.ubatch)
            found.prefill_macs = needed["macs"]
            found.prefill_rate, found.prefill_limit = bound(needed, bandwidth, compute)
        return found


class Limits:
    """The last sample of the machine's limits. Nothing else may run during a sample."""

    def __init__(self, threads: int, isa: str = "") -> None:
        self._threads, self._isa = threads, isa
        self._until = 0.0
        self.bandwidth = self.compute = 0.0

    def refresh(self) -> None:
        """Sample again, unless the last sample is still valid."""
        began = time.monotonic()
        if began < self._until:
            return
        self.bandwidth = rates.bandwidth(self._threads)
        self.compute = rates.compute(self._threads, self._isa)
        ended = time.monotonic()
        self._until = ended + max(HOLDS, SHARE * (ended - began))
