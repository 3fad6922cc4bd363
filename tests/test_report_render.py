"""Markdown and HTML: always rendered, always escaped, never asking for anything."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from msgspec import Struct, structs

from deskside.bench import record as record_module
from deskside.bench.record import Ceiling, OpProfile, Record, Run, Target
from deskside.bench.report import tables
from deskside.bench.report import write as report
from deskside.bench.report.verdict import REASONS
from deskside.errors import DesksideError
from deskside.machine.watch import Load
from tests.commands import inside, refused
from tests.records import make_record

DOCS = Path(__file__).parents[1] / "docs"
EVIL = "<script>alert(1)</script>\"'&|`*_[x](y)\n# h\x1b[31m"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Checked(HTMLParser):
    """Elements, attributes that could load something, headings; fails on unbalanced elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.links: list[str] = []
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [v or "" for k, v in attrs if k in ("src", "href", "action", "data", "xlink")]
        assert not [k for k, _ in attrs if k.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data.strip())


def rendered(record: Record, folder: Path) -> tuple[str, Checked]:
    report.write(record, folder / "r.json")
    text = (folder / "r.html").read_text(encoding="utf-8")
    return (folder / "r.md").read_text(encoding="utf-8"), Checked(text)


def full_record() -> Record:
    record = make_record(factors={1: 0.8, 2: 0.85, 12: 0.9}, slope=0.006, noise=0.005)
    record.runs[17].error = "the server closed the connection"
    return record


def test_a_report_has_all_its_parts(tmp_path: Path) -> None:
    text, page = rendered(full_record(), tmp_path)
    for heading in (
        "Verdict",
        "Daily use",
        "Decode against depth",
        "Prefill against prompt length",
        "Run after run",
        "Gaps between tokens",
        "Where the time of decode goes",
        "Where the time of prefill goes",
        "Runs",
        "Statistics",
        "Target",
        "Representative runs",
        "Steady state",
        "Test environment",
        "Repeat it",
        "Raw runs",
    ):
        assert heading in page.headings, heading
    assert page.links == ["data:,"]
    assert "script" not in page.tags and page.tags.count("h1") == 1
    assert page.tags.count("svg") > 6 and page.tags.count("desc") == 6
    assert (tmp_path / "r.html").stat().st_size < 500_000
    assert "deskside bench --replay r.json" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.md"]


def test_markdown_has_the_articles_tables(tmp_path: Path) -> None:
    record = full_record()
    text, _ = rendered(record, tmp_path)
    rows = [line for line in text.splitlines() if re.match(r"\| \d+ p\d+ \|", line)]
    assert len(rows) == 28
    run = record.runs[4]
    cells = [cell.strip() for cell in rows[4].strip("|").split("|")]
    assert cells[2] == f"{run.prompt_tokens:,}" and cells[4] == "133"
    assert cells[5] == f"{run.prefill_rate:,.0f}" and cells[7] == f"{run.decode_rate:.1f}"
    assert "| PP tok/s | 27 |" in text and "| TG tok/s | 27 |" in text
    assert "first 2 runs after the cold one were warm-up" in text
    assert "Run 12: TG" in text and "Run 17 failed: the server closed" in text
    for table in re.findall(r"(?:^\|.*\n)+", text, re.M):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1


@pytest.mark.parametrize(
    ("value", "text"),
    [(-140.3, "-140"), (12345.6, "+12,346"), (0.0, "+0"), (-12.34, "-12.3"), (0.01234, "+0.0123")],
)
def test_numbers_are_read_without_exponents(value: float, text: str) -> None:
    assert tables.number(value, "+") == text
    assert tables.number(abs(value)) == text.lstrip("+-")


def test_a_steep_slope_is_read_without_exponents(tmp_path: Path) -> None:
    record = make_record(prompts=(20, 40, 80, 160, 320, 640, 1000), rate=2000, slope=0.1)
    assert re.search(r"TG changes by -1\d\d tok/s \(-\d+ to -\d+\)", rendered(record, tmp_path)[0])


def test_labels_of_a_profile_lie_between_its_bars(tmp_path: Path) -> None:
    record = full_record()
    record.profile = [
        OpProfile(f"step {i} " + "of a long name " * i, "decode", 1e-3 / (i + 1), 1e6, 1e6)
        for i in range(20)
    ]
    rendered(record, tmp_path)
    text = (tmp_path / "r.html").read_text()
    bars = re.findall(r'"bar".* y="([\d.]+)".*height="([\d.]+)"', text.replace("<", "\n<"))
    labels = re.findall(r'y="([\d.]+)" text-anchor="start">([^<]*)', text)
    assert len(bars) == len(labels) == 12
    for (y, name), (top, thick), (after, _) in zip(labels, bars, labels[1:], strict=False):
        assert float(y) < float(top) and float(top) + float(thick) < float(after) - 10  # letters
        assert len(name) < 65
    assert "…:" in labels[11][1]


def test_two_sides_are_compared(tmp_path: Path) -> None:
    text, page = rendered(make_record(sides=("A", "B"), side_factors={"B": 0.8}), tmp_path)
    assert "Comparison" in page.headings and "### Comparison" in text
    assert sum(h.startswith(("A: ", "B: ")) for h in page.headings) == 2
    assert (tmp_path / "r.html").stat().st_size < 500_000


def test_no_text_of_a_record_acts_on_the_page(tmp_path: Path) -> None:
    record = full_record()
    harmless = rendered(record, tmp_path)[1].tags
    target = Target(
        *(EVIL,) * 3, url=EVIL, options={EVIL: EVIL}, architecture=EVIL, types={EVIL: 1}
    )
    record.targets = {"A": target}
    record.workload = {"name": EVIL}
    record.machine.cpu = record.machine.kernel = record.created = record.deskside = EVIL
    record.command = [EVIL]
    for run in record.runs:
        run.name = run.started = run.clock = run.stop_reason = EVIL
        run.ceiling.decode_limit = EVIL
    record.runs[3].error = EVIL
    record.profile = [structs.replace(op, name=EVIL) for op in record.profile]
    text, page = rendered(record, tmp_path)
    assert "script" not in page.tags
    assert set(page.tags) == set(harmless)
    assert page.links == ["data:,"]
    assert "\x1b" not in text and "\n# h" not in text
    body, code = text.split("### Repeat it\n\n")
    assert "<" not in body and not re.search(r"(?<!\\)\[x", body)
    assert all(line.startswith("    ") for line in code.splitlines())


def test_older_reports_are_replaced_whole_or_not(tmp_path: Path) -> None:
    (tmp_path / "r.html").mkdir()
    (tmp_path / "r.md").write_text("old")
    with pytest.raises(DesksideError, match=r"r\.html: is a folder"):
        report.write(full_record(), tmp_path / "r.json")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "r.md"]


number = st.none() | st.floats(-1e9, 1e18) | st.sampled_from([0.0, 1e-300, 5e-324, 1e308])
count = st.integers(-5, 300_000)
loads = st.builds(
    Load, number, number, number, number, st.none() | count, st.none() | st.integers(-1, 10**13)
)
limits = st.none() | st.sampled_from(["bandwidth", "compute", ""])
ceilings = st.builds(Ceiling, number, number, number, number, number, number, limits, limits)
runs = st.builds(
    Run,
    index=count,
    name=st.sampled_from(["a", "b", ""]),
    side=st.sampled_from(["A", "A", "B", "C"]),
    cold=st.booleans(),
    warmup=st.booleans(),
    prompt_tokens=count,
    cached_tokens=count,
    generated_tokens=count,
    prefill_seconds=number,
    first_seconds=number,
    decode_seconds=number,
    total_seconds=number,
    gaps=st.lists(st.floats(-1, 1e6) | st.just(0.0), max_size=4),
    clock=st.sampled_from(["engine", "stream"]),
    load=loads,
    ceiling=ceilings,
    error=st.none() | st.just("gone"),
)
profiles = st.builds(
    OpProfile,
    st.text(max_size=5),
    st.sampled_from(["decode", "prefill"]),
    number.map(lambda x: x or 0.0),
    number,
    number,
)
records = st.builds(
    Record,
    workload=st.just({}) | st.just({"name": 3}),
    targets=st.sampled_from([{}, {"A": Target("deskside", "")}]),
    runs=st.lists(runs, max_size=9),
    profile=st.lists(profiles, max_size=3),
)


@given(records)
@settings(
    max_examples=40,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@pytest.mark.filterwarnings("error")
def test_any_record_renders(tmp_path: Path, record: Record) -> None:
    record.save(tmp_path / "r.json")
    text, page = rendered(Record.load(tmp_path / "r.json"), tmp_path)
    assert text.startswith("# ") and page.tags.count("h1") == 1
    for word in ("nan", "inf"):
        assert not re.search(rf"\b{word}\b", text), text


@pytest.mark.parametrize(
    "record",
    [
        Record(workload={}, targets={}),
        make_record(prompts=(1000,), cold=False),
        make_record(prompts=(1000,)),
        make_record(prompts=(1000,) * 8, generated=1, ceilings=False),
        make_record(ceilings=False, sides=("A", "B")),
    ],
    ids=["no runs", "one run", "one cold run", "one depth, no decode, no ceilings", "endpoints"],
)
def test_sparse_records_render(tmp_path: Path, record: Record) -> None:
    text, page = rendered(record, tmp_path)
    assert "Repeat it" in page.headings and "### Repeat it" in text


def test_report_command(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    full_record().save(path)
    (tmp_path / "mine.toml").write_text("chat_first_token = 0.001")
    (tmp_path / "bad.toml").write_text("x = 1")
    done = inside("report", path, "--criteria", tmp_path / "mine.toml")
    assert done.returncode == 0, done.stderr
    assert "at most 0.001 s" in (tmp_path / "run.md").read_text()
    assert (tmp_path / "run.html").exists()
    done = inside("report", path, "--criteria", tmp_path / "bad.toml")
    assert done.returncode == 2 and b"unknown field 'x'" in done.stderr
    for name in ("run.md", "run.html"):  # a record under the name of its own report
        (tmp_path / name).write_bytes(path.read_bytes())
        refused("report", tmp_path / name, part="its report would replace it")
        assert (tmp_path / name).read_bytes() == path.read_bytes()
    done = inside("report", tmp_path / "mine.toml")
    assert done.returncode == 2 and b"not a record" in done.stderr


def test_the_schema_and_the_criteria_are_documented() -> None:
    text = (DOCS / "BENCH.md").read_text(encoding="utf-8")
    for kind in vars(record_module).values():
        if isinstance(kind, type) and issubclass(kind, Struct) and kind is not Struct:
            section = text.split(f"### {kind.__name__}\n", 1)
            assert len(section) == 2, kind.__name__
            table = section[1].split("\n#", 1)[0]
            for field in kind.__struct_fields__:
                assert f"| `{field}` |" in table, f"{kind.__name__}.{field}"
    for key in REASONS:
        assert f"| `{key}` |" in text, key


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.mark.external
@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_a_browser_shows_it_without_errors_or_requests(tmp_path: Path) -> None:
    rendered(full_record(), tmp_path)
    log = tmp_path / "net.json"
    done = subprocess.run(
        [
            str(CHROMIUM),
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--v=0",
            f"--user-data-dir={tmp_path / 'profile'}",
            f"--log-net-log={log}",
            "--dump-dom",
            (tmp_path / "r.html").as_uri(),
        ],
        capture_output=True,
        timeout=120,
        check=True,
    )
    page = Checked(done.stdout.decode())
    assert "Decode against depth" in page.headings and "Raw runs" in page.headings
    assert b"CONSOLE" not in done.stderr
    events = json.loads(log.read_text())["events"]
    asked = {e["params"]["url"] for e in events if "url" in e.get("params", {})}
    # the browser itself asks its maker for updates; the page must not add to that
    ours = {u for u in asked if not re.search(r"//[^/]*(google|gstatic|gvt1)[^/]*/", u)}
    assert all(u.startswith(("file:", "data:")) for u in ours), ours
