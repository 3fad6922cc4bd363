"""Computes what a report shows, once for Markdown and HTML."""

from __future__ import annotations

import shlex
from dataclasses import dataclass

from deskside.bench.predict.slices import label
from deskside.bench.record import Record, Target
from deskside.bench.report import answers, tables
from deskside.bench.report.analysis import known, summarise
from deskside.bench.report.compare import Comparison, compare
from deskside.bench.report.facts import Side, Summary
from deskside.bench.report.part import Whole, part_of, whole
from deskside.bench.report.verdict import (
    DEFAULTS,
    FAILED,
    PASSED,
    UNMEASURED,
    Criteria,
    Criterion,
    judge,
    overall,
)
from deskside.errors import DesksideError


@dataclass(frozen=True)
class Figure:
    """A key figure: name, value, and its ceiling or interval."""

    name: str
    value: str
    note: str


@dataclass(frozen=True)
class Page:
    """The part of a report about one side."""

    heading: str
    side: Side
    target: Target
    criteria: list[Criterion]
    outcome: str
    headline: str
    figures: list[Figure]
    claims: list[str]
    odd: list[str]


@dataclass(frozen=True)
class View:
    record: Record
    summary: Summary
    title: str
    headline: str
    sides: list[Page]
    comparison: Comparison | None
    commands: list[str]


def view(record: Record, name: str, criteria: Criteria = DEFAULTS) -> View:
    """The content of a report. name: of the record's file, for the command that repeats it."""
    summary = summarise(record)
    judged = judge(record, summary, criteria)
    pages = [
        _page(record, side, [c for c in judged if c.side == side.name])
        for side in summary.sides.values()
    ]
    try:
        compared = compare(record)
    except DesksideError:
        compared = None  # there is only one side, or there are no pairs
    first = pages[0].target.name if pages else "nothing"
    return View(
        record=record,
        summary=summary,
        title=f"{first or 'unnamed model'}{_part(pages)}, workload {_workload(record)}",
        headline=" ".join(
            f"{page.side.name}: {page.headline}" if len(pages) > 1 else page.headline
            for page in pages
        )
        or "No runs.",
        sides=pages,
        comparison=compared,
        commands=[
            f"deskside bench --replay {shlex.quote(name)}",
            *([f"# made by: {shlex.join(record.command)}"] if record.command else []),
        ],
    )


def _workload(record: Record) -> str:
    name, scale = (record.workload.get(key) for key in ("name", "scale"))
    shrunk = isinstance(scale, float) and scale < 1
    return (name if isinstance(name, str) else "?") + (f" at scale {scale:g}" if shrunk else "")


def _page(record: Record, side: Side, criteria: list[Criterion]) -> Page:
    target = record.targets.get(side.name) or Target(kind="", name="")
    part = part_of(target)
    model = whole(target, side)
    if part is not None:
        criteria = []  # what a slice is fast enough for says nothing of the model
    named = ", ".join(part for part in (target.name, target.engine) if part)
    return Page(
        heading=f"{side.name}: {named}",
        side=side,
        target=target,
        criteria=criteria,
        outcome=overall(criteria),
        headline=_slice(label(part), model) if part is not None else _headline(criteria),
        figures=_figures(side, criteria),
        claims=[*tables.claims(side), *filter(None, (_head(model), answers.said(record, side)))],
        odd=tables.odd_runs(side),
    )


def _part(pages: list[Page]) -> str:
    part = part_of(pages[0].target) if pages else None
    return f", {label(part)}" if part is not None else ""


def _slice(part: str, model: Whole | None) -> str:
    """What stands in place of a verdict."""
    said = f"No daily-use verdict: {part} are a slice of a model."
    rates = [] if model is None else [("decode", model.tg), ("prefill", model.pp)]
    computed = [f"{name} {tables.number(rate)} tok/s" for name, rate in rates if rate is not None]
    if model is not None and computed:
        said += f" Computed for all {model.layers} layers: {' and '.join(computed)}."
    return said


def _head(model: Whole | None) -> str:
    if model is None:
        return ""
    return (
        f"{tables.percent(model.head_share)} of the bytes that a token reads in this slice are the "
        "head, which the whole model has once: rates do not scale with the number of layers. What "
        "is computed for the whole model is the slice's share of its ceiling times the whole "
        "model's ceiling, the median over runs."
    )


def _headline(criteria: list[Criterion]) -> str:
    outcomes = [c.outcome for c in criteria]
    failed = [c.name for c in criteria if c.outcome == FAILED]
    said = {
        PASSED: "Daily-use speed.",
        FAILED: "Not daily-use speed.",
        UNMEASURED: "Daily use: not shown.",
    }[overall(criteria)]
    text = f"{said} {outcomes.count(PASSED)} of {len(outcomes)} criteria passed"
    if outcomes.count(UNMEASURED):
        text += f", {outcomes.count(UNMEASURED)} not measured"
    if failed:
        text += f"; failed: {', '.join(failed)}"
    return f"{text}."


def _figures(side: Side, criteria: list[Criterion]) -> list[Figure]:
    found = []
    for key, name in (("tg", "Decode (TG)"), ("pp", "Prefill (PP)")):
        sample = side.samples[key, "steady"] or side.samples[key, "all"]
        if sample is None:
            continue
        note = f"mean of {sample.n} run{'s' * (sample.n > 1)}"
        if sample.mean_interval is not None:
            note += f", 95 % {tables.interval(sample.mean_interval)}"
        found.append(
            Figure(name, f"{tables.number(sample.mean)} tok/s", f"{note}. {_share(side, key)}")
        )
    for c in criteria:
        if c.key in ("chat", "ingest") and c.value is not None:
            found.append(Figure(c.name, tables.quantity(c.value, c.unit), c.note))
    if side.depth is not None and side.depth.change is not None:
        d = side.depth
        low_high = d.change_interval
        note = f"TG from {d.shallow:,.0f} to {d.deep:,.0f} tokens"
        if low_high is not None:
            ends = (tables.percent(x, "+") for x in (low_high.low, low_high.high))
            note += f", 95 % {' to '.join(ends)}"
        found.append(Figure("Change with context", tables.percent(d.change, "+"), note))
    return found


def _share(side: Side, key: str) -> str:
    """The median share of the ceiling over runs, and what limits most of them."""
    rows = side.basis
    shares = sorted(known(row.tg_share if key == "tg" else row.pp_share for row in rows))
    if not shares:
        return "No ceiling is known."
    limits = [
        row.run.ceiling.decode_limit if key == "tg" else row.run.ceiling.prefill_limit
        for row in rows
    ]
    names = known(limits)
    of = f" ({max(sorted(set(names)), key=names.count)})" if names else ""
    return f"{tables.percent(shares[len(shares) // 2])} of the ceiling{of}."
