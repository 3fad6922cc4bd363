"""The statistics of a report. All seeds are fixed, so the same data give the same result.

Runs on a shared machine have long tails. So the methods do not assume normal noise, and a few odd
values have little effect. If there are too few values for a 95 % interval, there is none.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError

Floats = NDArray[np.float64]

RESAMPLES = 10_000
Z = 1.959964  # standard normal quantile of 97.5 %
ALPHA = 0.05
# With fewer pairs or points, no 95 % interval of a median holds for any noise: all n values lie on
# one side of the median with probability 2 * 2**-n, which is 6 % for five.
FEWEST = 6
OUTLIER = 3.5  # modified z-score (Iglewicz and Hoaglin 1993)
MAD_TO_SD = 1.4826  # for normal noise
CLIP = 4.0  # standard deviations; a value further away counts as this far
_CHUNK = 1 << 20  # values to resample at once, which limits memory


def _scipy_stats() -> Any:
    """scipy.stats, loaded only when a report is made."""
    try:
        import scipy.stats
    except ImportError:
        raise DesksideError("statistics need: pip install 'deskside[bench]'") from None
    return scipy.stats


@dataclass(frozen=True)
class Interval:
    low: float
    high: float

    def within(self, low: float, high: float) -> bool:
        return low <= self.low and self.high <= high


@dataclass(frozen=True)
class Sample:
    """Statistics of a list of values.

    sd: of the sample (n - 1). One value has neither an sd nor an interval.
    """

    n: int
    max: float
    min: float
    mean: float
    median: float
    p5: float
    p95: float
    sd: float | None
    mean_interval: Interval | None
    median_interval: Interval | None


def sample(values: Sequence[float]) -> Sample | None:
    """The statistics of values; None for no values."""
    if not values:
        return None
    x = np.asarray(values, np.float64)
    p5, median, p95 = np.percentile(x, (5, 50, 95))
    return Sample(
        n=len(x),
        max=float(x.max()),
        min=float(x.min()),
        mean=float(x.mean()),
        median=float(median),
        p5=float(p5),
        p95=float(p95),
        sd=float(x.std(ddof=1)) if len(x) > 1 else None,
        mean_interval=bootstrap(x, np.mean),
        median_interval=bootstrap(x, np.median),
    )


def bootstrap(x: Floats, statistic: Callable[..., Floats]) -> Interval | None:
    """95 % percentile bootstrap interval of a statistic that takes `axis`; None for one value.

    It is too narrow for few values: for n = 5 it covers a median about 94 times in 100, for n = 3
    about 75 times.
    """
    if len(x) < 2:
        return None
    low, high = (
        _scipy_stats()
        .bootstrap(
            (x,),
            statistic,
            n_resamples=RESAMPLES,
            batch=max(1, _CHUNK // len(x)),
            method="percentile",
            vectorized=True,
            rng=np.random.default_rng(0),
        )
        .confidence_interval
    )
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Ratio:
    """Median of n ratios, with a 95 % bootstrap interval if n > 1."""

    median: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.2f} (n=1)"
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def median_ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Ratio | None:
    """Ratios within the rounds that both sides have; None if there is no such round."""
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return None
    ratios = np.array([ours[r] / theirs[r] for r in rounds])
    interval = bootstrap(ratios, np.median)
    median = float(np.median(ratios))
    if interval is None:
        return Ratio(median, None, None, 1)
    return Ratio(median, interval.low, interval.high, len(ratios))


@dataclass(frozen=True)
class Line:
    """y = intercept + slope * x, with the 95 % interval of the slope."""

    slope: float
    intercept: float
    interval: Interval | None
    pivot: tuple[float, float]  # medians of x and y; `band` turns the line around this point
    n: int

    def at(self, x: float) -> float:
        return self.intercept + self.slope * x

    def band(self, x: float) -> Interval | None:
        """The line's value at x for both ends of the slope's interval."""
        if self.interval is None:
            return None
        middle = self.at(self.pivot[0])
        ends = sorted(
            middle + s * (x - self.pivot[0]) for s in (self.interval.low, self.interval.high)
        )
        return Interval(*ends)


def theil_sen(x: Sequence[float], y: Sequence[float]) -> Line | None:
    """The line with the median slope of all pairs of points; None if all x are equal.

    Unlike least squares, it tolerates up to 29 % outliers. The interval is Sen's (1968), between
    two ranks of the slopes that follow from Kendall's tau, corrected for ties. It needs no
    resampling, and holds for any noise that is the same at every x. It is None for fewer than six
    points.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    i, j = np.triu_indices(len(xs), 1)
    dx, dy = xs[j] - xs[i], ys[j] - ys[i]
    slopes = np.sort(dy[dx != 0] / dx[dx != 0])
    if not len(slopes):
        return None
    slope = float(np.median(slopes))
    return Line(
        slope=slope,
        intercept=float(np.median(ys - slope * xs)),
        interval=_sen_interval(slopes, xs, ys),
        pivot=(float(np.median(xs)), float(np.median(ys))),
        n=len(xs),
    )


def _sen_interval(slopes: Floats, xs: Floats, ys: Floats) -> Interval | None:
    if len(xs) < FEWEST:
        return None

    def spread(n: NDArray[np.int64]) -> float:
        return float(np.sum(n * (n - 1) * (2 * n + 5))) / 18

    ties = [spread(np.unique(v, return_counts=True)[1]) for v in (xs, ys)]
    variance = spread(np.array([len(xs)])) - sum(ties)
    rank = int((len(slopes) - Z * max(variance, 0.0) ** 0.5) // 2)  # from 1, rounded outwards
    if rank < 1:
        return None
    return Interval(float(slopes[rank - 1]), float(slopes[-rank]))


def local_line(x: Sequence[float], y: Sequence[float], near: int = 7) -> list[float]:
    """At each x, the value of a Theil-Sen line through the `near` closest points.

    This is the expected y if y changes smoothly with x in no particular form.
    """
    xs, ys = np.asarray(x, np.float64), np.asarray(y, np.float64)
    expected = []
    for at in xs:
        chosen = np.argsort(np.abs(xs - at), kind="stable")[:near]
        line = theil_sen(xs[chosen].tolist(), ys[chosen].tolist())
        expected.append(line.at(float(at)) if line else float(np.median(ys[chosen])))
    return expected


def scores(values: Sequence[float], floor: float = 0.0) -> list[float]:
    """Distances from the median in robust standard deviations (1.4826 MAD, at least `floor`).

    If all values agree closely, the floor keeps tiny differences from counting as odd. Without a
    floor, if more than half of the values are equal, any other value is infinitely far.
    """
    if not values:
        return []
    x = np.asarray(values, np.float64)
    away = x - np.median(x)
    scale = max(MAD_TO_SD * float(np.median(np.abs(away))), floor)
    with np.errstate(divide="ignore", invalid="ignore"):
        return [float(s) for s in np.where(away == 0, 0.0, away / scale)]


def outliers(values: Sequence[float], floor: float = 0.0) -> list[int]:
    """Indices of values with a modified z-score above 3.5. Needs five values.

    Among four values, two pairs can form by chance, and neither is the odd one.
    """
    if len(values) < 5:
        return []
    return [i for i, s in enumerate(scores(values, floor)) if abs(s) > OUTLIER]


@dataclass(frozen=True)
class Start:
    """The first `count` values are lower than the rest. `p`: probability of that by chance."""

    count: int
    p: float


def low_start(
    values: Sequence[float], *, floor: float = 0.0, min_gap: float = 0.0, permutations: int = 4000
) -> Start:
    """Count the first values, at most half, that lie below the others. Often that is 0.

    Every split into start and rest is tried. Its statistic is the difference of the means divided
    by its standard error. Values are clipped at 4 robust standard deviations, so that an outlier
    can neither hide nor make a start.

    The largest statistic is compared with those of shuffled values. If the order means nothing, a
    start is found in at most 5 % of cases, for any distribution. A start that is found is cut off
    and the rest tested again, because warm-up is often a ramp, not a step.

    floor: as in `scores`. min_gap: smallest distance of the medians that counts as a start.

    The test cannot find a start of one among fewer than 20 values, or of two among fewer than 7:
    chance puts low values there too often.
    """
    x = np.clip(scores(values, floor), -CLIP, CLIP)
    raw = np.asarray(values, np.float64)
    count, p = 0, 1.0
    rng = np.random.default_rng(0)
    while True:
        rest = x[count:]
        limit = min(len(x) // 2 - count, len(rest) - 1)
        if limit < 1 or not rest.std():
            break
        best = int(np.argmax(_splits(rest, limit)))
        here = float(
            _scipy_stats()
            .permutation_test(
                (rest,),
                lambda order, axis, limit=limit: _splits(order, limit).max(axis=-1),
                permutation_type="pairings",
                alternative="greater",
                n_resamples=permutations,
                vectorized=True,
                rng=rng,
            )
            .pvalue
        )
        if here > ALPHA:
            p = here if not count else p
            break
        p = here if not count else p
        cut = count + best + 1
        if np.median(raw[cut:]) - np.median(raw[count:cut]) < min_gap:
            break
        count = cut
    return Start(count, p)


def _splits(x: Floats, limit: int) -> Floats:
    """The statistic of each split: x (..., n) -> (..., limit).

    For the first k = 1..limit values: how far their mean is below that of the rest, times
    sqrt(k (n - k) / n). All shuffles of a row have the same spread, so it is not divided by that.
    """
    n = x.shape[-1]
    k = np.arange(1, limit + 1)
    sums = np.cumsum(x, axis=-1)
    head, total = sums[..., :limit], sums[..., -1:]
    below = (total - head) / (n - k) - head / k
    return np.asarray(below * np.sqrt(k * (n - k) / n))
