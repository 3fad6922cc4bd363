"""`deskside compare` and `deskside report`. They read records and measure nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape
from rich.table import Table
from typer import Argument, Option

from deskside.console import err, note, printable, wide
from deskside.errors import DesksideError

if TYPE_CHECKING:
    from deskside.bench.report.compare import Comparison

REGRESSION = 1  # exit code


def compare(
    a: Annotated[Path, Argument(metavar="A.json", help="baseline; or one record with both sides")],
    b: Annotated[Path | None, Argument(metavar="B.json", help="candidate")] = None,
    threshold: Annotated[
        float, Option("--threshold", metavar="PCT", help="per cent slower that make a regression")
    ] = 5.0,
    as_json: Annotated[bool, Option("--json", help="print the comparison as JSON")] = False,
) -> int:
    """Compare two records of `bench`, or both sides of one made with --vs.

    Within one record, side A is the candidate. Exit code 1 if the candidate is slower by more than
    the threshold, 2 for bad input."""
    from deskside.bench.record import Record
    from deskside.bench.report import compare as comparing

    if not 0 <= threshold < 100:
        raise DesksideError(f"--threshold {threshold:g}: expected per cent from 0 to below 100")
    baseline = Record.load(a)
    candidate = Record.load(b) if b is not None else None
    try:
        found = comparing.compare(baseline, candidate, threshold / 100)
    except DesksideError as failure:
        named = " and ".join(str(path) for path in (a, b) if path is not None)
        raise DesksideError(f"{named}: {failure}") from None
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(found)
    return REGRESSION if found.regression else 0


def _show(found: Comparison) -> None:
    from deskside.bench.report import tables

    out = wide()
    for shown in (tables.comparison(found), tables.comparison_items(found)):
        table = Table(title=escape(shown.title))
        for i, heading in enumerate(shown.header):
            table.add_column(escape(heading), justify="left" if i < shown.text else "right")
        for row in shown.rows:
            table.add_row(*(escape(printable(cell)) for cell in row))
        out.print(table)
        if shown.note:
            out.print(escape(printable(shown.note)))
    for line in found.warnings:
        note(printable(line))


def report(
    record: Annotated[Path, Argument(metavar="RECORD.json", help="made by bench")],
    criteria: Annotated[
        Path | None,
        Option("--criteria", metavar="FILE.toml", help="other limits for the daily-use verdict"),
    ] = None,
) -> None:
    """Write RECORD.md and RECORD.html again from a record; nothing is measured."""
    from deskside.bench.record import Record
    from deskside.bench.report import write as reporting
    from deskside.bench.report.verdict import DEFAULTS, Criteria

    limits = Criteria.load(criteria) if criteria is not None else DEFAULTS
    seen = reporting.write(Record.load(record), record, limits)
    err.print(printable(seen.headline), markup=False)
    err.print(f"wrote {', '.join(map(str, reporting.paths(record)))}", markup=False)
