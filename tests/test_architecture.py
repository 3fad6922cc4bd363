"""Imports point one way: between rooms, and between the files of a room (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import deskside

ROOT = Path(deskside.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# From the ground up; a room imports only from levels below its own.
LEVELS = [
    {"errors", "progress", "_native"},
    {"files", "console", "schema"},
    {"text", "gguf", "machine"},
    {"tape", "convert"},
    {"models", "lowering"},
    {"plan", "backends"},
    {"engine"},
    {"server"},
    {"bench", "scaffold"},
    {"cli"},
    {"__main__"},
]
LEVEL = {room: i for i, rooms in enumerate(LEVELS) for room in rooms}


def name(path: Path) -> str:
    """`deskside.gguf.reader`; a room's `__init__.py` is `deskside.gguf`."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(p for p in parts if p != "__init__")


MODULES = {name(path) for path in FILES} | {"deskside._native"}


def imported(path: Path) -> set[str]:
    """Modules of the package that a file imports, in functions and for types too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: imports are absolute"
            named = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = named & MODULES
            found |= modules | ({node.module} if named - modules else set())
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & MODULES


def room(module: str) -> str:
    return [*module.split("."), ""][1]


@pytest.mark.parametrize("path", FILES, ids=name)
def test_rooms_import_from_below(path: Path) -> None:
    own = room(name(path))
    for other in imported(path):
        if own and room(other) not in ("", own):
            assert LEVEL[room(other)] < LEVEL[own], f"{name(path)} imports {other}"


def test_no_two_files_import_each_other() -> None:
    graph = {name(path): imported(path) for path in FILES}
    graph["deskside"] = set()  # hands names on when they are asked for
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as circle:
        pytest.fail(" -> ".join(circle.args[1]))


@pytest.mark.parametrize("path", FILES, ids=name)
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 800


def test_tests_that_need_another_engine_are_marked() -> None:
    """`make test` deselects the mark and `make test-all` selects it: none is left out of both."""
    needs = re.compile(
        r"importorskip\(|\bpackages\(|^from (offload|torch_devices) import|^import ik_ggml", re.M
    )
    for path in Path(__file__).parent.glob("test_*.py"):
        text = path.read_text(encoding="utf-8")
        assert path == Path(__file__) or not needs.search(text) or "mark.external" in text, path
