"""What the system tells in small files, and what its programs print."""

from __future__ import annotations

import subprocess
from pathlib import Path


def lines(path: str | Path) -> list[str]:
    """Lines of a text file; none if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def contents(path: Path) -> str | None:
    """A small file's text, stripped; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None


def said(*command: str) -> str | None:
    """What a program prints; None if it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
