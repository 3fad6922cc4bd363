"""Writes the report of a record: Markdown and HTML beside its JSON."""

from __future__ import annotations

from pathlib import Path

from deskside.bench import html, markdown
from deskside.bench.record import Record
from deskside.bench.verdict import DEFAULTS, Criteria
from deskside.bench.view import view
from deskside.errors import DesksideError

SUFFIXES = (".md", ".html")


def write(record: Record, json_path: Path, criteria: Criteria = DEFAULTS) -> list[Path]:
    """NAME.md and NAME.html beside NAME.json; older ones are replaced at once or not at all.
    Returns both paths. DesksideError where one of them would replace the record itself."""
    if json_path.suffix in SUFFIXES:
        raise DesksideError(f"{json_path}: its report would replace it; rename it to NAME.json")
    seen = view(record, json_path.name, criteria)
    texts = (markdown.render(seen), html.render(seen))
    paths = {json_path.with_suffix(s): text for s, text in zip(SUFFIXES, texts, strict=True)}
    partial = {path: path.with_name(path.name + ".partial") for path in paths}
    try:
        for path, text in paths.items():
            partial[path].write_text(text, encoding="utf-8", errors="replace")
        for path in paths:
            partial[path].replace(path)
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return list(paths)
