"""Extrapolates the times of a few slices to the whole model: T = head + layers * layer.

"Head" is all that runs once per step. It may be half of a short slice's bytes, so time must not be
scaled by the number of layers alone. Slices of different depth tell head and layers apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percentiles

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """Seconds at full depth. `low` and `high` bound a 95 % interval of `seconds`.

    misfit: the largest relative difference between a slice and its prediction from the others; None
    for two slices, because a line through two points always fits.
    """

    head: float
    layer: float
    seconds: float
    low: float
    high: float
    misfit: float | None


def fit(layers: Floats, seconds: Floats, use: NDArray[np.bool_] | None = None) -> Floats:
    """Fit lines by weighted least squares. Returns (..., 2): head and layer, in seconds.

    layers: (k,) or (..., k). seconds: (..., k). use: bool (..., k), slices that count.
    The weight is 1 / seconds², because timings scatter in proportion to their length.
    """
    w = 1 / seconds**2
    if use is not None:
        w = w * use
    n = w.sum(-1)
    x = (w * layers).sum(-1) / n
    y = (w * seconds).sum(-1) / n
    spread = (w * (layers - x[..., None]) ** 2).sum(-1)
    layer = (w * (layers - x[..., None]) * (seconds - y[..., None])).sum(-1) / spread
    return np.stack([y - layer * x, layer], axis=-1)


def extrapolate(
    layers: Sequence[float], samples: Sequence[Sequence[float]], target: float, *, paired: bool
) -> Estimate:
    """Estimate the time at `target` layers. samples: seconds of each slice, round by round.

    A slice counts with the median of its rounds. The interval is a bootstrap over rounds. `paired`
    means that round i of all slices was measured at one time, so a resample draws it for all.

    Each resample also leaves out one slice at random, because the choice of slices adds
    uncertainty. Far beyond the deepest slice this is the larger part. The estimate is never faster
    than the deepest slice.
    """
    x = np.array(layers, np.float64)
    rounds = [np.array(s, np.float64) for s in samples]
    y = np.array([np.median(r) for r in rounds])
    head, layer = fit(x, y)
    k = len(x)
    use = np.ones((1, k), np.bool_)
    misfit = None
    if k > 2:
        use = ~np.eye(k, dtype=np.bool_)
        lines = fit(x, np.broadcast_to(y, (k, k)), use)
        misfit = float((np.abs(lines[:, 0] + lines[:, 1] * x - y) / y).max())

    rng = np.random.default_rng(0)  # so that the same samples give the same interval
    shared = rng.integers(len(rounds[0]), size=(RESAMPLES, len(rounds[0])))
    drawn = np.stack(
        [
            np.median(
                r[shared if paired else rng.integers(len(r), size=(RESAMPLES, len(r)))], axis=1
            )
            for r in rounds
        ],
        axis=1,
    )
    lines = fit(x, drawn, use[rng.integers(len(use), size=RESAMPLES)])
    deepest = int(x.argmax())
    reach = target >= x[deepest]
    times = lines[:, 0] + lines[:, 1] * target
    low, high = np.percentile(np.maximum(times, drawn[:, deepest]) if reach else times, INTERVAL)
    at = max(head + layer * target, y[deepest] if reach else -np.inf)
    return Estimate(
        float(head), float(layer), float(at), float(min(low, at)), float(max(high, at)), misfit
    )
