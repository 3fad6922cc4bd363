"""The tables and sentences of a report, as text. Markdown and HTML show the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from deskside.bench.record import OpProfile, Record, Target
from deskside.bench.report.analysis import known, positive
from deskside.bench.report.compare import Comparison
from deskside.bench.report.facts import STABLE, Row, Side, share
from deskside.bench.report.stats import Interval, Ratio, Sample
from deskside.bench.report.verdict import Criterion

NONE = "-"
PHASES = {"extra": "warm-up run"}  # labels of phases that differ from their names


@dataclass(frozen=True)
class Table:
    """A table. The first `text` columns hold words, the others numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: int = 1
    note: str = ""


# numbers


def number(x: float | None, sign: str = "") -> str:
    """x with three significant digits, and all digits before the point. sign: as in a format."""
    if x is None or not math.isfinite(x):
        return NONE
    if abs(x) >= 100 or x == 0:
        return f"{x:{sign},.0f}"
    digits = 1 if abs(x) >= 10 else 2 if abs(x) >= 1 else 3
    return f"{x:{sign}.{digits}{'f' if digits < 3 else 'g'}}"


def percent(x: float | None, sign: str = "") -> str:
    """x as per cent; with one decimal if it is small or has a sign."""
    if x is None or not math.isfinite(x):
        return NONE
    return f"{100 * x:{sign}.{1 if sign or abs(x) < 0.1 else 0}f} %"


def gigabytes(x: float | None) -> str:
    return NONE if x is None else f"{x / 1e9:.2f} GB"


def interval(x: Interval | None) -> str:
    return NONE if x is None else f"{number(x.low)} to {number(x.high)}"


def quantity(x: float | None, unit: str) -> str:
    if x is None or unit == "share":
        return percent(x)
    return gigabytes(x) if unit == "bytes" else f"{number(x)} {unit}"


# the article's tables


def runs(side: Side) -> Table:
    header = ["run", "phase", "prompt", "cached", "generated", "PP tok/s", "of ceiling"]
    header += ["TG tok/s", "of ceiling", "TTFT s", "total s"]
    return Table("Runs", header, [_run(row) for row in side.rows], text=2)


def _run(row: Row) -> list[str]:
    run = row.run
    counts = [f"{n:,}" for n in (run.prompt_tokens, run.cached_tokens, run.generated_tokens)]
    figures = [number(row.pp), percent(row.pp_share), number(row.tg), percent(row.tg_share)]
    phase = PHASES.get(row.phase, row.phase) + (" *" if row.odd else "")
    name = f"{run.index} {run.name}".strip()
    return [name, phase, *counts, *figures, number(row.ttft), number(row.total)]


STATISTICS = ("pp", "PP tok/s"), ("tg", "TG tok/s"), ("ttft", "TTFT s"), ("total", "total s")


def statistics(side: Side) -> Table:
    header = ["", "runs", "max", "min", "mean", "95 %", "median", "95 %", "p5", "p95", "sd"]
    rows = []
    for key, name in STATISTICS:
        steady = side.samples[key, "steady"]
        mean = number(steady.mean if steady else None)
        rows.append([name, *_sample(side.samples[key, "all"]), mean])
    note = (
        "All runs except failed ones and those made only to warm up. The steady-state mean leaves "
        "out cold and warm-up runs. 95 %: bootstrap intervals."
    )
    return Table("Statistics", [*header, "steady-state mean"], rows, note=note)


def _sample(s: Sample | None) -> list[str]:
    if s is None:
        return ["0", *[NONE] * 9]
    spread = [number(s.p5), number(s.p95), number(s.sd)]
    middle = [number(s.mean), interval(s.mean_interval), number(s.median)]
    return [str(s.n), number(s.max), number(s.min), *middle, interval(s.median_interval), *spread]


def phases(side: Side) -> Table:
    rows = [
        [name, phase, *_sample(side.samples[key, phase])[:4], *_middle(side.samples[key, phase])]
        for key, name in STATISTICS
        for phase in ("cold", "steady")
        if side.samples[key, phase] is not None
    ]
    header = ["", "runs that are", "runs", "max", "min", "mean", "median", "95 %", "sd"]
    return Table("Cold and steady runs", header, rows, text=2)


def _middle(s: Sample | None) -> list[str]:
    return [] if s is None else [number(s.median), interval(s.median_interval), number(s.sd)]


def lengths(side: Side) -> Table:
    rows = [
        [
            f"{length.tokens:,.0f}",
            str(length.n),
            number(length.pp),
            number(length.ceiling),
            percent(share(length.pp, length.ceiling)),
            number(length.ttft),
        ]
        for length in side.lengths
    ]
    header = ["prompt tokens", "runs", "PP tok/s", "ceiling", "of ceiling", "TTFT s"]
    note = "Medians over runs of one length (within 10 %) without cached tokens."
    return Table("Prefill against prompt length", header, rows, text=0, note=note)


# By what binds an op: its mark, and why it may be faster than its roofline.
ABOVE = {
    "bandwidth": (
        "a",
        "More than 100 %: the roofline counts every byte as read from memory, but the CPU's caches "
        "hold these from one step to the next. That is so in small models and small matrices.",
    ),
    "compute": (
        "b",
        "More than 100 %: the limit of arithmetic was sampled beside the runs, at a lower clock "
        "or beside other programs. The share says only that arithmetic binds.",
    ),
}


def profile(record: Record) -> Table:
    side = next(iter(record.targets), "A")
    bandwidth, compute = measured_limits(record, side)
    rows, over = [], dict.fromkeys(ABOVE, False)
    for op in record.profile:
        found = roofline(op, bandwidth, compute)
        part = share(found and found.seconds, positive(op.seconds))
        mark = ""
        if found and part is not None and round(part, 2) > 1:
            mark = f" ({ABOVE[found.of][0]})"
            over[found.of] = True
        rows.append(
            [
                op.name,
                op.phase,
                number(op.seconds * 1e3),
                number(found.seconds * 1e3 if found else None),
                percent(part) + mark,
            ]
        )
    header = ["op", "phase", "ms a token", "roofline ms", "of roofline"]
    note = " ".join(f"({mark}) {why}" for limit, (mark, why) in ABOVE.items() if over[limit])
    return Table("Where the time goes", header, rows, text=2, note=note)


def measured_limits(record: Record, side: str) -> tuple[float | None, float | None]:
    """Highest sampled bandwidth (bytes/s) and compute (multiply-adds/s) of a side's runs."""
    ceilings = [run.ceiling for run in record.runs if run.side == side]
    bandwidth = max(known(_amount(c.bandwidth) for c in ceilings), default=None)
    return bandwidth, max(known(_amount(c.compute) for c in ceilings), default=None)


def _amount(x: float | None) -> float | None:
    """x, or None if x is not a possible amount or rate of bytes or multiply-adds."""
    return x if x is not None and 1 <= x < 1e18 else None


class Least(NamedTuple):
    """Seconds per token, and what binds: "bandwidth" or "compute"."""

    seconds: float
    of: str


def roofline(op: OpProfile, bandwidth: float | None, compute: float | None) -> Least | None:
    """Least seconds per token that the machine allows; None if unknown."""
    needs = [
        Least(work / limit, name)
        for work, limit, name in (
            (_amount(op.nbytes), bandwidth, "bandwidth"),
            (_amount(op.macs), compute, "compute"),
        )
        if work is not None and limit is not None
    ]
    return max(needs, default=None)


# verdict and claims


def verdict(criteria: Sequence[Criterion]) -> Table:
    rows = [
        [
            c.name,
            c.outcome,
            quantity(c.value, c.unit),
            f"{'at least' if c.at_least else 'at most'} {quantity(c.limit, c.unit)}",
            c.note,
        ]
        for c in criteria
    ]
    return Table("Daily use", ["criterion", "outcome", "measured", "limit", "how"], rows, text=5)


def claims(side: Side) -> list[str]:
    """Sentences that say what the data show."""
    said = [_warmup(side), _depth(side)]
    if side.variation is not None:
        said.append(f"Decode varies by {percent(side.variation)} (sd) about its trend over depth.")
    if gaps := side.gaps:
        stalls = "no stall (a gap of over 3 medians)"
        if gaps.stalls:
            count = f"{gaps.stalls:,} stall{'s' * (gaps.stalls > 1)}"
            stalls = f"{count} (over 3 medians) cost {number(gaps.lost)} s"
        said.append(
            f"Gaps between {gaps.n:,} tokens: p50 {number(gaps.p50 * 1e3)} ms, "
            f"p95 {number(gaps.p95 * 1e3)}, p99 {number(gaps.p99 * 1e3)}, "
            f"longest {number(gaps.max * 1e3)}; {stalls}."
        )
    if cache := side.cache:
        part = cache.cached / max(cache.cached + cache.computed, 1)
        said.append(
            f"{cache.runs} runs took {cache.cached:,} tokens from a cache, "
            f"{percent(part)} of their prompts."
        )
    return said


def _warmup(side: Side) -> str:
    if side.warmup is None:
        return "Warm-up cannot be tested: too few runs."
    p = f"permutation test of the best split, p = {side.warmup.p:.2g}"
    count = len(side.of("warm-up"))
    if not count:
        return f"No warm-up was found after the cold run ({p})."
    return f"The first {count} run{'s' * (count > 1)} after the cold one were warm-up ({p})."


def _depth(side: Side) -> str:
    if side.depth is None:
        return "Decode was measured at only one depth, so its trend is unknown."
    d = side.depth
    within = f"± {100 * STABLE:.0f} %"
    claim = {
        True: f"stable with context (within {within})",
        False: f"not stable with context (beyond {within})",
        None: f"the runs do not show whether it is stable within {within}",
    }[d.stable()]
    slope, ends = "unknown", ""
    if d.per_1k is not None:
        slope = f"{number(d.per_1k, '+')} tok/s"
    if d.per_1k_interval is not None:
        low, high = d.per_1k_interval.low, d.per_1k_interval.high
        ends = f" ({number(low, '+')} to {number(high, '+')})"
    change = percent(d.change, "+")
    if d.change_interval is not None:
        low, high = d.change_interval.low, d.change_interval.high
        change += f" ({percent(low, '+')} to {percent(high, '+')})"
    return (
        f"TG changes by {slope}{ends} per 1,000 tokens of context, and by {change} from "
        f"{d.shallow:,.0f} to {d.deep:,.0f} tokens: {claim}."
    )


def odd_runs(side: Side) -> list[str]:
    """Lines that name outliers and failures."""
    lines = [f"Run {row.run.index}: {why}." for row in side.rows for why in row.odd]
    failed = side.of("failed")
    return lines + [f"Run {row.run.index} failed: {row.run.error}" for row in failed]


def comparison(c: Comparison) -> Table:
    rows = [
        [q.name, q.verdict + (", a regression" if q.regression else ""), *_ratio(q.ratio)]
        for q in c.quantities
    ]
    note = (
        f"Candidate ({c.candidate}) over baseline ({c.baseline}), medians over pairs. "
        f"A regression is slower by more than {percent(c.threshold)}, interval and all."
    )
    header = ["", "candidate is", "ratio", "95 %", "pairs"]
    return Table("Comparison", header, rows, text=2, note=note)


def comparison_items(c: Comparison) -> Table:
    """Ratios by workload item."""
    items = dict.fromkeys(item for q in c.quantities for item in q.items)
    rows = []
    for item in items:
        found = [q.items.get(item) for q in c.quantities]
        ratios = [f"{r.median:.3f}" if r else NONE for r in found]
        rows.append([item, str(max(r.n for r in found if r)), *ratios])
    return Table("Ratios by item", ["item", "pairs", *(q.name for q in c.quantities)], rows)


def _ratio(ratio: Ratio | None) -> list[str]:
    if ratio is None:
        return [NONE, NONE, "0"]
    both = ratio.low is not None and ratio.high is not None
    ends = f"{ratio.low:.3f} to {ratio.high:.3f}" if both else NONE
    return [f"{ratio.median:.3f}", ends, str(ratio.n)]


# what was measured, and on what


def target(t: Target) -> Table:
    options = " ".join(f"{key}={value}" for key, value in t.options.items())
    files = [f"{f.name}, {gigabytes(f.nbytes)}, SHA-256 {f.sha256 or 'unknown'}" for f in t.files]
    plan = ", ".join(f"{name} {gigabytes(size)}" for name, size in t.plan.items())
    facts = {
        "model": t.name,
        "engine": t.engine,
        "endpoint": t.url or "",
        "architecture": t.architecture,
        "options": options,
        "plan": plan,
        "resident": gigabytes(t.resident_bytes) if t.resident_bytes is not None else "",
        "loading": f"{number(t.load_seconds)} s" if t.load_seconds is not None else "",
    }
    rows = [[key, value] for key, value in facts.items() if value]
    return Table("Target", ["", ""], rows + [["file", f] for f in files], text=2)


def raw(record: Record) -> Table:
    """Every run with all recorded values except its gaps."""
    own = (
        *("index", "name", "side", "started", "prompt_tokens", "cached_tokens"),
        *("generated_tokens", "prefill_seconds", "first_seconds", "decode_seconds"),
        *("total_seconds", "clock", "stop_reason"),
    )
    load = ("other_cpu", "load_average", "mhz_min", "mhz_mean", "throttled", "available_memory")
    ceiling = (
        *("bandwidth", "compute", "decode_bytes", "prefill_macs"),
        *("decode_rate", "prefill_rate"),
    )
    rows = [
        [
            *(_cell(getattr(run, key)) for key in own),
            *(_cell(getattr(run.load, key)) for key in load),
            *(_cell(getattr(run.ceiling, key)) for key in ceiling),
            (run.error or "")[:200],
        ]
        for run in record.runs
    ]
    return Table("Raw runs", [*own, *load, *ceiling, "error"], rows, text=4)


def _cell(x: object) -> str:
    if x is None:
        return NONE
    return f"{x:.6g}" if isinstance(x, float) else str(x)
