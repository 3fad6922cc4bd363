"""The article's own tables: a few runs that stand for all, and both clocks over steady runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deskside.bench.record import Record
from deskside.bench.report.facts import Row, Side
from deskside.bench.report.tables import Table, number
from deskside.machine import gallery

SHOWN = 5
HEADER = ["#", "PP tokens", "TG tokens", "PP tok/s", "TG tok/s", "Total s"]
MARKED = (
    "The runs that the workload marks as representative, each the first of its steady ones, or the "
    "first where none is."
)
SPREAD = (
    f"Of the runs in order of context and answer those at 0, 25, 50, 75 and 100 %; all where there "
    f"are no more than {SHOWN}."
)


def representative(record: Record, side: Side) -> Table:
    marked = [
        str(item.get("name"))
        for item in _items(record.workload)
        if item.get("representative") is True
    ]
    rows = _marked(side, marked)
    rule = MARKED if rows else SPREAD
    lines = [
        [
            str(row.run.index),
            f"{row.run.depth:,}",
            f"{row.run.generated_tokens:,}",
            number(row.pp),
            number(row.tg),
            number(row.total),
        ]
        for row in rows or _spread(side)
    ]
    return Table("Representative runs", HEADER, lines, text=0, note=rule)


def _items(workload: Mapping[str, Any]) -> list[dict[str, Any]]:
    items = workload.get("items")
    return [i for i in items if isinstance(i, dict)] if isinstance(items, list) else []


def _marked(side: Side, names: list[str]) -> list[Row]:
    """One run an item, in the order of the items' names."""
    found = []
    for name in sorted(names):
        rows = [row for row in side.of("steady", "warm-up", "cold") if row.run.name == name]
        found += sorted(rows, key=lambda row: row.phase != "steady")[:1]
    return found


def _spread(side: Side) -> list[Row]:
    rows = sorted(side.basis, key=lambda row: (row.run.depth, row.run.generated_tokens))
    if len(rows) <= SHOWN:
        return rows
    return [rows[round(i * (len(rows) - 1) / (SHOWN - 1))] for i in range(SHOWN)]


def published(record: Record) -> Table:
    """The gallery's runs where a workload has their sizes, for the eye beside the table above."""
    sizes = {(i.get("prompt"), i.get("generate")) for i in _items(record.workload)}
    for entry in gallery.entries().values():
        if entry.runs and all((r.prompt, r.generated) in sizes for r in entry.runs):
            lines = [
                [
                    str(i),
                    f"{r.prompt:,}",
                    f"{r.generated:,}",
                    *(f"{x:g}" for x in (r.prefill, r.decode, r.total)),
                ]
                for i, r in enumerate(entry.runs, 1)
            ]
            system = ", ".join(entry.system.values())
            note = f"Published, not measured here: {entry.source}. {entry.preset}, "
            note += f"{entry.engine}; {system}."
            return Table(f"Published: {entry.title}", HEADER, lines, text=0, note=note)
    return Table("", [], [])


def steady(side: Side) -> Table:
    """Both clocks over the runs after the detected warm-up."""
    lines = []
    for key, name in (("pp", "PP tok/s"), ("tg", "TG tok/s")):
        sample = side.samples[key, "steady"]
        if sample is not None:
            figures = (sample.max, sample.min, sample.mean)
            lines.append([name, str(sample.n), *map(number, figures)])
    note = "Steady runs: without failed ones, the cold one and the warm-up that was found."
    return Table("Steady state", ["clock", "runs", "max", "min", "mean"], lines, note=note)
