"""Comparisons: pairs, verdicts, warnings and exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from msgspec import structs

from deskside.bench.record import Record
from deskside.bench.report.analysis import summarise
from deskside.bench.report.compare import (
    FASTER,
    SAME,
    SLOWER,
    TOO_FEW,
    Comparison,
    Quantity,
    compare,
)
from deskside.errors import DesksideError
from tests.commands import inside
from tests.records import make_record


def quantity(c: Comparison, key: str) -> Quantity:
    return next(q for q in c.quantities if q.key == key)


def faster_by(factor: float, **options: object) -> Record:
    return make_record(side_factors={"A": factor}, seed=1, **options)  # type: ignore[arg-type]


def test_a_slower_candidate_is_a_regression_beyond_the_threshold_only() -> None:
    old, new = make_record(), faster_by(0.9)
    found = compare(old, new)
    for key in ("pp", "tg"):
        q = quantity(found, key)
        assert q.verdict == SLOWER and q.regression
        assert q.ratio is not None and q.ratio.median == pytest.approx(0.9, abs=0.01)
        assert q.ratio.n == len(q.items) == 27  # the cold runs are no pair
    assert quantity(found, "ttft").ratio.median == pytest.approx(1.11, abs=0.02)  # type: ignore[union-attr]
    assert found.regression
    within = compare(old, new, threshold=0.15)
    assert quantity(within, "tg").verdict == SLOWER and not within.regression


def test_a_regression_needs_the_whole_interval_beyond_the_threshold() -> None:
    found = compare(make_record(noise=0.05), faster_by(0.94, noise=0.05))
    tg = quantity(found, "tg")
    assert tg.ratio is not None and tg.ratio.median < 0.95 < (tg.ratio.high or 0)
    assert tg.verdict == SLOWER and not tg.regression


def test_faster_and_equal_candidates_are_no_regression() -> None:
    found = compare(make_record(), faster_by(1.1))
    assert {q.verdict for q in found.quantities} == {FASTER} and not found.regression
    same = compare(make_record(noise=0.01), faster_by(1.0, noise=0.01))
    assert {q.verdict for q in same.quantities} == {SAME} and not same.regression


def test_no_difference_is_called_one_as_rarely_as_promised() -> None:
    called = 0
    for seed in range(20):
        options = {"prompts": (1000,) * 12, "generated": 5, "noise": 0.02, "cold": False}
        a = make_record(seed=seed, **options)  # type: ignore[arg-type]
        b = make_record(seed=seed + 100, **options)  # type: ignore[arg-type]
        called += quantity(compare(a, b), "tg").verdict != SAME
    assert called <= 4  # 5 % of 20, but for a chance of 1 %


def test_few_pairs_have_no_verdict() -> None:
    prompts = (500, 1000, 2000, 4000, 8000)
    old = make_record(prompts=prompts, cold=False)
    found = compare(old, faster_by(0.5, prompts=prompts, cold=False))
    assert {q.verdict for q in found.quantities} == {TOO_FEW} and not found.regression


def test_sides_of_one_record_pair_within_it_and_a_is_the_candidate() -> None:
    record = make_record(sides=("A", "B"), side_factors={"B": 0.8})
    record.runs[20].error = "gone"  # its partner has no pair, the others keep theirs
    found = compare(record)
    tg = quantity(found, "tg")
    assert found.paired_in_time and tg.verdict == FASTER
    assert tg.ratio is not None and tg.ratio.n == 26
    assert tg.ratio.median == pytest.approx(1.25, abs=0.01)


def test_no_start_is_cut_off_interleaved_pairs() -> None:
    slow = {1: 0.7, 2: 0.7, 3: 0.7}
    record = make_record(sides=("A", "B"), factors=slow, side_factors={"B": 0.8})
    assert [row.phase for row in summarise(record).sides["A"].rows[1:4]] == ["warm-up"] * 3
    tg = quantity(compare(record), "tg")
    assert tg.ratio is not None and tg.ratio.n == 27  # all but the cold pair
    assert tg.ratio.median == pytest.approx(1.25, abs=0.01)
    alone = quantity(compare(make_record(factors=slow), make_record()), "tg")
    assert alone.ratio is not None and alone.ratio.n == 24


def test_what_spoilt_the_runs_is_warned_of() -> None:
    old, new = make_record(), make_record()
    new.runs[4].load.other_cpu = 1.5
    said = [line for line in compare(old, new).warnings if "other programs" in line]
    assert said == ["candidate: run 4: other programs used up to 1.5 cores"]


def test_repeats_of_an_item_pair_by_their_order() -> None:
    old, new = make_record(), faster_by(0.9)
    for record in (old, new):
        for i, run in enumerate(record.runs):
            run.name = "long" if i % 2 else "short"
    tg = quantity(compare(old, new), "tg")
    assert tg.ratio is not None and tg.ratio.n == 27
    assert {name: r.n for name, r in tg.items.items()} == {"long": 14, "short": 13}


def test_what_differs_is_warned_of() -> None:
    old, new = make_record(), make_record()
    said = " ".join(compare(old, new).warnings)
    assert "two sessions" in said and "differ:" not in said and "differs" not in said
    new.machine.cpu = "another"
    new.workload["sampling"] = {"temperature": 1}
    files = [structs.replace(new.targets["A"].files[0], sha256="cd" * 32)]
    options = {**new.targets["A"].options, "threads": 1}
    new.targets["A"] = structs.replace(new.targets["A"], files=files, options=options)
    said = " ".join(compare(old, new).warnings)
    for part in (
        "cpu of the machine",
        "sampling of the workload",
        "files differ",
        "option threads",
    ):
        assert part in said


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(DesksideError, match="only one side"):
        compare(make_record())
    other = make_record()
    for run in other.runs:
        run.name += "x"
    with pytest.raises(DesksideError, match="no runs of the same name"):
        compare(make_record(), other)
    with pytest.raises(DesksideError, match="no side A"):
        compare(make_record(), make_record(sides=("B",)))


def test_exit_codes(tmp_path: Path) -> None:
    old, new, bad = (tmp_path / f"{name}.json" for name in ("old", "new", "bad"))
    make_record(generated=9).save(old)
    faster_by(0.8, generated=9).save(new)
    bad.write_text("{}")
    assert inside("compare", old, old).returncode == 0
    assert inside("compare", new, old).returncode == 0
    done = inside("compare", old, new)
    assert done.returncode == 1 and b"a regression" in done.stdout
    done = inside("compare", old, new, "--json", "--threshold", "50")
    shown = json.loads(done.stdout)
    assert done.returncode == 0 and shown["regression"] is False
    assert shown["quantities"][1]["verdict"] == SLOWER
    for arguments, part in (
        ((old, bad), "bad.json"),
        ((old, tmp_path / "none.json"), "none.json"),
        ((old,), "only one side"),
        ((old, new, "--threshold", "-1"), "--threshold"),
    ):
        done = inside("compare", *arguments)
        assert done.returncode == 2 and part.encode() in done.stderr
