"""Turns options into text: plans, loads, schedules, runs, samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deskside.engine.llm import LLM, Stream
    from deskside.engine.results import Chunk, Completion, Timings

__all__ = ["LLM", "Chunk", "Completion", "Stream", "Timings"]


def __getattr__(name: str) -> Any:
    """Imports on first use, so that reading the options does not load the backends."""
    if name not in __all__:
        raise AttributeError(f"module 'deskside.engine' has no attribute {name!r}")
    from importlib import import_module

    home = "llm" if name in ("LLM", "Stream") else "results"
    return getattr(import_module(f"deskside.engine.{home}"), name)
