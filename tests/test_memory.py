"""Memory is what the plan says: while a model loads, while it runs, and after a load that failed.

Everything is measured in a process of its own: the anonymous pages that Linux counts for it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from deskside.convert.synth import synth_file
from deskside.errors import DesksideError
from deskside.gguf import TensorInfo
from deskside.gguf.quants import BY_NAME
from deskside.lowering.panels import panel_bytes

CTX, UBATCH = 1024, 512
# Beyond what a tiny model needs: Python's own memory differs from run to run by this much.
SLACK = 2 << 20

COMMON = """
import gc, json, os, resource, sys, threading, time
import numpy as np
from deskside.engine import LLM
from deskside.errors import DesksideError
from deskside.engine.sampler import SamplingParams

def anonymous():
    total, shared = map(int, open("/proc/self/statm").read().split()[1:3])
    return (total - shared) * os.sysconf("SC_PAGE_SIZE")

def load(path, progress=lambda *_: None, **options):
    return LLM(path, ctx=int(sys.argv[2]), ubatch=int(sys.argv[3]), threads=2,
               progress=progress, **options)

def run(llm):
    ids = np.random.default_rng(0).integers(0, 2000, llm.ctx).tolist()
    list(llm.stream(ids, SamplingParams(max_tokens=1, temperature=0)))
"""

USE = """
peak, stop = 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.0005)

before = anonymous()
thread = threading.Thread(target=watch)
thread.start()
llm = load(sys.argv[1])
stop = True
thread.join()
loaded = anonymous()
run(llm)
print(json.dumps({"peak": max(peak, loaded) - before, "loaded": loaded - before,
                  "full": anonymous() - before}))
"""

FAIL = """
import shutil
path, copy = sys.argv[1], sys.argv[1] + ".cut"
shutil.copy(path, copy)
infinite = resource.RLIM_INFINITY

def limit(more):
    pages = int(open("/proc/self/statm").read().split()[0])
    soft = infinite if more is None else pages * os.sysconf("SC_PAGE_SIZE") + more
    resource.setrlimit(resource.RLIMIT_AS, (soft, infinite))

def cut_off(label, done, total):
    if done > total // 2:
        os.truncate(copy, os.path.getsize(path) // 2)

def interrupt(label, done, total):
    if done > total // 2:
        raise KeyboardInterrupt

def no_rest(label, done, total):
    if done == total:
        limit(1 << 20)

def attempt(way):
    try:
        if way == "cut off":
            load(copy, cut_off)
        elif way == "interrupted":
            load(path, interrupt)
        elif way == "no room for weights":
            limit(400 << 20)  # enough for the mapped file and for activations
            load(path)
        elif way == "no room for the rest":
            load(path, no_rest)
    except (DesksideError, KeyboardInterrupt) as error:
        return error
    finally:
        limit(None)

run(load(path))
gc.collect()  # a model and its last stream hold each other
kept, found = [], {}
before = anonymous()
for way in ("cut off", "interrupted", "no room for weights", "no room for the rest"):
    kept.append(attempt(way))  # as an interactive session keeps the last exception
    found[way] = [f"{type(kept[-1]).__name__}: {kept[-1]}", anonymous() - before]
run(load(path))  # and the next load finds everything as it was
print(json.dumps(found))
"""


def child(script: str, model: Path) -> Any:
    words = [sys.executable, "-c", COMMON + script, str(model), str(CTX), str(UBATCH)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def planned(model: Path) -> dict[str, int]:
    """Bytes on the CPU as `deskside plan` tells them."""
    command = "from deskside.cli import main; main()"
    flags = ("--device", "none", "--json", "-c", str(CTX), "-ub", str(UBATCH), "-t", "2")
    words = [sys.executable, "-c", command, "plan", "-m", str(model), *flags]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    cpu = json.loads(done.stdout)["devices"][0]
    weights = sum(cpu["weights"].values())
    return {
        "weights": weights,
        "all": weights + cpu["kv"] + cpu["recurrent"] + cpu["buffers"],
    }


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A slice of a large model, 280 MB."""
    path = tmp_path_factory.mktemp("memory") / "slice.gguf"
    synth_file("qwen3.5-35b-a3b", path, layers=4, experts=16, vocab=4096)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What it shares with the large one is Python, the tokenizer and its vocabulary."""
    path = tmp_path_factory.mktemp("memory") / "small.gguf"
    synth_file("tiny-moe", path, layers=4, vocab=4096)
    return path


def test_a_model_takes_what_the_plan_says_and_no_second_copy(model: Path, small: Path) -> None:
    alone, plan = child(USE, small), planned(small)
    of_python = {
        "weights": max(0, alone["loaded"] - plan["weights"]),
        "all": max(0, alone["full"] - plan["all"]),
    }
    used, plan = child(USE, model), planned(model)
    for measured, what in (("loaded", "weights"), ("peak", "weights"), ("full", "all")):
        expected = plan[what] + of_python[what]
        allowed = 0.02 * plan[what] + SLACK
        assert abs(used[measured] - expected) <= allowed, (measured, used, plan, of_python)


def test_a_load_that_fails_keeps_nothing(model: Path) -> None:
    found = child(FAIL, model)
    says = {
        "cut off": "ends early",
        "interrupted": "KeyboardInterrupt",
        "no room for weights": "a limit of the system refuses them; raise ulimit -v",
        "no room for the rest": "-ub 512 needs",
    }
    for way, (told, left) in found.items():
        assert says[way] in told, (way, told)
        assert left < 8 << 20, (way, told, left)


def test_a_type_without_a_kernel_is_named_with_its_file_and_tensor() -> None:
    info = TensorInfo("blk.0.w", BY_NAME["F64"], (256, 16), Path("m.gguf"), 0)
    with pytest.raises(DesksideError, match=r"m\.gguf: tensor blk\.0\.w has type F64.*no kernel"):
        panel_bytes(info)
