"""The flags of `deskside bench`, which the command line is generated from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Fields of the request that say what to measure, and on what; the others say how.
SHAPE = ("workload", "runs", "warmup", "scale", "max_prompt", "max_tokens", "text", "ignore_eos")
WHERE = ("model", "endpoint", "endpoint_model")


@dataclass(frozen=True)
class Request:
    """The flags of `deskside bench`; None for a flag that was not given."""

    model: Path | None = None
    endpoint: str | None = None
    endpoint_model: str | None = None
    api_key: str | None = None
    timeout: float = 600.0
    vs: str | None = None
    workload: str | None = None
    list: bool = False
    runs: int | None = None
    warmup: str | None = None
    scale: float | None = None
    max_prompt: int | None = None
    max_tokens: int | None = None
    text: Path | None = None
    options: Mapping[str, Any] = field(default_factory=dict)  # of EngineConfig
    sampling: Mapping[str, Any] = field(default_factory=dict)  # of SamplingParams
    seed: int | None = None
    ignore_eos: bool | None = None
    out: Path | None = None
    force: bool = False
    resume: Path | None = None
    replay: Path | None = None
    no_hash: bool = False
    profile: bool = False
    no_report: bool = False

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """The flags among `names` that were given, with their values."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}
