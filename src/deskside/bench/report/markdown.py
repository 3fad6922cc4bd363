"""Renders a report as Markdown, with the tables of the article that deskside follows."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from deskside.bench.report import answers, environment, representative, tables
from deskside.bench.report.tables import Table
from deskside.bench.report.view import View


def render(view: View) -> str:
    parts = [f"# {escape(view.title)}", escape(view.headline)]
    for page in view.sides:
        if len(view.sides) > 1:
            parts.append(f"## {escape(page.heading)}")
        parts.append(table(tables.verdict(page.criteria)))
        parts.append(table(representative.representative(view.record, page.side)))
        parts.append(table(representative.published(view.record)))
        parts.append(table(representative.steady(page.side)))
        parts.append(table(tables.runs(page.side)))
        parts.append(table(tables.statistics(page.side)))
        parts += bullets("What the runs show", page.claims)
        parts.append(table(answers.table(view.record, page.side)))
        parts += bullets("Outliers (*) and failures", page.odd)
        parts += bullets("Warnings", page.side.warnings)
        parts.append(table(tables.lengths(page.side)))
        parts.append(table(tables.target(page.target)))
    if view.comparison is not None:
        parts.append(table(tables.comparison(view.comparison)))
        parts += bullets("Of the comparison", view.comparison.warnings)
        parts.append(table(tables.comparison_items(view.comparison)))
    parts.append(table(tables.profile(view.record)))
    parts.append(table(environment.table(view.record)))
    parts.append("### Repeat it")
    parts.append("\n".join(f"    {escape_code(line)}" for line in view.commands))
    return "\n\n".join(part for part in parts if part) + "\n"


def table(t: Table) -> str:
    """A table in Markdown; "" for a table without rows."""
    if not t.rows:
        return ""
    rule = ["---" if i < t.text else "---:" for i in range(len(t.header))]
    lines = [_line(map(escape, t.header)), _line(rule)]
    lines += [_line(map(escape, row)) for row in t.rows]
    note = f"\n\n{escape(t.note)}" if t.note else ""
    return f"### {escape(t.title)}\n\n" + "\n".join(lines) + note


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def bullets(title: str, lines: Sequence[str]) -> list[str]:
    if not lines:
        return []
    return [f"### {title}", "\n".join(f"- {escape(line)}" for line in lines)]


ENTITIES = str.maketrans({"<": "&lt;", ">": "&gt;", "&": "&amp;"})


def escape(text: str) -> str:
    """`text` on one line, without characters that Markdown or HTML would interpret."""
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", escape_code(text).translate(ENTITIES))


def escape_code(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)
