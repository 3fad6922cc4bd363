"""The analysis finds what was put into a record, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from deskside.bench.report.analysis import summarise
from deskside.bench.report.facts import Side
from deskside.machine.watch import Load
from tests.records import BANDWIDTH, COMPUTE, MACS, PROMPTS, make_record, make_run


def phases(side: Side) -> list[str]:
    return [row.phase for row in side.rows]


def test_cold_warmup_steady_extra_and_failed_runs_are_apart() -> None:
    record = make_record(factors={1: 0.7, 2: 0.8, 3: 0.85})
    record.runs[10].error = "the server went away"
    record.runs[11].warmup = True
    side = summarise(record).sides["A"]
    expected = ["cold", *["warm-up"] * 3, *["steady"] * 24]
    expected[10], expected[11] = "failed", "extra"
    assert phases(side) == expected
    assert side.warmup is not None and side.warmup.count == 3 and side.warmup.p < 0.05
    counts = {key: s.n for key, s in side.samples.items() if s is not None}
    assert counts["tg", "all"] == 26
    assert counts["tg", "steady"] == counts["pp", "steady"] == counts["ttft", "steady"] == 22
    assert counts["total", "cold"] == 1
    assert side.rows[10].tg is None and side.rows[10].ttft is None


@pytest.mark.parametrize("shuffle", [True, False])
def test_prompt_size_is_no_warmup(shuffle: bool) -> None:
    """Prompts that grow or shrink from run to run slow decode by a half, which is no warm-up."""
    for prompts in (sorted(PROMPTS), sorted(PROMPTS, reverse=True)):
        record = make_record(prompts=prompts, slope=0.03, shuffle=shuffle)
        side = summarise(record).sides["A"]
        assert side.warmup is not None and side.warmup.count == 0
        assert phases(side)[1:] == ["steady"] * 27


def test_warmup_is_found_among_growing_prompts_too() -> None:
    record = make_record(prompts=sorted(PROMPTS), shuffle=False, factors={1: 0.8, 2: 0.8})
    assert phases(summarise(record).sides["A"]).count("warm-up") == 2


def test_noise_has_no_warmup_more_often_than_promised() -> None:
    found = 0
    for seed in range(30):
        record = make_record(seed=seed, noise=0.02, generated=3)
        start = summarise(record).sides["A"].warmup
        found += start is not None and start.count > 0
    assert found <= 4  # 5 % of 30, but for a chance of 1 %


def test_an_immaterial_warmup_is_none() -> None:
    record = make_record(noise=0.0001, factors={1: 0.995, 2: 0.995, 3: 0.995})
    assert phases(summarise(record).sides["A"]).count("warm-up") == 0


def test_prefill_shows_warmup_where_nothing_is_decoded() -> None:
    record = make_record(generated=1, factors={1: 0.6, 2: 0.6, 3: 0.7})
    side = summarise(record).sides["A"]
    assert phases(side) == ["cold", *["warm-up"] * 3, *["steady"] * 24]
    assert side.depth is None and side.gaps is None and side.samples["tg", "all"] is None


# depth


def test_the_slope_is_the_one_that_was_put_in() -> None:
    side = summarise(make_record(slope=0.03, noise=0.004)).sides["A"]
    depth = side.depth
    assert depth is not None and depth.per_1k_interval is not None
    x = depth.line.pivot[0]
    rate = 30 / (1 + 0.03 * x / 1000)
    truth = -0.03 / 30 * rate**2
    assert depth.per_1k_interval.low <= truth <= depth.per_1k_interval.high < 0
    assert depth.per_1k == pytest.approx(truth, rel=0.05)
    change = (1 + 0.03 * depth.shallow / 1000) / (1 + 0.03 * depth.deep / 1000) - 1
    assert depth.change == pytest.approx(change, abs=0.01)
    assert depth.stable() is False
    assert depth.rate(8000) == pytest.approx(30 / 1.24, rel=0.01)
    band = depth.band(16_000)
    assert band is not None and band.low < 30 / 1.48 < band.high


def test_stable_means_an_interval_within_bounds_not_a_slope_that_is_not_significant() -> None:
    steady = summarise(make_record(slope=0.001)).sides["A"].depth
    noisy = summarise(make_record(slope=0, noise=0.3)).sides["A"].depth
    assert steady is not None and steady.stable() is True
    assert steady.stable(within=0.001) is False
    assert noisy is not None and noisy.stable() is None
    few = summarise(make_record(prompts=(500, 1000, 4000), cold=False)).sides["A"].depth
    assert few is not None and few.change_interval is None and few.stable() is None


def test_one_depth_has_no_trend() -> None:
    side = summarise(make_record(prompts=[1000] * 12)).sides["A"]
    assert side.depth is None
    assert all(row.tg_expected == pytest.approx(30, rel=0.02) for row in side.rows)


# outliers, gaps, ceilings, cache, lengths


def test_outliers_are_named_and_kept() -> None:
    record = make_record(factors={9: 0.9, 20: 1.1})
    side = summarise(record).sides["A"]
    assert [row.run.index for row in side.rows if row.odd] == [9, 20]
    assert "TG" in side.rows[9].odd[0] and "lower" in side.rows[9].odd[0]
    assert "PP" in side.rows[20].odd[1] and "higher" in side.rows[20].odd[1]
    sample = side.samples["tg", "steady"]
    assert sample is not None and sample.n == 27 and sample.min == side.rows[9].tg


def test_stalls_are_counted_with_the_time_that_they_took() -> None:
    record = make_record(prompts=[1000] * 8, generated=101, noise=0)
    record.runs[3].gaps[50] += 2.0
    record.runs[5].gaps[7] += 1.0
    record.runs[6].error = "gone"
    record.runs[6].gaps[1] = 50.0
    gaps = summarise(record).sides["A"].gaps
    assert gaps is not None and (gaps.n, gaps.stalls) == (600, 2)
    assert gaps.lost == pytest.approx(3.0, abs=0.05)
    assert gaps.max == pytest.approx(2 + 1 / 30, abs=0.02)
    pooled = [g for r in record.runs if r.ok and not r.cold for g in r.gaps]
    assert (gaps.p50, gaps.p95, gaps.p99) == pytest.approx(np.percentile(pooled, (50, 95, 99)))
    assert gaps.curve[0] == (min(pooled), 0) and gaps.curve[-1] == (max(pooled), 1)


def test_shares_are_of_the_runs_own_ceiling() -> None:
    record = make_record()
    for row in summarise(record).sides["A"].rows:
        assert row.tg is not None and row.tg_share == row.tg / (
            BANDWIDTH / (row.run.ceiling.decode_bytes or 0)
        )
        assert row.pp is not None and row.pp_share == row.pp / (COMPUTE / MACS)
    bare = summarise(make_record(ceilings=False)).sides["A"]
    assert {(row.pp_share, row.tg_share) for row in bare.rows} == {(None, None)}


def test_cached_runs_are_counted_and_are_no_prompt_lengths() -> None:
    record = make_record(prompts=[1000, 1020, 4000], cold=False)
    rng = np.random.default_rng(0)
    record.runs += [make_run(i, 200, 50, rng, cached=4000) for i in (3, 4)]
    side = summarise(record).sides["A"]
    assert side.cache is not None
    assert (side.cache.runs, side.cache.cached, side.cache.computed) == (2, 8000, 400)
    assert [(length.tokens, length.n) for length in side.lengths] == [(1010, 2), (4000, 1)]


# warnings


def test_what_spoils_figures_is_said() -> None:
    record = make_record()
    record.runs[4].load = Load(other_cpu=0.7, mhz_mean=2500, throttled=3, available_memory=10**9)
    record.runs[5].clock = "stream"
    side = summarise(record).sides["A"]
    assert side.free_memory == 10**9
    for part in (
        "run 4: other programs used up to 0.7 cores",
        "run 4: the clock fell to 2500 MHz from 3400",
        "run 4: 3 thermal throttle events",
        "arrival here",
    ):
        assert any(part in line for line in side.warnings), part
    assert summarise(make_record()).sides["A"].warnings == []


def test_a_machine_that_slows_down_is_told_of() -> None:
    record = make_record(factors={i: 1 - 0.01 * i for i in range(28)})
    warnings = summarise(record).sides["A"].warnings
    assert any("decode became slower" in line for line in warnings)


def test_all_runs_cold() -> None:
    record = make_record()
    for run in record.runs:
        run.cold = True
    side = summarise(record).sides["A"]
    assert side.samples["tg", "steady"] is None and side.samples["tg", "cold"] is not None
    assert len(side.basis) == 28 and side.depth is not None
    assert any("no run is steady" in line for line in side.warnings)


@given(st.integers(0, 1000), st.integers(0, 6))
@settings(max_examples=6, deadline=None)
def test_sides_do_not_touch_each_other(seed: int, warm: int) -> None:
    slow = {i: 0.6 for i in range(1, 1 + warm)}
    both = summarise(make_record(sides=("A", "B"), factors=slow, seed=seed)).sides
    assert list(both) == ["A", "B"]
    for name, side in both.items():
        assert {row.run.side for row in side.rows} == {name}
        assert len(side.rows) == 28


def test_more_than_memory_allows_is_warned_of() -> None:
    record = make_record()
    assert not any("ceiling" in said for said in summarise(record).sides["A"].warnings)
    limit = record.runs[5].ceiling
    rate = record.runs[5].decode_rate
    assert rate is not None
    record.runs[5].ceiling = structs.replace(limit, decode_rate=rate / 1.5)
    (said,) = (w for w in summarise(record).sides["A"].warnings if "ceiling" in w)
    assert said.startswith("run 5: up to 150 % of the ceiling")
