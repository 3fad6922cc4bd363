"""README's tables of speeds are what the records in docs/benchmarks say."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from deskside.bench.record import Record
from deskside.bench.report.view import view
from tools.compare import readme
from tools.compare.plan import LLAMA, OURS, ROOT, stages

README = (ROOT / "README.md").read_text(encoding="utf-8")
TESTS = {t.name: t for s in stages(quick=False, rounds=3) for t in s.tests}


@pytest.mark.parametrize("names", readme.TABLES, ids=lambda names: names[OURS])
def test_readme_has_the_tables_of_the_records(names: dict[str, str]) -> None:
    assert readme.table(names) in README, "python -m tools.compare.readme prints what belongs there"


def test_readme_has_the_spread_over_records() -> None:
    assert readme.spread() in README


def test_a_table_follows_its_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another record gives another table: nothing in it is fixed."""
    names = readme.TABLES[0]
    kept, file, entry = readme.load(names[OURS])
    changed: Any = copy.deepcopy(entry)
    for rates in changed["samples"]["prefill 128"][OURS], changed["samples"]["prefill 128"][LLAMA]:
        rates.update({r: 2 * x for r, x in rates.items()})
    changed["compute"] = [x / 10 for x in changed["compute"]]
    monkeypatch.setattr(readme, "load", lambda _: (kept, file, changed))
    before, after = (
        next(line for line in text.splitlines() if "prefill 128" in line)
        for text in (README, readme.table(names))
    )
    was, now = before.split("|"), after.split("|")
    assert float(now[2]) == pytest.approx(2 * float(was[2]), rel=0.01)
    assert now[3] == was[3] and now[4] != was[4]  # both sides doubled; one side doubled
    assert "of bandwidth" in was[5] and "of arithmetic" in now[5]


def test_readme_has_what_a_report_computes_for_the_whole_model() -> None:
    path = ROOT / "docs" / "reports" / "35b-8l-vs-llama.json"
    ours, theirs = (page.headline for page in view(Record.load(path), path.name).sides)
    rates = [re.findall(r"decode ([\d.]+) tok/s", text)[0] for text in (ours, theirs)]
    assert f"computed for all 40 layers: decode {rates[0]} against {rates[1]} tok/s" in README
