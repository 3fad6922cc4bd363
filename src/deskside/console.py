"""What the command line shows beside results: notes, errors, progress. All on stderr."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from deskside.progress import Progress as Report

WIDTH = 120  # columns of a table in a pipe
err = Console(stderr=True, highlight=False, soft_wrap=True)


def wide() -> Console:
    """Where tables go: stdout, and where that is no terminal, as wide as they need."""
    out = Console(highlight=False)
    return out if out.is_terminal else Console(highlight=False, width=WIDTH)


def printable(text: str) -> str:
    """With nothing in it that acts on the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def note(text: str) -> None:
    """One dim line about something that the user may want to know."""
    err.print(f"note: {text}", style="dim", markup=False)


def error(text: str) -> None:
    """The one line of a failure; control characters from foreign files are made visible."""
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    err.print(f"deskside: error: {line}", style="bold red", markup=False)


@contextmanager
def progress_bar(per_second: float = 10) -> Iterator[Report]:
    """A bar with percentage and time left for a callback of (label, done, total).

    per_second: how often it is drawn; that takes a moment from what is measured meanwhile.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    with Progress(
        *columns,
        console=err,
        transient=True,
        disable=not err.is_terminal,
        refresh_per_second=per_second,
    ) as progress:
        task = progress.add_task("", total=None)

        def report(label: str, done: int, total: int) -> None:
            progress.update(task, description=label, completed=done, total=total)

        yield report
