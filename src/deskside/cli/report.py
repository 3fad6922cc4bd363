"""`deskside compare` and `deskside report`. They read records and measure nothing."""

from __future__ import annotations

import json
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
    from deskside.bench.report.tables import Table as Shown
    from deskside.machine.gallery import Entry

REGRESSION = 1  # exit code


def compare(
    a: Annotated[
        str | None,
        Argument(metavar="A.json", help="baseline; or one record with both sides"),
    ] = None,
    b: Annotated[
        str | None, Argument(metavar="B.json", help="candidate; or an entry of the gallery")
    ] = None,
    threshold: Annotated[
        float, Option("--threshold", metavar="PCT", help="per cent slower that make a regression")
    ] = 5.0,
    as_json: Annotated[bool, Option("--json", help="print the comparison as JSON")] = False,
    list_: Annotated[
        bool, Option("--list", help="show the gallery: what others have published")
    ] = False,
) -> int:
    """Compare two records of `bench`, both sides of one made with --vs, or a record with what
    others published (`compare RECORD.json article`).

    Within one record, side A is the candidate. Exit code 1 if the candidate is slower by more than
    the threshold, 2 for bad input. Beside published figures nothing is judged."""
    from deskside.bench.record import Record
    from deskside.bench.report import compare as comparing

    if list_:
        _gallery()
        return 0
    if a is None:
        raise DesksideError("name a record, and what to compare it with; --list shows the gallery")
    if not 0 <= threshold < 100:
        raise DesksideError(f"--threshold {threshold:g}: expected per cent from 0 to below 100")
    if b is not None and (named := _entry(b)):
        return _against(Path(a), b, named, as_json)
    baseline = Record.load(Path(a))
    candidate = Record.load(Path(b)) if b is not None else None
    try:
        found = comparing.compare(baseline, candidate, threshold / 100)
    except DesksideError as failure:
        names = " and ".join(name for name in (a, b) if name is not None)
        raise DesksideError(f"{names}: {failure}") from None
    if as_json:
        typer.echo(found.to_json())
    else:
        _show(found)
    return REGRESSION if found.regression else 0


def _entry(name: str) -> Entry | None:
    """Of the gallery; a file of that name goes first."""
    from deskside.machine import gallery

    if Path(name).exists() or Path(name).suffix:
        return None
    return gallery.entry(name)


def _gallery() -> None:
    from deskside.machine import gallery

    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("entry", "what was published", "model", "engine", "runs", "mean TG"):
        table.add_column(title)
    for name, entry in gallery.entries().items():
        s = entry.statistics
        mean = f"{s.decode.mean:g} tok/s" if s.decode.mean else ""
        table.add_row(name, entry.title, entry.preset, entry.engine, str(s.runs), mean)
    wide().print(table)


def _against(record: Path, name: str, entry: Entry, as_json: bool) -> int:
    from deskside.bench.record import Record
    from deskside.bench.report import against

    try:
        found = against.against(Record.load(record), name, entry)
    except DesksideError as failure:
        raise DesksideError(f"{record}: {failure}") from None
    if as_json:
        typer.echo(json.dumps(against.to_dict(found), indent=1))
        return 0
    for shown in against.tables(found):
        _print(shown)
    for line in found.warnings:
        note(printable(line))
    return 0


def _show(found: Comparison) -> None:
    from deskside.bench.report import tables

    for shown in (tables.comparison(found), tables.comparison_items(found)):
        _print(shown)
    for line in found.warnings:
        note(printable(line))


def _print(shown: Shown) -> None:
    table = Table(title=escape(shown.title))
    for i, heading in enumerate(shown.header):
        table.add_column(escape(heading), justify="left" if i < shown.text else "right")
    for row in shown.rows:
        table.add_row(*(escape(printable(cell)) for cell in row))
    wide().print(table)
    if shown.note:
        wide().print(escape(printable(shown.note)))


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
