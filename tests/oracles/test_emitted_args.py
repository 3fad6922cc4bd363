"""What `deskside plan --emit llama-server` writes, read by llama.cpp's own parser.

The wheel is built without CUDA and knows no device CUDA0, so `--device` is left out and the devices
of `-ot` are all called CPU; every flag, number and regex is as emitted.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deskside.machine.descriptions import load_machine
from deskside.plan import Options, make_plan
from deskside.plan.emit import emit
from deskside.plan.rules import Rules, parse_overrides
from tests.plans import tape_of

from . import need

PARSER = Path(__file__).with_name("llama_args.py")


def understood(text: str) -> tuple[dict[str, Any], str]:
    words = shlex.split(re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " "))
    at = words.index("--device")
    words = [re.sub(r"=CUDA\d$", "=CPU", w) for w in words[:at] + words[at + 2 :]]
    result = subprocess.run(
        [sys.executable, str(PARSER), *words], capture_output=True, text=True, check=False
    )
    if result.returncode:
        return {"ok": False}, result.stderr
    return json.loads(result.stdout.splitlines()[-1]), result.stderr


@pytest.mark.parametrize(
    ("rules", "more", "load_mode"),
    [
        (Rules(cpu_moe=True), {}, -1),
        (Rules(), {"ctk": "q8_0", "ctv": "q8_0", "parallel": 3, "mmap": False}, 0),
        (Rules(parse_overrides([r"blk\.(1|7)\.attn=CPU", "shexp=CUDA1"])), {"mlock": True}, 3),
        (Rules(), {"mlock": True, "mmap": False, "ubatch": 4096}, 2),
    ],
)
def test_llama_cpp_reads_the_line(rules: Rules, more: dict[str, Any], load_mode: int) -> None:
    need.packages("xllamacpp")
    options = Options(ctx=8192, threads=16, **more)
    plan = make_plan(
        tape_of("qwen3.5-397b-a17b"), load_machine("epyc-9175f-2x96gb"), rules, options
    )
    text = emit(plan, "llama-server", "/models/q.gguf")[""]
    found, said = understood(text)
    assert found["ok"], said
    assert found["model"] == "/models/q.gguf" and found["n_ctx"] == 8192 * options.parallel
    assert found["n_parallel"] == options.parallel and found["n_ubatch"] == options.ubatch
    assert found["threads"] == 16 and found["load_mode"] == load_mode
    assert found["cache_type_k"] == {"f16": 1, "q8_0": 8}[options.ctk]
    split = [float(x) for x in re.search(r"--tensor-split (\S+)", text)[1].split(",")]  # type: ignore[index]
    assert found["tensor_split"][:2] == split and sum(split) == found["n_gpu_layers"] == 61


def test_the_parser_refuses_what_it_does_not_know() -> None:
    need.packages("xllamacpp")
    found, said = understood("llama-server -m x.gguf --device CUDA0 --no-such-flag")
    assert not found["ok"] and "no-such-flag" in said
