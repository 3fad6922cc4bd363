"""Prints a prediction as tables."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deskside.bench.predict.measure import Figure, Prediction

WIDTH = 110  # characters of the widest table; piped output would be cut to 80


def show(p: Prediction) -> None:
    """Print the measured slices, the check, the figures of the whole model, and notes."""
    console = Console(highlight=False, soft_wrap=True)
    console.width = max(console.width, WIDTH)
    console.print(
        f"{p.cpu}, {p.threads} threads, {p.isa}, {p.bandwidth / 1e9:.1f} GB/s\n"
        f"{p.options.repeats} rounds, {p.choice.order}",
        markup=False,
    )
    console.print(_measured(p))
    if p.choice.check is not None:
        console.print(_check(p, p.choice.check.layers))
    console.print(_figures(p))
    for note in p.notes:
        console.print(f"note: {note}", markup=False)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("tok/s", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _measured(p: Prediction) -> Table:
    table = _table("measured (share of ceiling)", *(f"{m.slice.layers} layers" for m in p.slices))
    for f in p.figures:
        rates = [(f.tokens / m.median(f.kind), p.ceiling(m.slice, f)) for m in p.slices]
        table.add_row(f.kind, *(_rate(rate) + _share(rate, ceiling) for rate, ceiling in rates))
    shares = (f"{100 * m.slice.head_share:.0f} %" for m in p.slices)
    table.add_row("head, of a token's bytes", *shares)
    return table


def _check(p: Prediction, layers: int) -> Table:
    title = f"check: {layers} layers, not in the fit"
    table = _table(title, "predicted", "95 % interval", "measured", "error")
    for f in p.figures:
        if None not in (f.check_rate, f.measured, f.error):
            table.add_row(
                f.kind,
                _rate(f.check_rate),
                _interval(f.check_low, f.check_high),
                _rate(f.measured),
                f"{100 * (f.error or 0):+.1f} %",
            )
    return table


def _figures(p: Prediction) -> Table:
    title = f"{p.preset}, {p.layers} layers, {p.nbytes / 1e9:.0f} GB: predicted"
    table = _table(title, "predicted", "95 % interval", "ceiling", "head", "a layer", "misfit")
    for f in p.figures:
        e = f.estimate
        table.add_row(
            f.kind,
            _rate(f.rate),
            _interval(f.low, f.high),
            _ceiling(f),
            f"{1e3 * e.head:.2f} ms",
            f"{1e3 * e.layer * f.scale:.3f} ms",
            "" if e.misfit is None else f"{100 * e.misfit:.1f} %",
        )
    return table


def _rate(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def _share(rate: float, ceiling: float | None) -> str:
    return "" if ceiling is None else f" ({100 * rate / ceiling:.0f} %)"


def _interval(low: float | None, high: float | None) -> str:
    return f"{_rate(low)} .. {_rate(high)}"


def _ceiling(f: Figure) -> str:
    return "" if f.ceiling is None else _rate(f.ceiling) + _share(f.rate, f.ceiling)
