"""`deskside convert` against llama.cpp's converter: the same tensors, bit for bit.

Only ssm_a = -exp(A_log) is computed: NumPy's exp and torch's may differ in the last place.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.gguf import GGUF

from . import need
from .cases import NAMES
from .fetch import CONVERTER


@pytest.fixture(scope="module")
def theirs(
    hf_case: Callable[[str], Any], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], GGUF]:
    """name -> the file that llama.cpp's converter makes of that checkpoint."""
    script = need.member(CONVERTER)
    out = tmp_path_factory.mktemp("theirs")
    command = [sys.executable, str(Path(__file__).with_name("convert_peer.py"))]
    folders = [str(hf_case(name).folder) for name in NAMES]
    run = subprocess.run(
        [*command, str(script.parent), str(out), *folders], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return lambda name: GGUF.open(out / f"{name}.gguf")


def extents(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without trailing ones: a row vector may be stored as a vector."""
    while shape and shape[-1] == 1:
        shape = shape[:-1]
    return shape


@pytest.mark.parametrize("name", NAMES)
def test_same_tensors(
    name: str, hf_case: Callable[[str], Any], theirs: Callable[[str], GGUF]
) -> None:
    ours, want = GGUF.open(hf_case(name).gguf), theirs(name)
    assert set(ours.tensors) == set(want.tensors)
    for tensor, info in want.tensors.items():
        assert extents(ours.tensors[tensor].shape) == extents(info.shape), tensor
        rtol = 2**-22 if tensor.endswith("ssm_a") else 0
        np.testing.assert_allclose(
            ours.dequantized(tensor).ravel(),
            want.dequantized(tensor).ravel(),
            rtol=rtol,
            atol=0,
            err_msg=tensor,
        )


@pytest.mark.parametrize("name", NAMES)
def test_same_hyper_parameters_and_vocabulary(
    name: str, hf_case: Callable[[str], Any], theirs: Callable[[str], GGUF]
) -> None:
    ours, want = GGUF.open(hf_case(name).gguf).metadata, theirs(name).metadata
    steering = {
        key: value
        for key, value in want.items()
        if not key.startswith("general.") and not unused(key)
    }
    different = {
        key: (ours.get(key), value)
        for key, value in steering.items()
        if key not in ours or not np.array_equal(ours[key], value)
    }
    assert not different


def unused(key: str) -> bool:
    """The width of dense layers, in an architecture whose layers are all experts."""
    return key == "qwen3moe.feed_forward_length"
