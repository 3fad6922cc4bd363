"""What is said of a record, as plain data: the one source of the Markdown, the HTML, the verdict
and `deskside compare`. Rates in tokens per second, times in seconds; `analysis` fills them in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deskside.bench.record import Run
from deskside.bench.report.stats import Interval, Line, Sample, Start

STABLE = 0.10  # "stable with context": decode changes by less over the measured depths
COUNTED = ("cold", "warm-up", "steady")


@dataclass(frozen=True)
class Row:
    """One run. `phase` is one of

    failed    its clocks are not used
    extra     made only to warm up (`Run.warmup`): listed, in no figure
    cold      the first after loading: kept apart
    warm-up   found to be slow from the data
    steady    the rest

    `tg_expected` is what the trend over depth says of a run this deep, `odd` why the run is an
    outlier.
    """

    run: Run
    phase: str
    pp: float | None
    tg: float | None
    ttft: float | None
    total: float | None
    pp_ceiling: float | None
    tg_ceiling: float | None
    tg_expected: float | None = None
    odd: tuple[str, ...] = ()

    @property
    def depth(self) -> float:
        """Mean number of tokens in the context while decoding."""
        return self.run.depth + max(self.run.generated_tokens - 1, 0) / 2

    @property
    def pp_share(self) -> float | None:
        return share(self.pp, self.pp_ceiling)

    @property
    def tg_share(self) -> float | None:
        return share(self.tg, self.tg_ceiling)


def share(rate: float | None, ceiling: float | None) -> float | None:
    return rate / ceiling if rate is not None and ceiling else None


@dataclass(frozen=True)
class Depth:
    """Decode against depth. The model is seconds a token = t0 + c * depth, which is what reading a
    cache costs; what is said of rates follows from it. `line` is that of seconds a token,
    `shallow` and `deep` are the ends of what was measured, in tokens."""

    line: Line
    shallow: float
    deep: float

    def rate(self, depth: float) -> float | None:
        return _inverse(self.line.at(depth))

    def band(self, depth: float) -> Interval | None:
        """Rates at both ends of the slope's interval."""
        band = self.line.band(depth)
        if band is None or band.low <= 0:
            return None
        return Interval(1 / band.high, 1 / band.low)

    @property
    def per_1k(self) -> float | None:
        """Tokens per second that 1,000 more tokens of context add, at the median depth."""
        return self._per_1k(self.line.slope)

    @property
    def per_1k_interval(self) -> Interval | None:
        return self._interval(self._per_1k)

    def _per_1k(self, slope: float) -> float | None:
        rate = self.rate(self.line.pivot[0])
        return None if rate is None else -slope * 1000 * rate**2

    @property
    def change(self) -> float | None:
        """Relative change of the rate from the shallowest to the deepest run."""
        return self._change(self.line.slope)

    @property
    def change_interval(self) -> Interval | None:
        return self._interval(self._change)

    def _change(self, slope: float) -> float | None:
        x = self.line.pivot[0]
        first, last = (self.line.at(x) + slope * (d - x) for d in (self.shallow, self.deep))
        return first / last - 1 if first > 0 and last > 0 else None

    def _interval(self, of: Callable[[float], float | None]) -> Interval | None:
        """Of something that falls as seconds a token rise with depth."""
        if self.line.interval is None:
            return None
        low, high = of(self.line.interval.high), of(self.line.interval.low)
        return None if low is None or high is None else Interval(low, high)

    def stable(self, within: float = STABLE) -> bool | None:
        """Whether decode is stable with context: True if the change's 95 % interval lies within
        ± `within` (a test of equivalence), False if all of it lies outside, None if the runs show
        neither. That a slope is not significant would be no proof of stability."""
        interval = self.change_interval
        if interval is None:
            return None
        if interval.within(-within, within):
            return True
        return False if interval.high < -within or interval.low > within else None


def _inverse(seconds: float) -> float | None:
    return 1 / seconds if seconds > 0 else None


@dataclass(frozen=True)
class Gaps:
    """Seconds between consecutive tokens. A stall is a gap of more than three times its run's
    median; `lost` is the time that stalls took beyond those medians. `curve` is the distribution:
    (gap, share of the gaps that are no longer)."""

    n: int
    p50: float
    p95: float
    p99: float
    max: float
    stalls: int
    lost: float
    curve: list[tuple[float, float]]


@dataclass(frozen=True)
class Length:
    """Runs of about one prompt length (within 10 %) that took nothing from a cache: medians."""

    tokens: float
    n: int
    pp: float | None
    ttft: float | None
    ceiling: float | None


@dataclass(frozen=True)
class Cache:
    """The runs that took tokens from a cache."""

    runs: int
    cached: int
    computed: int


@dataclass
class Side:
    """`samples` by quantity ("pp", "tg", "ttft", "total") and by "all" (cold, warm-up and steady
    runs), "cold" or "steady"."""

    name: str
    rows: list[Row]
    warmup: Start | None = None  # None where too few runs have a rate
    samples: dict[tuple[str, str], Sample | None] = field(default_factory=dict)
    depth: Depth | None = None
    variation: float | None = None  # relative sd of decode about its trend over depth
    drift: Interval | None = None  # relative change of decode from the first run to the last
    lengths: list[Length] = field(default_factory=list)
    gaps: Gaps | None = None
    cache: Cache | None = None
    free_memory: int | None = None  # least bytes seen
    warnings: list[str] = field(default_factory=list)

    def of(self, *phases: str) -> list[Row]:
        return [row for row in self.rows if row.phase in phases]

    @property
    def basis(self) -> list[Row]:
        """The runs that figures are of: the steady ones, or all where none is."""
        return self.of("steady") or self.of(*COUNTED)


@dataclass(frozen=True)
class Summary:
    sides: dict[str, Side]

    @property
    def rows(self) -> list[Row]:
        """Of all sides, in the order in which the runs were made."""
        return sorted((r for s in self.sides.values() for r in s.rows), key=lambda r: r.run.index)
