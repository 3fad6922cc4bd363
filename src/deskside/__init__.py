"""deskside runs mixture-of-experts language models on one workstation, and proves it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deskside.engine import LLM, Completion
    from deskside.engine.sampler import SamplingParams
    from deskside.errors import DesksideError

__version__ = "0.1.0"
__all__ = ["LLM", "Completion", "DesksideError", "SamplingParams", "__version__"]

_HOMES = {
    "LLM": "deskside.engine",
    "Completion": "deskside.engine",
    "DesksideError": "deskside.errors",
    "SamplingParams": "deskside.engine.sampler",
}


def __getattr__(name: str) -> Any:
    """Imports on first use, so that `deskside --help` stays quick."""
    if name not in _HOMES:
        raise AttributeError(f"module 'deskside' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
