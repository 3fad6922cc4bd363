"""Answers are looked at for loops, garbage, no text and an early end; nothing else is judged."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.bench.measure import answers as look
from deskside.bench.record import LOOP, Answer, Record, Run
from deskside.bench.report import answers as report
from deskside.bench.report.analysis import summarise
from tests.records import make_record

FINE = Answer(asked=133, characters=600, printed=600, garbage=0, loop=0, repeated=0.05)
CODE = Path(textwrap.__file__).read_text(encoding="utf-8")


def noted(text: str, asked: int = 10) -> Answer:
    run = Run(index=0, name="")
    look.note(run, text, asked)
    assert run.answer is not None and len(run.output) == 64
    return run.answer


@given(
    st.text(alphabet="abcdefgh ", min_size=1, max_size=60).filter(lambda p: p == p.strip()),
    st.integers(4, 9),
    st.text(alphabet="xyz", max_size=30),
)
@settings(max_examples=200)
def test_a_piece_that_repeats_at_the_end_is_found(piece: str, times: int, start: str) -> None:
    found = look.loop(start + piece * times)
    assert found >= min(LOOP, len(piece) * times)


@given(st.text(max_size=400))
@settings(max_examples=200)
def test_any_text_has_figures(text: str) -> None:
    found = noted(text)
    assert 0 <= found.loop <= len(text) and 0 <= found.repeated < 1
    assert 0 <= found.garbage <= len(text) and found.printed <= found.characters == len(text)


@given(st.lists(st.integers(0, 999_999), unique=True, max_size=60))
def test_text_that_never_repeats_is_no_loop(numbers: list[int]) -> None:
    text = "".join(f"{n:06d};" for n in numbers)
    assert look.loop(text) < 4 * 7 and look.repeated(text) == 0


def test_real_code_shows_no_damage() -> None:
    found = noted(CODE[:8000])
    assert found.loop < LOOP and found.repeated < report.REPEATED and found.garbage == 0


def test_a_long_loop_in_the_middle_counts_as_repeated() -> None:
    text = "A start. " + "the same words again and again and " * 40 + CODE[:300]
    assert look.loop(text) < LOOP and look.repeated(text) > report.REPEATED


@pytest.mark.parametrize(
    ("text", "garbage"),
    [
        ("plain\ttext\r\n", 0),
        ("cut by the limit\ufffd", 0),
        ("two\ufffd\ufffd", 1),
        ("a\ufffdb", 1),
        ("bell\a and escape\x1b", 2),
        ("half a pair \ud800", 1),
        ("Grüße, 漢字, 🙂", 0),
    ],
)
def test_garbage_is_counted(text: str, garbage: int) -> None:
    assert noted(text).garbage == garbage


def with_answers(*changes: tuple[int, Answer]) -> Record:
    record = make_record()
    for run in record.runs:
        run.answer = FINE
    for index, answer in changes:
        record.runs[index].answer = answer
    return record


def changed(**fields: float) -> Answer:
    return Answer(**{name: getattr(FINE, name) for name in FINE.__struct_fields__} | fields)


def test_the_report_counts_what_was_found() -> None:
    record = with_answers(
        (1, changed(loop=LOOP)),
        (2, changed(repeated=0.7)),
        (3, changed(repeated=0.7, characters=100)),  # too short to mean anything
        (4, changed(garbage=3)),
        (5, changed(printed=0)),
        (6, changed(asked=134)),
    )
    side = summarise(record).sides["A"]
    rows = {row[0]: row[2:] for row in report.table(record, side).rows}
    assert rows == {
        "loop": ["2", "1, 2"],
        "garbage": ["1", "4"],
        "no text": ["1", "5"],
        "early end": ["1", "6"],
    }
    assert "28 of 28 looked at, 5 damaged" in report.said(record, side)
    fine = with_answers()
    assert "no damage found" in report.said(fine, summarise(fine).sides["A"])


def test_an_end_that_the_model_chose_is_not_early() -> None:
    record = with_answers((6, changed(asked=134)))
    record.workload["ignore_eos"] = False
    record.runs[6].stop_reason = "stop"
    rows = report.table(record, summarise(record).sides["A"]).rows
    assert rows[-1][2] == "0"
    record.runs[6].stop_reason = "context"
    assert report.table(record, summarise(record).sides["A"]).rows[-1][2] == "1"


def test_random_weights_are_not_judged() -> None:
    record = with_answers((1, changed(loop=LOOP)))
    record.targets["A"].random = True
    side = summarise(record).sides["A"]
    assert report.table(record, side).rows == []
    assert "not judged" in report.said(record, side) and "random" in report.said(record, side)


def test_records_of_before_say_that_nobody_looked(tmp_path: Path) -> None:
    path = tmp_path / "old.json"
    make_record().save(path)
    data = json.loads(path.read_text())
    for run in data["runs"]:
        del run["answer"]
    path.write_text(json.dumps(data))
    record = Record.load(path)
    side = summarise(record).sides["A"]
    assert "not looked at" in report.said(record, side)
    assert report.table(record, side).rows == []
