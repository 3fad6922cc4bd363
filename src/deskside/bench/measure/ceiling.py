"""How fast the machine allows a run to be: the model's bytes and products under sampled limits."""

from __future__ import annotations

import time
from dataclasses import dataclass

from deskside.bench.record import Ceiling, Run
from deskside.machine import rates
from deskside.tape.cost import Work, bound

# A sample holds for so many seconds, and for so many times as long as it took: short runs are many,
# and most of the time should go to them.
HOLDS = 5.0
SHARE = 10.0


@dataclass(frozen=True)
class Roof:
    """What decides a target's ceiling; `ubatch` tokens are computed at once in prefill."""

    work: Work
    threads: int
    ubatch: int
    ctk: str
    ctv: str
    isa: str = ""

    def decode_bytes(self, depth: float) -> float:
        """Bytes that a token reads with `depth` tokens in the context."""
        # A cache of keys and values of one type is the sum of both halves.
        kinds = (self.ctk, self.ctv)
        return sum(self.work.decode(round(depth), kind)["bytes"] for kind in kinds) / len(kinds)

    def over(self, run: Run, bandwidth: float, compute: float) -> Ceiling:
        """bandwidth in bytes, compute in int8 multiply-adds per second, both sampled beside it."""
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
    """The machine's limits as last sampled; nothing else may run meanwhile."""

    def __init__(self, threads: int, isa: str = "") -> None:
        self._threads, self._isa = threads, isa
        self._until = 0.0
        self.bandwidth = self.compute = 0.0

    def refresh(self) -> None:
        """Sample again, unless that has been done just now."""
        began = time.monotonic()
        if began < self._until:
            return
        self.bandwidth = rates.bandwidth(self._threads)
        self.compute = rates.compute(self._threads, self._isa)
        ended = time.monotonic()
        self._until = ended + max(HOLDS, SHARE * (ended - began))
