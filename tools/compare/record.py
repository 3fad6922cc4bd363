"""The record of a run: a dict that is written as JSON after every round, and can be resumed.

{"version", "date", "machine", "settings", "versions",
 "files": {name: {"path", "bytes", "loading", "rounds",
   "work":      {test: {"bytes", "macs"}}               of a token
   "systems":   {engine: text}                          instruction sets
   "ubatch":    {engine: {context: {"taken", "tok/s": {ubatch: rate}}}}
   "samples":   {test: {engine: {round: tok/s}}}
   "left_out":  {engine: {test: reason}}
   "bandwidth", "compute": [per second]
   "copy":      {"bytes", "seconds": {threads: [s]}}
   "load":      {engine: {round: s}}      "rss": {engine: {"anonymous", "file"}}
   "python":    {test: {round: share}}    "idle": {engine: share of a core}}}}
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deskside.errors import DesksideError
from deskside.files import write_whole

VERSION = 1


def new(settings: dict[str, Any], machine: dict[str, Any]) -> Any:
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {
        "version": VERSION,
        "date": now,
        "machine": machine,
        "settings": settings,
        "versions": {},
        "files": {},
    }


def new_file(path: Path, nbytes: int, loading: str, rounds: int) -> dict[str, Any]:
    tables = ("work", "systems", "ubatch", "samples", "left_out", "load", "rss", "python", "idle")
    return {
        "path": str(path),
        "bytes": nbytes,
        "loading": loading,
        "rounds": rounds,
        **{name: {} for name in tables},
        "bandwidth": [],
        "compute": [],
        "copy": {},
    }


def save(record: Any, path: Path) -> None:
    """Write the record to a file beside `path`, then rename that."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(record, indent=1))


def load(path: Path) -> Any:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DesksideError(f"{path}: {error.strerror}") from None
    except ValueError:
        raise DesksideError(f"{path} is not a record of a run") from None
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise DesksideError(f"{path} is not a record of a run of this version")
    return record


def resume(path: Path, settings: dict[str, Any], commit: str) -> Any:
    """Read a record to continue it. DesksideError if its settings or its commit differ."""
    record = load(path)
    for entry in record["files"].values():
        drop_parts(entry, settings["engines"])
    was = {**record["settings"], "commit": record["machine"].get("commit")}
    now = {**settings, "commit": commit}
    for key in was.keys() | now.keys():
        if was.get(key) != now.get(key):
            raise DesksideError(
                f"{path} cannot be resumed: {key} was {was.get(key)}, now it is {now.get(key)}"
            )
    return record


def drop_parts(file: dict[str, Any], engines: Iterable[str]) -> None:
    """Drop rounds that some engines lack, because figures from two runs are not a pair."""
    engines = list(engines)
    for test, samples in file["samples"].items():
        able = [e for e in engines if test not in file["left_out"].get(e, {})]
        for r in {r for rates in samples.values() for r in rates}:
            if any(r not in samples.get(e, {}) for e in able):
                for rates in samples.values():
                    rates.pop(r, None)


def missing(
    file: dict[str, Any], engines: Iterable[str], tests: Iterable[str], r: int
) -> list[str]:
    """The engines that lack round r of one of the tests and can run it."""
    tests = list(tests)
    return [
        engine
        for engine in engines
        if any(
            str(r) not in file["samples"].get(test, {}).get(engine, {})
            and test not in file["left_out"].get(engine, {})
            for test in tests
        )
    ]


def add(file: dict[str, Any], test: str, engine: str, r: int, rate: float) -> None:
    file["samples"].setdefault(test, {}).setdefault(engine, {})[str(r)] = rate


def leave_out(file: dict[str, Any], engine: str, tests: Iterable[str], reason: str) -> None:
    for test in tests:
        file["left_out"].setdefault(engine, {})[test] = reason


def latest(folder: Path) -> Path:
    """The newest record in a folder."""
    found = sorted(folder.glob("peers-*.json"), key=lambda p: p.stat().st_mtime)
    if not found:
        raise DesksideError(f"there is no record to resume in {folder}")
    return found[-1]
