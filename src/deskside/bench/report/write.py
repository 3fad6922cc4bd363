"""Writes the report of a record as Markdown and HTML, beside the JSON."""

from __future__ import annotations

from pathlib import Path

from deskside.bench.record import Record
from deskside.bench.report import html, markdown
from deskside.bench.report.verdict import DEFAULTS, Criteria
from deskside.bench.report.view import View, view
from deskside.errors import DesksideError
from deskside.files import write_all

SUFFIXES = (".md", ".html")


def paths(json_path: Path) -> list[Path]:
    """The files of a record's report: NAME.md and NAME.html beside NAME.json."""
    return [json_path.with_suffix(suffix) for suffix in SUFFIXES]


def write(record: Record, json_path: Path, criteria: Criteria = DEFAULTS) -> View:
    """Write both files, or neither. Returns what they show.

    DesksideError if one of them would replace the record itself.
    """
    if json_path.suffix in SUFFIXES:
        raise DesksideError(f"{json_path}: its report would replace it; rename it to NAME.json")
    seen = view(record, json_path.name, criteria)
    texts = dict(zip(paths(json_path), (markdown.render(seen), html.render(seen)), strict=True))
    write_all(texts)
    return seen
