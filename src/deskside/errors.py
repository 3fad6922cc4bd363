"""The exception that bad input raises, and its one child that code looks for."""

from __future__ import annotations


class DesksideError(Exception):
    """Bad input, told in one line: which file, field or flag, and what to do about it.

    The command line prints the line and exits with code 2.
    """


class DamagedLogits(DesksideError):
    """A model computed NaN or infinity."""
