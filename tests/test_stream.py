"""Experts that pass through a device: the same results, within its budget, whatever happens."""

from __future__ import annotations

import gc
from functools import cache as cached
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.models import build_tape
from models import tiny
from placements import IDS, batch, cache_options, cpu_moe, drawn, named
from torch_devices import ExpertCache, PlacedBackend, StreamOptions, parse_devices, work_bytes

PRESET = "tiny-moe"
NAMES = list(build_tape(GGUF.open(tiny(PRESET))).weights())
SLOT = 1 << 20


def placed(types: str = "", *, size: str = "1GiB", placement: Any = None, **options: Any) -> Any:
    file = GGUF.open(tiny(PRESET, types))
    return PlacedBackend(
        file,
        build_tape(file),
        placement or cpu_moe(NAMES),
        parse_devices(f"emu0:{size},emu1:1GiB,emu2:1GiB"),
        n_threads=2,
        max_tokens=40,
        **options,
    )


def test_x() -> None:
    b = placed(native=False)
    print(b.lent.layouts)
