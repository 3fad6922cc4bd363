"""The plots of a report. A plot is None if there is nothing to show."""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree as ET

from deskside.bench.record import Record
from deskside.bench.report import svg
from deskside.bench.report.analysis import positive
from deskside.bench.report.facts import COUNTED, Row, Side, Summary
from deskside.bench.report.svg import Axis, Plot, axis
from deskside.bench.report.tables import measured_limits, number, percent, roofline

WIDE = 8.0  # an axis is logarithmic if its values span this factor
SHAPES = {"cold": "cross", "warm-up": "ring", "steady": "dot"}
STYLES = ("a", "b")  # of sides
LIMIT = "limit"
# Bars of a profile: most bars; heights of a bar with its label, of the label, of the bar alone;
# most characters of a name.
BARS, ROW, LABEL, THICK, LONGEST = 12, 34, 14, 9, 44


def draw(record: Record, summary: Summary) -> list[Plot]:
    sides = list(summary.sides.values())[: len(STYLES)]
    found = [depth(sides), prefill(sides), sequence(sides), gaps(sides)]
    for phase in ("decode", "prefill"):
        found.append(profile(record, phase))
    return [plot for plot in found if plot is not None]


def depth(sides: Sequence[Side]) -> Plot | None:
    shown = [(side, row) for side in sides for row in side.of(*COUNTED) if row.tg]
    if not shown:
        return None
    depths = [max(row.depth, 1) for _, row in shown]
    rates = [v for _, row in shown for v in (row.tg, row.tg_ceiling) if v]
    plot = Plot(
        "Decode against depth",
        "Decode speed of every run over the mean depth of its context, with the trend, the band "
        "of its slope's 95 % interval and the ceiling.",
        _tokens("tokens in the context", depths),
        axis("TG, tok/s", rates, zero=True),
    )
    for style, side in zip(STYLES, sides, strict=False):
        if side.depth is not None:
            trend = side.depth
            inside = [d for d, _ in plot.curve(lambda d: d) if trend.shallow <= d <= trend.deep]
            inside = [trend.shallow, *inside, trend.deep]
            bands = [(d, band) for d in inside if (band := trend.band(d)) is not None]
            plot.band([(d, b.low) for d, b in bands], [(d, b.high) for d, b in bands])
            plot.line([(d, r) for d in inside if (r := trend.rate(d)) is not None], style)
            plot.legend(style, "line", f"trend{_of(sides, side)}")
        ceiling = sorted((max(r.depth, 1), r.tg_ceiling) for r in side.of(*COUNTED) if r.tg_ceiling)
        _ceiling(plot, [(x, y) for x, y in ceiling if y])
        for row in side.of(*COUNTED):
            if row.tg:
                _run(plot, sides, side, row, max(row.depth, 1), row.tg, "TG", "tok/s")
    return plot


def prefill(sides: Sequence[Side]) -> Plot | None:
    shown = [row for side in sides for row in side.of(*COUNTED) if row.pp]
    if not shown:
        return None
    plot = Plot(
        "Prefill against prompt length",
        "Prefill speed of every run over the prompt tokens that it computed, with the ceiling.",
        _tokens("prompt tokens computed", [row.run.prompt_tokens for row in shown]),
        axis("PP, tok/s", [v for row in shown for v in (row.pp, row.pp_ceiling) if v], zero=True),
    )
    for side in sides:
        rows = side.of(*COUNTED)
        ceiling = sorted((float(r.run.prompt_tokens), r.pp_ceiling) for r in rows if r.pp_ceiling)
        _ceiling(plot, [(x, y) for x, y in ceiling if y and x > 0])
        for row in rows:
            if row.pp:
                _run(plot, sides, side, row, row.run.prompt_tokens, row.pp, "PP", "tok/s")
    return plot


def sequence(sides: Sequence[Side]) -> Plot | None:
    """Decode relative to its expected rate, run after run. Shows warm-up, drift and outliers."""
    shown = [
        (side, place, row, row.tg / row.tg_expected)
        for side in sides
        for place, row in enumerate(side.of(*COUNTED), 1)
        if row.tg and row.tg_expected
    ]
    if not shown:
        return None
    plot = Plot(
        "Run after run",
        "Decode speed relative to its trend over depth, in the order of the runs. The line marks "
        "the end of warm-up, if there was any.",
        axis("run", [place for _, place, _, _ in shown]),
        axis("TG over its trend, %", [100.0, *(100 * share for *_, share in shown)]),
    )
    plot.line([(plot.x.low, 100), (plot.x.high, 100)], "grid")
    for style, side in zip(STYLES, sides, strict=False):
        warm = [p for p, r in enumerate(side.of(*COUNTED), 1) if r.phase == "warm-up"]
        if warm:
            plot.line([(warm[-1] + 0.5, plot.y.low), (warm[-1] + 0.5, plot.y.high)], f"end {style}")
            plot.legend(f"end {style}", "line", f"end of warm-up{_of(sides, side)}")
    for side, place, row, share in shown:
        _run(plot, sides, side, row, place, 100 * share, "TG", "% of its trend")
    return plot


def gaps(sides: Sequence[Side]) -> Plot | None:
    curves = [side.gaps.curve for side in sides if side.gaps]
    values = [1e3 * gap for curve in curves for gap, _ in curve if positive(gap)]
    if not values:
        return None
    # a stall of seconds would press all other gaps to the left edge; what is cut off is written
    far = 3e3 * max(side.gaps.p99 for side in sides if side.gaps)
    longest = max(values)
    values = [value for value in values if value <= far] or values
    plot = Plot(
        "Gaps between tokens",
        "Share of the gaps between consecutive tokens that last at most this many milliseconds, "
        "over all steady runs.",
        axis("ms, at most", values, log=True),
        Axis("% of gaps", 0, 100),
    )
    for style, side in zip(STYLES, sides, strict=False):
        if side.gaps is None:
            continue
        plot.line(
            [(1e3 * gap, 100 * part) for gap, part in side.gaps.curve if positive(gap)], style
        )
        if len(sides) > 1:
            plot.legend(style, "line", side.name)
        for name, gap, part in (
            ("p50", side.gaps.p50, 50),
            ("p95", side.gaps.p95, 95),
            ("p99", side.gaps.p99, 99),
        ):
            if positive(gap):
                text = f"{name}: {number(1e3 * gap)} ms"
                plot.point(1e3 * gap, part, "dot", style, text)
    plot.legend("a", "dot", "p50, p95, p99")
    if longest > far:
        plot.note = f"longest: {number(longest)} ms"
    return plot


def profile(record: Record, phase: str) -> Plot | None:
    """Bars of measured time, each with a line at its roofline."""
    ops = [op for op in record.profile if op.phase == phase and positive(op.seconds)]
    if not ops:
        return None
    ops = sorted(ops, key=lambda op: -op.seconds)[:BARS]
    unit, per = ("ms", 1e3) if ops[0].seconds > 1e-3 else ("µs", 1e6)
    bandwidth, compute = measured_limits(record, next(iter(record.targets), "A"))
    plot = Plot(
        f"Where the time of {phase} goes",
        f"Time a token of each op in {phase}, with the least that the machine allows.",
        axis(f"{unit} a token", [op.seconds * per for op in ops], zero=True),
        Axis("", 0, len(ops)),
        height=svg.TOP + svg.BOTTOM + ROW * len(ops),
    )
    start, over = plot.at_x(0), False
    for i, op in enumerate(ops):
        text = svg.TOP + ROW * i + LABEL
        top = text + 6
        end = plot.at_x(op.seconds * per)
        bar = plot.element("rect", "bar", x=start, y=top, width=end - start, height=THICK)
        figures = f"{number(op.seconds * per)} {unit}"
        least = roofline(op, bandwidth, compute)
        if least is not None:
            figures += f", {percent(least.seconds / op.seconds)}"
            over = over or least.seconds > op.seconds
            x = plot.at_x(least.seconds * per)
            plot.element("line", "least", x1=x, x2=x, y1=top - 2, y2=top + THICK + 2)
            plot.note = "line: the least that the machine allows; %: its share of the time taken"
            plot.note += "; over 100 %: see the table" if over else ""
        ET.SubElement(bar, "title").text = f"{op.name}: {figures}"
        name = op.name if len(op.name) <= LONGEST else f"{op.name[: LONGEST - 1]}…"
        plot.write(start + 2, text, f"{name}: {figures}")
    return plot


def _tokens(label: str, values: Sequence[float]) -> Axis:
    return axis(label, values, log=max(values) > WIDE * max(min(values), 1))


def _of(sides: Sequence[Side], side: Side) -> str:
    return f" of {side.name}" if len(sides) > 1 else ""


def _ceiling(plot: Plot, points: list[tuple[float, float]]) -> None:
    if points:
        if len({x for x, _ in points}) == 1:
            points = [(plot.x.low, points[0][1]), (plot.x.high, points[0][1])]
        plot.line(points, LIMIT)
        plot.legend(LIMIT, "line", "ceiling")


def _run(
    plot: Plot,
    sides: Sequence[Side],
    side: Side,
    row: Row,
    x: float,
    y: float,
    name: str,
    unit: str,
) -> None:
    style = STYLES[sides.index(side)]
    text = f"run {row.run.index} {row.run.name}: {name} {number(y)} {unit}, {row.phase}"
    plot.point(x, y, SHAPES[row.phase], style, text)
    plot.legend(style, SHAPES[row.phase], f"{row.phase}{_of(sides, side)}")
    if any(why.startswith(name) for why in row.odd):
        plot.point(x, y, "diamond", style, f"outlier: {'; '.join(row.odd)}")
        plot.legend(style, "diamond", "outlier")
