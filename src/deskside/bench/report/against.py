"""A record beside what others published (the gallery): figures side by side, nothing is judged.

A published run is one sample on another machine, so there is no interval and no verdict.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from deskside.bench.record import Record, Target
from deskside.bench.report.analysis import known, summarise
from deskside.bench.report.facts import Row, Side
from deskside.bench.report.part import is_random, part_of, whole
from deskside.bench.report.tables import NONE, Table, number
from deskside.bench.report.verdict import at
from deskside.errors import DesksideError
from deskside.machine.devices import PublishedRun
from deskside.machine.gallery import Entry, Spread


@dataclass(frozen=True)
class Beside:
    """A published run and what the record has of its size; rates in tokens per second, seconds."""

    published: PublishedRun
    prefill: float | None
    decode: float | None
    total: float | None
    source: str


@dataclass(frozen=True)
class Against:
    """clocks: of "PP" and "TG", what was published and the record's steady runs. comparable: the
    record is of the whole model that was published; else a ratio would mean nothing."""

    entry: str
    title: str
    target: str
    comparable: bool
    runs: list[Beside]
    clocks: dict[str, tuple[Spread, Spread]]
    warnings: list[str]


def against(record: Record, name: str, entry: Entry) -> Against:
    """Side A of the record beside an entry; DesksideError if it has no side A."""
    if "A" not in record.targets:
        raise DesksideError("a record has no side A")
    side, target = summarise(record).sides["A"], record.targets["A"]
    clocks = {
        "PP": (entry.statistics.prefill, _spread(side, "pp")),
        "TG": (entry.statistics.decode, _spread(side, "tg")),
    }
    return Against(
        entry=name,
        title=entry.title,
        target=", ".join(part for part in (target.name, target.engine) if part) or "unnamed",
        comparable=_plain(entry.preset) in _plain(target.name) and part_of(target) is None,
        runs=[_beside(side, run) for run in entry.runs],
        clocks=clocks,
        warnings=[*_differences(record, target, entry), *_whole(target, side), *side.warnings],
    )


def _spread(side: Side, key: str) -> Spread:
    sample = side.samples[key, "steady"] or side.samples[key, "all"]
    return Spread() if sample is None else Spread(sample.min, sample.max, sample.mean)


def _beside(side: Side, run: PublishedRun) -> Beside:
    """A run of the same size, else what the record's lengths and depths say of it."""
    same = [row for row in side.basis if _size(row) == (run.prompt, run.generated)]
    if same:
        row = same[0]
        return Beside(run, row.pp, row.tg, row.total, f"run {row.run.index}")
    found = at(side.lengths, run.prompt, lambda x: x.tokens / x.pp if x.pp else None, "prompt")
    depth = run.prompt + (run.generated - 1) / 2
    decode = None
    if side.depth is not None and side.depth.shallow <= depth <= side.depth.deep:
        decode = side.depth.rate(depth)
    total = None
    if found.value and decode:
        total = found.value + (run.generated - 1) / decode
    prefill = run.prompt / found.value if found.value else None
    return Beside(run, prefill, decode, total, "computed")


def _plain(name: str) -> str:
    """Without what writers of names differ in."""
    return "".join(c for c in name.lower() if c.isalnum())


def _size(row: Row) -> tuple[int, int]:
    return row.run.depth, row.run.generated_tokens


def _differences(record: Record, target: Target, entry: Entry) -> Iterator[str]:
    system = ", ".join(entry.system.values()) or "another machine"
    yield f"published, not measured here: {entry.source}, {entry.engine} on {system}"
    engine, cpu = target.engine or "an unknown engine", record.machine.cpu or "an unknown CPU"
    yield f"this record: {engine} on {cpu}"
    if _plain(entry.preset) not in _plain(target.name):
        yield f"the models differ: {entry.preset} was published, the record is of {target.name}"
    scale = record.workload.get("scale")
    if isinstance(scale, float) and scale < 1:
        yield f"the workload was shrunk to --scale {scale:g}: no run has a published size"
    if is_random(target):
        yield "the weights are random; speed depends on routing, which is less even in a real model"


def _whole(target: Target, side: Side) -> Iterator[str]:
    found = whole(target, side)
    if found is not None:
        rates = {"PP": found.pp, "TG": found.tg}
        computed = [f"{key} {number(x)} tok/s" for key, x in rates.items() if x is not None]
        yield (
            f"{found.label} are a slice: its rates are no rates of the whole model"
            + (f", for which {' and '.join(computed)} are computed" if computed else "")
        )


def tables(found: Against) -> list[Table]:
    """The table of runs, and both clocks over all runs."""

    def three(published: float | None, here: float | None) -> list[str]:
        ratio = here / published if here and published else None
        cells = [NONE if published is None else f"{published:g}", number(here), number(ratio)]
        return cells if found.comparable else cells[:2]

    ratios = ["ratio"] if found.comparable else []

    rows = [
        [
            f"{b.published.prompt:,} + {b.published.generated:,}",
            b.source,
            *three(b.published.prefill, b.prefill),
            *three(b.published.decode, b.decode),
            *three(b.published.total, b.total),
        ]
        for b in found.runs
    ]
    header = ["prompt + answer", "here"]
    for what in ("PP", "TG", "total s"):
        header += [f"{what} published", "here", *ratios]
    clocks = [
        [key, name, *three(getattr(theirs, name), getattr(ours, name))]
        for key, (theirs, ours) in found.clocks.items()
        for name in ("max", "min", "mean")
        if known([getattr(theirs, name), getattr(ours, name)])
    ]
    note = f"Here: {found.target}; computed: from runs of other sizes. Over all runs: steady ones. "
    note += (
        "A ratio is here over published."
        if found.comparable
        else "No ratios: it is not the whole model that was published."
    )
    return [
        Table(f"Beside {found.entry}: {found.title}", header, rows, text=2),
        Table("Over all runs", ["clock", "", "published", "here", *ratios], clocks, 2, note),
    ]


def to_dict(found: Against) -> dict[str, object]:
    """As JSON: every published figure with the record's."""
    return {
        "entry": found.entry,
        "title": found.title,
        "target": found.target,
        "comparable": found.comparable,
        "runs": [asdict(b) for b in found.runs],
        "clocks": {
            key: {"published": _named(theirs), "here": _named(ours)}
            for key, (theirs, ours) in found.clocks.items()
        },
        "warnings": found.warnings,
    }


def _named(spread: Spread) -> dict[str, float | None]:
    return {"min": spread.min, "max": spread.max, "mean": spread.mean}
