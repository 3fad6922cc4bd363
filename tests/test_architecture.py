"""Imports point one way (docs/ARCHITECTURE.md)."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import deskside

ROOT = Path(deskside.__file__).parent
# From the bottom to the top; a module imports only from layers below its own.
LAYERS = [
    {"errors", "progress", "system", "_native"},
    {"devices", "files", "pages"},
    {"machines"},
    {"quants", "tokenizer", "chat", "template_worker", "sampler", "checkpoint", "logprobs"},
    {"gguf_header", "encoders", "hf_vocab", "hf_source"},
    {"gguf", "gguf_write", "hf_layout", "toy_vocab"},
    {"tape", "quantize"},
    {"models", "cache"},
    {"cost"},
    {"config", "convert", "synth"},
    {"backends", "rules", "plan_units"},
    {"plan_memory", "plan_speed"},
    {"plan_stream"},
    {"plan"},
    {"plan_ways", "plan_emit"},
    {"placing", "plan_table"},
    {"plan_picture"},
    {"engine"},
    {"console", "quality"},
    {"bench"},
    {"cli_flags"},
    {"cli_quality"},
    {"cli_run", "cli_bench", "cli_report", "cli_files", "cli_plan", "doctor"},
    {"cli"},
]
LEVEL = {name: i for i, layer in enumerate(LAYERS) for name in layer}


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("deskside"):
            rest = (node.module or "").split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("deskside.")}
    return found - {"__version__"}


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    for other in imported(path) - {own}:
        assert LEVEL[other] < LEVEL[own], f"{own} imports {other}"


@pytest.mark.parametrize("path", sorted(ROOT.rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_files_stay_small(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 800
