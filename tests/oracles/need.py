"""Missing oracles: a skip for a developer, a failure where DESKSIDE_REQUIRE_ORACLES=1 (CI)."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import NoReturn

import pytest

from .fetch import Wheel


def missing(what: str) -> NoReturn:
    """Skips the calling test or module, or fails it where oracles are required."""
    if os.environ.get("DESKSIDE_REQUIRE_ORACLES") == "1":
        # not pytest.fail: at module level that would count as a collection error without a reason
        raise RuntimeError(f"{what}, and DESKSIDE_REQUIRE_ORACLES=1")
    pytest.skip(what, allow_module_level=True)


def packages(*names: str) -> None:
    """Requires importable packages, without importing them."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            missing(f"oracle package {name} is not installed (run `make test-all`)")


def member(wheel: Wheel) -> Path:
    """The cached file of an unpacked wheel."""
    if not wheel.path.exists():
        missing(f"{wheel.path} is not there (run `make test-all`)")
    return wheel.path
