"""Medians and the uncertainty of a median ratio."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
INTERVAL = (2.5, 97.5)  # percentiles


@dataclass(frozen=True)
class Ratio:
    """Median of n ratios with its 95 % bootstrap interval; of one ratio there is no interval."""

    median: float
    low: float | None
    high: float | None
    n: int

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.median:.2f} (n=1)"
        return f"{self.median:.2f} ({self.low:.2f}..{self.high:.2f})"


def median_ratio(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Ratio | None:
    """Ratios within rounds, over the rounds that both have; None where there is no such round."""
    rounds = sorted(ours.keys() & theirs.keys())
    if not rounds:
        return None
    ratios = np.array([ours[r] / theirs[r] for r in rounds])
    if len(ratios) == 1:
        return Ratio(float(ratios[0]), None, None, 1)
    rng = np.random.default_rng(0)  # the same data give the same interval
    picked = ratios[rng.integers(len(ratios), size=(RESAMPLES, len(ratios)))]
    low, high = np.percentile(np.median(picked, axis=1), INTERVAL)
    return Ratio(float(np.median(ratios)), float(low), float(high), len(ratios))


def median(samples: Mapping[str, float]) -> float:
    return statistics.median(samples.values())
