"""What others published: its figures, and `plan` and `compare` beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deskside.bench.record import Record
from deskside.bench.report import against
from deskside.bench.workload import Workload
from deskside.machine import gallery
from deskside.machine.descriptions import load_machine
from deskside.machine.devices import PublishedRun
from tests.commands import command
from tests.records import make_record

PLAN = ("--preset", "qwen3.5-397b-a17b", "--machine", "epyc-9175f-1x96gb", "--cpu-moe")
ARTICLE = gallery.entry("article")


def test_the_article_is_told_to_the_letter() -> None:
    assert ARTICLE.runs == (
        PublishedRun(4699, 13, 314.22, 21.95, 15.5),
        PublishedRun(1125, 2048, 161.67, 20.81, 105.4),
        PublishedRun(1124, 2048, 154.76, 23.82, 93.3),
        PublishedRun(15866, 2048, 372.24, 22.98, 131.7),
        PublishedRun(550, 520, 117.78, 22.9, 27.4),
    )
    s = ARTICLE.statistics
    assert (s.runs, s.prefill.min, s.prefill.max) == (28, 101, 372)
    assert (s.decode.mean, s.decode.min, s.decode.max) == (22.5, 19.13, 24.04)
    # a sceptic's check: each total follows from its row, within the digits that were published
    for run in ARTICLE.runs:
        computed = run.prompt / run.prefill + run.generated / run.decode
        assert computed == pytest.approx(run.total, abs=0.06)


def test_all_runs_are_within_the_statistics() -> None:
    for name, entry in gallery.entries().items():
        for spread, rates in (
            (entry.statistics.prefill, [r.prefill for r in entry.runs]),
            (entry.statistics.decode, [r.decode for r in entry.runs]),
        ):
            for rate in rates:
                assert spread.min is None or spread.min <= rate, name
                assert spread.max is None or round(rate) <= spread.max, name
    for machine in (m for e in gallery.entries().values() for m in e.machines):
        assert load_machine(machine).published


def test_plan_prints_published_beside_computed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = command(capsys, "plan", *PLAN, "-c", "32768")
    assert code == 0 and "Published: measured by others" in out
    rows = {line.split("  ")[0].strip(): line.split() for line in out.splitlines() if " + " in line}
    for run in ARTICLE.runs:
        row = rows[f"{run.prompt:,} + {run.generated:,}"]
        assert row[3::2] == [f"{x:g}" for x in (run.prefill, run.decode, run.total)]
        assert all(float(x) > 0 for x in row[4::2])


def test_plan_leaves_out_what_does_not_fit_or_match(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(capsys, "plan", *PLAN, "-c", "4096")
    assert "1,125 + 2,048" in out and "15,866" not in out
    _, out, _ = command(capsys, "plan", *PLAN, "-c", "4096", "--tensor-type", "_exps=Q8_0")
    assert "ublished" not in out
    _, out, _ = command(capsys, "plan", *PLAN[:3], "epyc-9175f-2x96gb", "-c", "4096")
    assert "ublished" not in out


def test_plans_json_has_both(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(capsys, "plan", *PLAN, "-c", "32768", "--json")
    (found,) = json.loads(out)["published"]
    assert found["decode"] == 22.5 and len(found["runs"]) == 5
    for run in found["runs"]:
        computed = run["computed"]
        seconds = run["prompt"] / computed["prefill"]
        seconds += (run["generated"] - 1) / computed["decode"]
        assert computed["total"] == pytest.approx(seconds)


def test_a_users_machine_file_may_hold_runs(tmp_path: Path) -> None:
    path = tmp_path / "m.toml"
    path.write_text(
        '[[published]]\npreset = "p"\nengine = "e"\ndecode = 1\nsource = "s"\n'
        "[[published.runs]]\nprompt = 5\ngenerated = 6\nprefill = 7\ndecode = 8\ntotal = 9\n"
    )
    (found,) = load_machine(str(path)).published
    assert found.runs == (PublishedRun(5, 6, 7, 8, 9),) and found.experts == ()


# compare


def like_the_article(name: str) -> Record:
    """A record of the article's workload with the published rates, times two."""
    record = make_record(prompts=[i.prompt for i in Workload.read("article").items], shuffle=False)
    record.workload = Workload.read("article").to_dict()
    record.targets["A"].name = name
    for run, item in zip(record.runs, Workload.read("article").items, strict=True):
        run.name, run.generated_tokens = item.name, item.generate
        run.gaps = []
        prefill, decode = 2 * 200.0, 2 * 22.0
        for row in ARTICLE.runs:
            if (row.prompt, row.generated) == (item.prompt, item.generate):
                prefill, decode = 2 * row.prefill, 2 * row.decode
        run.prefill_seconds = run.prompt_tokens / prefill
        run.decode_seconds = (run.generated_tokens - 1) / decode
        run.total_seconds = run.prefill_seconds + run.decode_seconds
    return record


def test_runs_of_the_same_size_are_put_side_by_side() -> None:
    found = against.against(like_the_article("Qwen3.5 397B-A17B"), "article", ARTICLE)
    assert found.comparable and len(found.runs) == 5
    for beside in found.runs:
        assert beside.source.startswith("run ")
        assert beside.prefill == pytest.approx(2 * beside.published.prefill)
        assert beside.decode == pytest.approx(2 * beside.published.decode)
    runs, clocks = against.tables(found)
    assert all(row[4] == row[7] == "2.00" for row in runs.rows)
    assert [row[:2] for row in clocks.rows][:2] == [["PP", "max"], ["PP", "min"]]


def test_another_model_gets_no_ratio() -> None:
    record = like_the_article("qwen3.5-35b-a3b with random weights")
    found = against.against(record, "article", ARTICLE)
    runs, clocks = against.tables(found)
    assert "ratio" not in runs.header + clocks.header
    assert any("the models differ" in line for line in found.warnings)
    assert any("random" in line for line in found.warnings)


def test_other_sizes_are_computed_within_what_was_measured() -> None:
    record = make_record(generated=500)  # prompts of 500 to 16,000 tokens
    found = {b.published.prompt: b for b in against.against(record, "article", ARTICLE).runs}
    assert {b.source for b in found.values()} == {"computed"}
    assert found[4699].prefill == pytest.approx(600 * 4699 / 5199 / (1 + 4699 / 60_000), rel=0.05)
    assert found[4699].decode is not None
    assert found[15866].decode is None  # deeper than any run


def test_compare_takes_an_entrys_name(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    like_the_article("Qwen3.5-397B-A17B").save(path)
    code, out, err = command(capsys, "compare", str(path), "article")
    assert code == 0 and "Beside article" in out and "314.22" in out
    assert "published, not measured here" in err
    code, out, _ = command(capsys, "compare", str(path), "article", "--json")
    values = json.loads(out)
    assert values["comparable"] and values["clocks"]["TG"]["published"]["mean"] == 22.5
    code, out, _ = command(capsys, "compare", "--list")
    assert code == 0 and "article" in out and "22.5" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("{}", "artikel"), "artikel: not in the gallery, which has article"),
        ((), "name a record"),
        (("{}", "none.json"), "none.json"),
    ],
)
def test_what_cannot_be_compared_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, words: tuple[str, ...], says: str
) -> None:
    path = tmp_path / "r.json"
    make_record().save(path)
    code, _, err = command(capsys, "compare", *(w.format(path) for w in words))
    assert code == 2 and says in err
