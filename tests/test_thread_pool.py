"""The barriers and shared ranges of tasks, under ThreadSanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
COMPILER = os.environ.get("CXX") or shutil.which("g++") or ""


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_every_task_runs_once_and_nothing_races(tmp_path: Path) -> None:
    program = tmp_path / "team"
    source = ROOT / "tests" / "native" / "team.cpp"
    includes = [f"-I{ROOT / folder}" for folder in ("native", "native/program")]
    flags = ["-std=c++20", "-O1", "-g", "-fsanitize=thread", *includes, "-pthread"]
    built = subprocess.run(
        [COMPILER, *flags, str(source), "-o", str(program)], capture_output=True, text=True
    )
    if built.returncode and "libtsan" in built.stderr:
        pytest.skip("the compiler has no ThreadSanitizer")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=200)
    if "unexpected memory mapping" in done.stderr:
        pytest.skip("ThreadSanitizer does not run on this kernel's address layout")
    assert done.returncode == 0 and "all tasks run once" in done.stdout, done.stdout + done.stderr
