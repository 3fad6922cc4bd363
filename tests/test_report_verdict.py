"""The daily-use verdict: every criterion passes, fails and goes unmeasured where it should."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from deskside.bench.record import Record
from deskside.bench.report.analysis import summarise
from deskside.bench.report.verdict import (
    DEFAULTS,
    FAILED,
    PASSED,
    REASONS,
    UNMEASURED,
    Criteria,
    Criterion,
    judge,
    overall,
)
from deskside.errors import DesksideError
from tests.records import make_record, make_run


def judged(record: Record, **limits: float) -> dict[str, Criterion]:
    criteria = structs.replace(DEFAULTS, **limits)
    return {c.key: c for c in judge(record, summarise(record), criteria)}


def outcomes(record: Record, **limits: float) -> dict[str, str]:
    return {key: c.outcome for key, c in judged(record, **limits).items()}


def test_a_good_record_passes_and_each_limit_fails_it() -> None:
    record = make_record()
    easy = {"chat_first_token": 5.0}
    assert set(outcomes(record, **easy).values()) == {PASSED}
    assert overall(judge(record, summarise(record), Criteria(**easy))) == PASSED
    for key, limits in {
        "decode": {"reading_words_per_minute": 2000.0},
        "chat": {"chat_first_token": 1.0},
        "ingest": {"ingest_first_token": 20.0},
        "agent": {"agent_turn": 5.0},
        "variation": {"max_variation": 0.0001},
        "depth": {"max_depth_change": 0.001},
        "memory": {"min_free_memory": 1e10},
        "batch": {"batch_tokens_per_day": 1e9},
    }.items():
        found = outcomes(record, **{**easy, **limits})
        assert [k for k, outcome in found.items() if outcome == FAILED] == [key]


def test_the_number_is_that_of_the_runs() -> None:
    record = make_record(noise=0)
    found = judged(record)
    steady = [run for run in record.runs if not run.cold]
    assert found["decode"].value == pytest.approx(
        np.percentile([run.decode_rate or 0 for run in steady], 5)
    )
    assert found["decode"].limit == pytest.approx(238 / 60 * 1.33 * 1.2)
    longest = max(steady, key=lambda run: run.prompt_tokens)
    assert found["ingest"].value == longest.first_seconds
    assert found["memory"].value == 9e9
    day = sum(r.generated_tokens for r in steady) / sum(r.total_seconds or 0 for r in steady)
    assert found["batch"].value == pytest.approx(day * 86_400)


def test_times_are_interpolated_inside_and_said_to_be_extrapolated_outside() -> None:
    record = make_record(prompts=(500, 2000), cold=False, noise=0)
    short, long = sorted(run.first_seconds or 0 for run in record.runs)
    chat = judged(record)["chat"]
    assert chat.value == pytest.approx(short + (long - short) / 3)
    assert "interpolated between 500 and 2,000" in chat.note
    beyond = judged(record, ingest_prompt=3800)["ingest"]
    assert beyond.value == pytest.approx(long * 1.9) and "extrapolated" in beyond.note
    far = judged(record)["ingest"]
    assert far.outcome == UNMEASURED and "2,000 tokens" in far.note
    near = judged(record, ingest_prompt=2050)["ingest"]
    assert near.value == long and "measured at 2,000" in near.note


def test_turns_of_an_agent_are_measured_where_a_cache_was_hit() -> None:
    record = make_record()
    assert "computed" in judged(record)["agent"].note
    rng = np.random.default_rng(0)
    record.runs += [make_run(30 + i, 800, 200, rng, cached=9000, noise=0) for i in range(3)]
    agent = judged(record)["agent"]
    assert agent.value == pytest.approx(record.runs[-1].total_seconds)
    assert "median of 3 turns" in agent.note


def test_what_was_not_measured_neither_passes_nor_fails() -> None:
    record = make_record(prompts=(1000,) * 3, generated=1)
    for run in record.runs:
        run.load.available_memory = run.first_seconds = run.total_seconds = None
    found = outcomes(record)
    assert set(found.values()) == {UNMEASURED}
    assert overall(list(judged(record).values())) == UNMEASURED
    empty = Record(workload={}, targets={})
    assert judge(empty, summarise(empty)) == [] and overall([]) == UNMEASURED


def test_stability_with_context_is_shown_or_not_measured() -> None:
    assert outcomes(make_record(slope=0.03))["depth"] == FAILED
    noisy = judged(make_record(slope=0, noise=0.3))["depth"]
    assert noisy.outcome == UNMEASURED and "too wide" in noisy.note


def test_a_file_changes_limits(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text("chat_first_token = 3\nmax_variation = 0.2\n")
    assert Criteria.load(path) == structs.replace(DEFAULTS, chat_first_token=3, max_variation=0.2)
    for text, part in (
        ("chat_frist_token = 3", "unknown field 'chat_frist_token'"),
        ("max_variation = 'low'", "max_variation is 'low'; expected a number"),
        ("max_variation = true", "max_variation is True; expected a number"),
        ("max_variation = nan", "max_variation is nan; expected a number"),
        ("max_variation = -1", "max_variation is -1; expected a number"),
        ("[[", "not TOML"),
    ):
        path.write_text(text)
        with pytest.raises(DesksideError, match=part) as failure:
            Criteria.load(path)
        assert str(path) in str(failure.value)
    with pytest.raises(FileNotFoundError):
        Criteria.load(tmp_path / "none.toml")


def test_every_limit_has_a_reason() -> None:
    assert all(len(reason) > 20 for reason in REASONS.values())
    assert set(REASONS) == set(Criteria.__struct_fields__)
