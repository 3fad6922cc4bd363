"""Shared by the oracle tests: converted checkpoints, and the table of agreement figures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from . import need

_TABLES = pytest.StashKey[dict[str, list[dict[str, Any]]]]()


@pytest.fixture(scope="session")
def hf_case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    """name -> `cases.Case`: the checkpoint, its GGUF, a prompt, expected logits, greedy text."""
    need.packages("torch", "transformers", "safetensors")
    from .cases import Case

    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda name: Case.make(name, root))


@pytest.fixture
def report(request: pytest.FixtureRequest) -> Callable[..., None]:
    """report(title, column=value, ...): one row of a table shown after the run."""
    tables = request.config.stash.setdefault(_TABLES, {})
    return lambda title, **row: tables.setdefault(title, []).append(row)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Prints the reported tables and stores them as JSON in pytest's cache."""
    tables = config.stash.get(_TABLES, {})
    for title, rows in tables.items():
        terminalreporter.section(title)
        for line in _table(rows):
            terminalreporter.write_line(line)
    if tables and getattr(config, "cache", None) is not None:
        path = Path(config.cache.mkdir("deskside-oracles")) / "report.json"
        path.write_text(json.dumps(tables, indent=1), encoding="utf-8")
        terminalreporter.write_line(f"\n{path}")


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns] + [[_cell(row.get(c, "")) for c in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        yield "  ".join(
            text.ljust(w) if i < 2 else text.rjust(w)
            for i, (text, w) in enumerate(zip(row, widths, strict=True))
        )


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
