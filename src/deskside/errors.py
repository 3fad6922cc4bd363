"""The exception that bad input raises, and its one child that code looks for."""

from __future__ import annotations

import traceback


class DesksideError(Exception):
    """Bad input, told in one line: which file, field or flag, and what to do about it.

    The command line prints the line and exits with code 2.
    """


class DamagedLogits(DesksideError):
    """A model computed NaN or infinity."""


def drop_frames(error: BaseException) -> None:
    """Empty the finished frames in the traceback of an error, and of those that it replaced with
    `from None`.

    Whoever keeps the exception, as an interactive session does, would keep what they hold: all
    weights of a load that failed.
    """
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        seen = seen.__context__ if seen.__suppress_context__ else None
