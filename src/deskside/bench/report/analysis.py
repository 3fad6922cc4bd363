"""Computes facts from a record: phases of runs, trends, outliers, gaps, disturbances.

Times that are missing, zero, negative or absurd count as unknown. So any record that can be read
can be summarised.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np

from deskside.bench.record import Record, Run
from deskside.bench.report.facts import COUNTED, Cache, Depth, Gaps, Length, Row, Side, Summary
from deskside.bench.report.stats import (
    OUTLIER,
    Interval,
    Start,
    local_line,
    low_start,
    outliers,
    sample,
    theil_sen,
)

MATERIAL = 0.01  # smaller relative differences are ignored
# The same for prefill: at the ends of the lengths, the expected rate is wrong by up to 2 %.
PREFILL_MATERIAL = 0.03
STALL = 3.0  # times the median gap of a run
SPAN = 1.5  # depths from d to at least SPAN * d have a trend
NEAR = 1.1  # prompts up to this times the shortest have one length
DRIFT = 0.02  # relative; no warning below it
OTHER_CPU = 0.1  # cores that other programs may use without a warning
ABOVE = 1.05  # times the ceiling; samples of bandwidth scatter by some per cent
SLOWER_CLOCK = 0.95  # times the highest mean frequency of a run
HUGE = 1e12  # seconds, or tokens per second; above it, and below its inverse, a clock is broken

T = TypeVar("T")

QUANTITIES: dict[str, Callable[[Row], float | None]] = {
    "pp": lambda row: row.pp,
    "tg": lambda row: row.tg,
    "ttft": lambda row: row.ttft,
    "total": lambda row: row.total,
}


def summarise(record: Record) -> Summary:
    names = dict.fromkeys([*record.targets, *(run.side for run in record.runs)])
    sides = (_side(name, [run for run in record.runs if run.side == name]) for name in names)
    return Summary({side.name: side for side in sides})


def positive(x: float | None) -> float | None:
    """x, or None if x is not a possible time or rate."""
    return x if x is not None and 1 / HUGE < x < HUGE else None


def known(values: Iterable[T | None]) -> list[T]:
    return [value for value in values if value is not None]


def _side(name: str, runs: list[Run]) -> Side:
    side = Side(name, [_row(run) for run in runs])
    side.warmup = _cut_warmup(side)
    side.depth = _depth(side.basis)
    _expect_decode(side)
    _name_outliers(side)
    for quantity, get in QUANTITIES.items():
        for phase, phases in (("all", COUNTED), ("cold", ("cold",)), ("steady", ("steady",))):
            side.samples[quantity, phase] = sample(known(map(get, side.of(*phases))))
    residuals = [r for row in side.basis if (r := _residual(row)) is not None]
    if len(residuals) > 1:
        side.variation = statistics.stdev(math.exp(r) for r in residuals)
    side.drift = _drift(residuals)
    side.lengths = _lengths(side.basis)
    side.gaps = _gaps(side.basis)
    side.cache = _cache(side.of(*COUNTED))
    side.free_memory = min(known(row.run.load.available_memory for row in side.rows), default=None)
    side.warnings = _warnings(side)
    return side


def _row(run: Run) -> Row:
    phase = "steady"
    for mark, name in ((run.cold, "cold"), (run.warmup, "extra"), (not run.ok, "failed")):
        phase = name if mark else phase
    return Row(
        run=run,
        phase=phase,
        pp=positive(run.prefill_rate) if run.prompt_tokens > 0 else None,
        tg=positive(run.decode_rate),
        ttft=positive(run.first_seconds) if run.ok else None,
        total=positive(run.total_seconds) if run.ok else None,
        pp_ceiling=positive(run.ceiling.prefill_rate),
        tg_ceiling=positive(run.ceiling.decode_rate),
    )


# decode: its trend over depth, warm-up, drift


def _depth(rows: Sequence[Row]) -> Depth | None:
    """The trend of decode over depth; None if there is only one depth."""
    decoded = [(row.depth, 1 / row.tg) for row in rows if row.tg]
    depths = [depth for depth, _ in decoded]
    if not decoded or max(depths) < SPAN * max(min(depths), 1):
        return None
    line = theil_sen(depths, [seconds for _, seconds in decoded])
    return None if line is None else Depth(line, min(depths), max(depths))


def _expected(rows: Sequence[Row]) -> Callable[[Row], float | None]:
    """A function that gives the expected decode rate of a row, from all rows."""
    trend = _depth(rows)
    rates = known(row.tg for row in rows)
    middle = statistics.median(rates) if rates else None
    return lambda row: (trend and positive(trend.rate(row.depth))) or middle


def _expect_decode(side: Side) -> None:
    expected = _expected(side.basis)
    side.rows = [
        row if row.phase == "failed" else replace(row, tg_expected=expected(row))
        for row in side.rows
    ]


def _residual(row: Row) -> float | None:
    """Logarithm of the decode rate divided by the expected one; None if unknown."""
    return math.log(row.tg / row.tg_expected) if row.tg and row.tg_expected else None


def _cut_warmup(side: Side) -> Start | None:
    """Mark slow runs after the cold ones as warm-up. Returns None if there is nothing to test.

    The test uses decode rates relative to their trend over depth, because a deep run is slow but
    not warm-up. If fewer than two runs decode, it uses prefill rates relative to runs of similar
    length.
    """
    warm = [i for i, row in enumerate(side.rows) if row.phase == "steady"]
    rows = [side.rows[i] for i in warm]
    expected = _expected(rows)
    found = [_residual(replace(row, tg_expected=expected(row))) for row in rows]
    material = MATERIAL
    if len(known(found)) < 2:
        found, material = _prefill_residuals(rows), PREFILL_MATERIAL
    tested = [(i, value) for i, value in zip(warm, found, strict=True) if value is not None]
    if len(tested) < 2:
        return None
    start = low_start([value for _, value in tested], floor=material / OUTLIER, min_gap=material)
    last = tested[start.count - 1][0] if start.count else -1
    for i in warm:
        if i <= last:
            side.rows[i] = replace(side.rows[i], phase="warm-up")
    return start


def _prefill_residuals(rows: Sequence[Row]) -> list[float | None]:
    """Logarithms of prefill rates divided by those of the runs closest in length."""
    chosen = [row for row in rows if row.pp]
    lengths = [math.log(row.run.prompt_tokens) for row in chosen]
    rates = [math.log(row.pp) for row in chosen if row.pp]
    away = iter([y - e for y, e in zip(rates, local_line(lengths, rates), strict=True)])
    return [next(away) if row.pp else None for row in rows]


def _drift(residuals: Sequence[float]) -> Interval | None:
    line = theil_sen(range(len(residuals)), residuals)
    if line is None or line.interval is None:
        return None
    ends = (line.interval.low, line.interval.high)
    low, high = (math.expm1(min(slope * (len(residuals) - 1), 50)) for slope in ends)
    return Interval(low, high)


def _name_outliers(side: Side) -> None:
    basis = {row.phase for row in side.basis}
    chosen = [i for i, row in enumerate(side.rows) if row.phase in basis]
    rows = [side.rows[i] for i in chosen]
    for name, found, material, than in (
        ("TG", [_residual(row) for row in rows], MATERIAL, "its depth lets expect"),
        ("PP", _prefill_residuals(rows), PREFILL_MATERIAL, "runs of about its length"),
    ):
        tested = [(i, value) for i, value in zip(chosen, found, strict=True) if value is not None]
        for k in outliers([value for _, value in tested], floor=material / OUTLIER):
            i, away = tested[k]
            text = f"{name} {_relative(math.expm1(away))} than {than}"
            side.rows[i] = replace(side.rows[i], odd=(*side.rows[i].odd, text))


def _relative(x: float) -> str:
    return f"{abs(x):.1%} {'higher' if x > 0 else 'lower'}".replace("%", " %")


# prompts, gaps, cache


def _lengths(rows: Sequence[Row]) -> list[Length]:
    computed = sorted(
        (row for row in rows if row.run.prompt_tokens > 0 and row.run.cached_tokens == 0),
        key=lambda row: row.run.prompt_tokens,
    )
    groups: list[list[Row]] = []
    for row in computed:
        if groups and row.run.prompt_tokens <= NEAR * groups[-1][0].run.prompt_tokens:
            groups[-1].append(row)
        else:
            groups.append([row])

    def median(group: list[Row], get: Callable[[Row], float | None]) -> float | None:
        values = known(map(get, group))
        return statistics.median(values) if values else None

    return [
        Length(
            tokens=statistics.median(row.run.prompt_tokens for row in group),
            n=len(group),
            pp=median(group, lambda row: row.pp),
            ttft=median(group, lambda row: row.ttft),
            ceiling=median(group, lambda row: row.pp_ceiling),
        )
        for group in groups
    ]


CURVE = np.concatenate([np.linspace(0, 0.99, 100), [0.995, 0.998, 0.999, 1]])


def _gaps(rows: Sequence[Row]) -> Gaps | None:
    pooled: list[float] = []
    stalls, lost = 0, 0.0
    for row in rows:
        gaps = [gap for gap in row.run.gaps if 0 <= gap < HUGE]
        if not gaps:
            continue
        pooled += gaps
        middle = statistics.median(gaps)
        long = [gap for gap in gaps if gap > STALL * middle]
        stalls += len(long)
        lost += sum(gap - middle for gap in long)
    if not pooled:
        return None
    p50, p95, p99 = (float(q) for q in np.percentile(pooled, (50, 95, 99)))
    curve = zip(np.quantile(pooled, CURVE).tolist(), CURVE.tolist(), strict=True)
    return Gaps(len(pooled), p50, p95, p99, max(pooled), stalls, lost, list(curve))


def _cache(rows: Sequence[Row]) -> Cache | None:
    hits = [row.run for row in rows if row.run.cached_tokens > 0]
    if not hits:
        return None
    return Cache(
        len(hits),
        sum(run.cached_tokens for run in hits),
        sum(max(run.prompt_tokens, 0) for run in hits),
    )


# what may spoil the figures


def _warnings(side: Side) -> list[str]:
    rows = side.of(*COUNTED)
    said = []
    if rows and not side.of("steady"):
        said.append("no run is steady: figures use cold and warm-up runs")
    loads = {row.run.index: row.run.load for row in rows}
    if busy := {i: c for i, load in loads.items() if (c := load.other_cpu or 0.0) > OTHER_CPU}:
        said.append(f"{_runs(busy)}: other programs used up to {max(busy.values()):.2g} cores")
    clocks = {i: f for i, load in loads.items() if (f := positive(load.mhz_mean)) is not None}
    fastest = max(clocks.values(), default=0.0)
    if slow := {i: f for i, f in clocks.items() if f < SLOWER_CLOCK * fastest}:
        lowest = min(slow.values())
        said.append(f"{_runs(slow)}: the clock fell to {lowest:.0f} MHz from {fastest:.0f}")
    if hot := {i: n for i, load in loads.items() if (n := load.throttled or 0) > 0}:
        said.append(f"{_runs(hot)}: {sum(hot.values())} thermal throttle events")
    shares = {row.run.index: max(row.pp_share or 0.0, row.tg_share or 0.0) for row in rows}
    if over := {i: share for i, share in shares.items() if share > ABOVE}:
        max_percent = 100 * max(over.values())
        said.append(
            f"{_runs(over)}: up to {max_percent:.0f} % of the ceiling: a small model stays in the "
            "CPU's caches, or other programs slowed the sample of memory"
        )
    if side.drift and not side.drift.low <= 0 <= side.drift.high:
        nearest = min(abs(side.drift.low), abs(side.drift.high))
        if nearest > DRIFT:
            way = "faster" if side.drift.low > 0 else "slower"
            said.append(f"decode became {way} by at least {100 * nearest:.0f} % over the runs")
    if any(row.run.clock == "stream" for row in rows):
        said.append("times are those of arrival here: they include network and buffering")
    return said


def _runs(indices: Iterable[int]) -> str:
    """Text such as "runs 3, 4 and 7 more". It names at most five runs."""
    numbers = sorted(indices)
    named = ", ".join(map(str, numbers[:5]))
    more = f" and {len(numbers) - 5} more" if len(numbers) > 5 else ""
    return f"run{'s' * (len(numbers) > 1)} {named}{more}"
