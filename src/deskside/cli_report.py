"""`deskside compare` and `deskside report`: what records say, without measuring anything."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deskside.bench import report, tables
from deskside.bench.compare import Comparison, compare
from deskside.bench.record import Record
from deskside.bench.verdict import DEFAULTS, Criteria
from deskside.console import err, note
from deskside.errors import DesksideError

REGRESSION = 1  # exit code


def compare_records(a: Path, b: Path | None, threshold: float, *, as_json: bool) -> int:
    """Shows the comparison and returns the exit code; `threshold` in per cent."""
    if not 0 <= threshold < 100:
        raise DesksideError(f"--threshold {threshold:g}: expected per cent from 0 to below 100")
    baseline = Record.load(a)
    candidate = Record.load(b) if b is not None else None
    try:
        found = compare(baseline, candidate, threshold / 100)
    except DesksideError as failure:
        named = " and ".join(str(path) for path in (a, b) if path is not None)
        raise DesksideError(f"{named}: {failure}") from None
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(found)
    return REGRESSION if found.regression else 0


def _show(found: Comparison) -> None:
    # a pipe has no width of its own, and a narrow table cuts figures
    out = Console(highlight=False)
    if not out.is_terminal:
        out = Console(highlight=False, width=120)
    for shown in (tables.comparison(found), tables.comparison_items(found)):
        table = Table(title=escape(shown.title))
        for i, heading in enumerate(shown.header):
            table.add_column(escape(heading), justify="left" if i < shown.text else "right")
        for row in shown.rows:
            table.add_row(*(escape(_plain(cell)) for cell in row))
        out.print(table)
        if shown.note:
            out.print(escape(_plain(shown.note)))
    for line in found.warnings:
        note(_plain(line))


def _plain(text: str) -> str:
    """Control characters from a record cannot act on the terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def rerender(path: Path, criteria: Path | None) -> None:
    """Markdown and HTML beside the record, anew."""
    limits = Criteria.load(criteria) if criteria is not None else DEFAULTS
    for written in report.write(Record.load(path), path, limits):
        err.print(str(written), markup=False)
