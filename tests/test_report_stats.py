"""Statistics against SciPy, known answers and their own promises on noise."""

from __future__ import annotations

import statistics

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.bench.report import stats

values = st.lists(st.floats(0.1, 1e4), min_size=1, max_size=40)


def rounds(*rates: float) -> dict[str, float]:
    return {str(r): rate for r, rate in enumerate(rates)}


# a sample


@given(values)
@settings(max_examples=30, deadline=None)
def test_a_sample_is_what_python_and_numpy_say(x: list[float]) -> None:
    s = stats.sample(x)
    assert s is not None
    assert (s.n, s.min, s.max) == (len(x), min(x), max(x))
    assert s.mean == pytest.approx(statistics.fmean(x))
    assert s.median == pytest.approx(np.median(x))
    assert (s.p5, s.p95) == pytest.approx((np.percentile(x, 5), np.percentile(x, 95)))
    if len(x) == 1:
        assert s.sd is None and s.mean_interval is None and s.median_interval is None
    else:
        assert s.sd == pytest.approx(statistics.stdev(x), abs=1e-9)
        assert s.mean_interval is not None and s.median_interval is not None
        assert s.median_interval.low <= s.median <= s.median_interval.high
    assert stats.sample(x) == s
    assert stats.sample([]) is None


def test_bootstrap_agrees_with_scipy() -> None:
    x = np.random.default_rng(1).gamma(4, 5, 28)
    for statistic in (np.mean, np.median):
        theirs = scipy.stats.bootstrap(
            (x,), statistic, method="percentile", n_resamples=10_000, random_state=3
        ).confidence_interval
        ours = stats.bootstrap(x, statistic)
        assert ours is not None
        width = theirs.high - theirs.low
        assert ours.low == pytest.approx(theirs.low, abs=0.05 * width)
        assert ours.high == pytest.approx(theirs.high, abs=0.05 * width)


def test_resampling_in_chunks_covers_all_resamples(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(2).normal(10, 1, 50)
    whole = stats.bootstrap(x, np.mean)
    monkeypatch.setattr(stats, "_CHUNK", 700)
    parts = stats.bootstrap(x, np.mean)
    assert whole is not None and parts is not None
    assert parts.low == pytest.approx(whole.low, abs=0.03)


# ratios


def test_ratios_are_paired_by_round() -> None:
    # both halve in round 1: the medians' ratio would not change, nor may the pairs'
    ratio = stats.median_ratio(rounds(20, 10, 30), rounds(10, 5, 15))
    assert ratio == stats.Ratio(2, 2, 2, 3)


def test_only_common_rounds_count() -> None:
    ratio = stats.median_ratio({"0": 3.0, "2": 8.0}, {"1": 1.0, "2": 4.0})
    assert ratio == stats.Ratio(2, None, None, 1)
    assert str(ratio) == "2.00 (n=1)"
    assert stats.median_ratio({"0": 1.0}, {"1": 1.0}) is None


def test_the_interval_holds_the_median_and_is_reproducible() -> None:
    ours, theirs = rounds(10, 12, 9, 11, 14), rounds(10, 10, 10, 10, 10)
    ratio = stats.median_ratio(ours, theirs)
    assert ratio is not None and ratio.low is not None and ratio.high is not None
    assert 0.9 <= ratio.low < ratio.median == 1.1 < ratio.high <= 1.4
    assert stats.median_ratio(ours, theirs) == ratio


# lines


points = st.lists(
    st.tuples(st.integers(0, 20), st.floats(-100, 100, width=16)), min_size=2, max_size=30
).filter(lambda p: len({x for x, _ in p}) > 1)


@pytest.mark.filterwarnings("ignore:invalid value")  # scipy's, of ties
@given(points)
@settings(max_examples=60, deadline=None)
def test_slopes_are_scipys_and_the_interval_is_at_most_a_rank_wider(
    p: list[tuple[int, float]],
) -> None:
    x, y = [a for a, _ in p], [b for _, b in p]
    line = stats.theil_sen(x, y)
    theirs = scipy.stats.theilslopes(y, x, method="joint")
    assert line is not None
    assert line.slope == pytest.approx(theirs.slope, abs=1e-9)
    assert line.intercept == pytest.approx(theirs.intercept, abs=1e-9)
    if line.interval is not None and not np.isnan(theirs.low_slope):
        assert line.interval.low <= theirs.low_slope + 1e-9
        assert line.interval.high >= theirs.high_slope - 1e-9


def test_a_line_is_found_through_outliers() -> None:
    x = list(range(20))
    y = [3 + 0.5 * a for a in x]
    for i in (2, 9, 15, 19):
        y[i] *= 4
    line = stats.theil_sen(x, y)
    assert line is not None and line.interval is not None
    assert (line.slope, line.intercept) == pytest.approx((0.5, 3))
    assert line.interval.low <= 0.5 <= line.interval.high
    band = line.band(0)
    assert band is not None and band.low <= 3 <= band.high


def test_few_points_have_no_interval_and_one_x_no_line() -> None:
    assert stats.theil_sen([5, 5, 5], [1, 2, 3]) is None
    few = stats.theil_sen([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])
    assert few is not None and few.interval is None and few.band(2) is None
    six = stats.theil_sen([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6])
    assert six is not None and six.interval is not None


@pytest.mark.parametrize("noise", ["normal", "standard_cauchy"])
def test_the_slopes_interval_covers(noise: str) -> None:
    rng = np.random.default_rng(7)
    x = np.linspace(0, 10, 12)
    covered = 0
    for _ in range(400):
        line = stats.theil_sen(x.tolist(), (2 * x + getattr(rng, noise)(size=12)).tolist())
        assert line is not None and line.interval is not None
        covered += line.interval.low <= 2 <= line.interval.high
    assert covered >= 0.93 * 400  # 95 % but for chance: one standard error is 1.1 %


def test_a_local_line_follows_a_curve_and_no_outlier() -> None:
    x = np.linspace(0, 10, 30)
    y = np.sqrt(x + 1)
    bent = y.copy()
    bent[12] *= 3
    assert np.allclose(stats.local_line(x.tolist(), bent.tolist()), y, atol=0.05)
    assert stats.local_line([4, 4, 4], [1, 2, 9]) == [2, 2, 2]


# outliers


def test_outliers_are_those_of_the_modified_z_score() -> None:
    x = [10.0, 10.1, 9.9, 10.05, 9.95, 10.0, 14.0, 10.02, 6.0]
    mad = scipy.stats.median_abs_deviation(x)
    z = 0.6745 * (np.array(x) - np.median(x)) / mad
    assert stats.outliers(x) == [6, 8] == list(np.flatnonzero(abs(z) > 3.5))
    assert stats.outliers(x, floor=2.0) == []
    assert stats.outliers([1, 1, 1, 1, 1, 1.001]) == [5]
    assert stats.outliers([1, 1, 1, 1, 1, 1.001], floor=0.01) == []
    assert stats.outliers([1, 1, 1, 50]) == []


# a low start


def test_noise_has_a_start_in_at_most_five_of_a_hundred() -> None:
    rng = np.random.default_rng(11)
    for draw in (rng.standard_normal, rng.standard_cauchy, rng.standard_exponential):
        found = sum(
            stats.low_start(draw(28).tolist(), permutations=400).count > 0 for _ in range(300)
        )
        assert found <= 0.05 * 300 + 2.33 * (0.05 * 0.95 * 300) ** 0.5  # 1 % by chance


@pytest.mark.parametrize("count", [2, 3, 5, 8, 13])
def test_a_step_is_found_where_it_is(count: int) -> None:
    # the rest is tested again, which cuts off too much in 5 % of cases
    exact = 0
    for seed in range(40):
        x = np.random.default_rng(seed).normal(0, 0.01, 28)
        x[:count] -= 0.2
        start = stats.low_start(x.tolist(), permutations=400)
        assert start.count >= count and start.p < 0.02
        exact += start.count == count
    assert exact >= 34


def test_a_ramp_is_cut_off_step_by_step() -> None:
    x = np.random.default_rng(3).normal(0, 0.005, 40)
    x[:6] -= [0.5, 0.3, 0.2, 0.12, 0.08, 0.05]
    assert 5 <= stats.low_start(x.tolist()).count <= 7


def test_an_outlier_is_no_start_and_hides_none() -> None:
    x = np.random.default_rng(5).normal(0, 0.01, 28)
    x[14] = -3
    assert stats.low_start(x.tolist()).count == 0
    x[:4] -= 0.1
    assert stats.low_start(x.tolist()).count == 4


def test_what_is_too_short_has_no_start() -> None:
    for x in ([], [1.0], [1.0, 2.0], [0.1, 5, 5, 5, 5], [2.0] * 30):
        assert stats.low_start(x).count == 0
    assert stats.low_start([0.1, *[5 + 0.01 * (i * 7 % 5) for i in range(21)]]).count == 1


def test_a_start_that_is_too_little_lower_is_none() -> None:
    x = np.random.default_rng(9).normal(0, 0.001, 28)
    x[:4] -= 0.008
    assert stats.low_start(x.tolist()).count == 4
    assert stats.low_start(x.tolist(), min_gap=0.01).count == 0


def test_a_high_start_is_not_a_low_one() -> None:
    x = np.random.default_rng(6).normal(0, 0.01, 28)
    x[:5] += 0.3
    assert stats.low_start(x.tolist()).count == 0
