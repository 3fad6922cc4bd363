"""How the host computes: options that pass from an engine to the native program as they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostOptions:
    """n_threads: for steps of one token a sequence. n_threads_batch: for longer ones, 0 for
    n_threads. isa: a compiled instruction set, None for the fastest that this machine runs.
    huge_pages, numa: how memory for the weights is taken, as in `EngineConfig`."""

    n_threads: int = 1
    isa: str | None = None
    huge_pages: str = "auto"
    numa: str = "none"
    n_threads_batch: int = 0

    @property
    def most_threads(self) -> int:
        """Threads of the native program."""
        return max(self.n_threads, self.n_threads_batch)
