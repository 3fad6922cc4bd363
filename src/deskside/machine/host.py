"""How the host computes: options that pass from an engine to the native program as they are."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class HostOptions:
    """n_threads: of the native program. isa: a compiled instruction set, None for the fastest that
    this machine runs. huge_pages, numa: how memory for the weights is taken, as in
    `EngineConfig`."""

    n_threads: int = 1
    isa: str | None = None
    huge_pages: str = "auto"
    numa: str = "none"
