"""Records on disk: written whole or not at all, read only if every value is what it should be."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from deskside.bench.record import Record
from deskside.errors import DesksideError
from tests.records import make_record

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "r.json"


def test_a_record_is_read_as_it_was_written(path: Path) -> None:
    record = make_record(prompts=(500, 1000), generated=4)
    record.save(path)
    assert Record.load(path) == record


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda r: r["runs"][1].update(total_seconds=float("nan")),
            r"r\.json: not a record .*: JSON is malformed",
        ),
        (
            lambda r: r["runs"][1].update(gaps=[float("-inf")]),
            r"r\.json: not a record .*: JSON is malformed",
        ),
        (
            lambda r: r["runs"][1].update(prompt_tokens=10**400),
            r"prompt_tokens is 10*; expected a whole",
        ),
        (
            lambda r: r["runs"][1].update(total_seconds=10**400),
            r"total_seconds is 10*; expected .* not too large",
        ),
        (lambda r: r["runs"][1].update(cold=1), r"runs\[1\].cold is 1; expected true or false"),
        (lambda r: r["runs"][1].update(gaps=None), r"runs\[1\].gaps is None; expected a list"),
        (lambda r: r["runs"][1].update(speed=3), r"runs\[1\]: unknown field 'speed'"),
        (lambda r: r["runs"][1].pop("index"), r"runs\[1\]: field 'index' is missing"),
        (lambda r: r.update(schema=2), "schema 2; this deskside reads schema 1"),
        (lambda r: r.update(workload=[]), r"workload is \[\]; expected an object"),
    ],
)
def test_an_edited_record_is_refused(path: Path, change: Change, said: str) -> None:
    make_record(prompts=(500, 1000), generated=4).save(path)
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(DesksideError, match=said):
        Record.load(path)


@pytest.mark.parametrize("text", ["", "[" * 100_000, '{"schema": 1', "[]", '{"schema": 1e999}'])
def test_what_is_no_record_is_refused(path: Path, text: str) -> None:
    path.write_text(text)
    with pytest.raises(DesksideError, match=r"r\.json: not a record of deskside bench"):
        Record.load(path)


@pytest.mark.parametrize("failure", [OSError(28, "No space left"), KeyboardInterrupt()])
def test_an_interrupted_save_leaves_the_older_record(
    path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    old = make_record(prompts=(500,), generated=4)
    old.save(path)

    def interrupted(_: int) -> None:
        raise failure

    monkeypatch.setattr(os, "fsync", interrupted)
    with pytest.raises(type(failure)):
        make_record(prompts=(900,), generated=4).save(path)
    assert list(path.parent.iterdir()) == [path] and Record.load(path) == old
