"""Facts about a record, as plain data. `analysis` computes them.

Markdown, HTML, the verdict and `deskside compare` all use only these. Rates are tokens per second,
times are seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from deskside.bench.record import Run
from deskside.bench.report.stats import Interval, Line, Sample, Start

STABLE = 0.10  # relative change of decode over the measured depths that counts as stable
COUNTED = ("cold", "warm-up", "steady")


@dataclass(frozen=True)
class Row:
    """One run. `phase` is one of these:

    failed    its times are not used
    extra     made only to warm up (`Run.warmup`); listed, but in no figure
    cold      the first after loading; shown separately
    warm-up   slow at the start, as the data show
    steady    all others

    tg_expected: decode rate that the trend over depth predicts for this run.
    odd: why the run is an outlier; empty if it is none.
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
    """The trend of decode over depth.

    The model is seconds per token = t0 + c * depth, because reading the cache costs time in
    proportion to depth. Rates follow from it.

    line: of seconds per token. shallow, deep: the smallest and largest measured depth, in tokens.
    """

    line: Line
    shallow: float
    deep: float

    def rate(self, depth: float) -> float | None:
        return _inverse(self.line.at(depth))

    def band(self, depth: float) -> Interval | None:
        """Rates at a depth, for both ends of the slope's interval."""
        band = self.line.band(depth)
        if band is None or band.low <= 0:
            return None
        return Interval(1 / band.high, 1 / band.low)

    @property
    def per_1k(self) -> float | None:
        """Change of the rate, in tokens per second, per 1,000 tokens of depth, at the median."""
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
        """The interval of `of(slope)`, a function that falls when the slope rises."""
        if self.line.interval is None:
            return None
        low, high = of(self.line.interval.high), of(self.line.interval.low)
        return None if low is None or high is None else Interval(low, high)

    def stable(self, within: float = STABLE) -> bool | None:
        """Whether decode is stable with context. This is a test of equivalence.

        True if the 95 % interval of the change lies within ± `within`, False if all of it lies
        outside, None otherwise. A slope that is not significant would not prove stability.
        """
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
    """Seconds between consecutive tokens.

    stalls: number of gaps longer than three times the median of their run.
    lost: time that stalls took beyond those medians.
    curve: the distribution, as points (gap, share of gaps that are not longer).
    """

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
    """Medians over runs without cached tokens, whose prompts have one length within 10 %."""

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
    """Facts about one side.

    samples: by quantity ("pp", "tg", "ttft", "total"), then by runs: "all" (cold, warm-up and
    steady), "cold" or "steady".
    """

    name: str
    rows: list[Row]
    warmup: Start | None = None  # None if too few runs have a rate
    samples: dict[tuple[str, str], Sample | None] = field(default_factory=dict)
    depth: Depth | None = None
    variation: float | None = None  # relative standard deviation of decode from its trend
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
        """The runs that figures use: the steady ones, or all if there is none."""
        return self.of("steady") or self.of(*COUNTED)


@dataclass(frozen=True)
class Summary:
    sides: dict[str, Side]

    @property
    def rows(self) -> list[Row]:
        """The runs of all sides, in the order in which they were made."""
        return sorted((r for s in self.sides.values() for r in s.rows), key=lambda r: r.run.index)
