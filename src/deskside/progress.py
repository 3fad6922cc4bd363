"""How long work reports itself: a callback, so that libraries never draw."""

from __future__ import annotations

from collections.abc import Callable

# (label, done, total), in any unit that the caller of the callback can show as a share.
Progress = Callable[[str, int, int], None]


def silent(label: str, done: int, total: int) -> None:
    """The default: reports nothing."""
