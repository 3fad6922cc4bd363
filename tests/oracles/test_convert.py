"""`deskside convert` against llama.cpp's converter: the same tensors, bit for bit.

Only ssm_a = -exp(A_log) is computed: NumPy's exp and torch's may differ in the last place.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside.convert.huggingface import convert_hf
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


@pytest.mark.parametrize("name", ["qwen35moe", "qwen35"])
def test_same_blocks_of_multi_token_prediction(
    name: str, hf_case: Callable[[str], Any], tmp_path: Path
) -> None:
    """A checkpoint with two such layers: copies of its last full-attention layer, other values."""
    numpy = pytest.importorskip("safetensors.numpy")
    script = need.member(CONVERTER)
    folder = shutil.copytree(hf_case(name).folder, tmp_path / f"mtp-{name}")
    config = json.loads((folder / "config.json").read_text())
    inner = config.get("text_config", config)
    inner["mtp_num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(config))
    tensors = numpy.load_file(folder / "model.safetensors")
    layer = inner["layer_types"].index("full_attention")
    rng = np.random.default_rng(1)
    rename = re.compile(rf".*layers\.{layer}\.")
    more = {
        rename.sub(f"mtp.layers.{i}.", key): rng.standard_normal(x.shape).astype(x.dtype)
        for key, x in tensors.items()
        for i in range(2)
        if rename.match(key)
    }
    d = inner["hidden_size"]
    more["mtp.fc.weight"] = rng.standard_normal((d, 2 * d)).astype(np.float32)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        more[f"mtp.{norm}.weight"] = rng.standard_normal(d).astype(np.float32)
    numpy.save_file(tensors | more, folder / "model.safetensors", metadata={"format": "pt"})
    command = [sys.executable, str(Path(__file__).with_name("convert_peer.py"))]
    out = tmp_path / "theirs"
    out.mkdir()
    run = subprocess.run(
        [*command, str(script.parent), str(out), str(folder)], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    convert_hf(folder, tmp_path / "ours.gguf", outtype="f32")
    want, ours = GGUF.open(out / f"mtp-{name}.gguf"), GGUF.open(tmp_path / "ours.gguf")
    assert set(ours.tensors) == set(want.tensors)
    n = inner["num_hidden_layers"]
    of_mtp = [t for t in want.tensors if int((re.findall(r"^blk\.(\d+)", t) or [-1])[0]) >= n]
    assert {t.split(".")[1] for t in of_mtp} == {str(n), str(n + 1)}
    for tensor in of_mtp:
        x, y = (file.dequantized(tensor).ravel() for file in (ours, want))
        np.testing.assert_array_equal(x, y, err_msg=tensor)
    for key in ("block_count", "nextn_predict_layers"):
        assert ours.get(f"{name}.{key}") == want.get(f"{name}.{key}"), key


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
