"""The bundled model: what the README says of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deskside import LLM, SamplingParams
from deskside.engine.config import demo_model

HELD_OUT = Path(__file__).parent.parent / "tools" / "train_demo" / "heldout.txt"


@pytest.fixture(scope="module")
def demo() -> LLM:
    return LLM(demo_model(), ctx=1024)


def test_it_is_small_and_of_the_true_architecture(demo: LLM) -> None:
    assert demo_model().stat().st_size <= 16e6
    file = demo.file
    assert file.require("general.architecture", str) == "qwen35moe"
    assert file.get("qwen35moe.expert_count") >= 32
    kinds = [op.kind for op in demo.tape.ops]
    assert kinds.count("gated_delta") == 3 * kinds.count("attention") > 0
    types = {name: info.type.name for name, info in file.tensors.items()}
    assert {t for n, t in types.items() if "_exps" in n} == {"IQ4_NL"}
    matrices = {t for n, t in types.items() if len(file.tensors[n].shape) == 2}
    assert matrices - {"F32"} == {"Q8_0"}
    assert any("_shexp" in name for name in types)


def test_it_says_what_it_is(demo: LLM) -> None:
    prompt = demo.chat([{"role": "user", "content": "Hello, who are you?"}])
    answer = demo.generate(prompt, SamplingParams(max_tokens=80, temperature=0))
    assert "demo model" in answer.text and answer.stop_reason == "stop"


def test_it_has_learned_text_that_it_never_saw(demo: LLM) -> None:
    ids = demo.tokenize(HELD_OUT.read_text(encoding="utf-8")[:8000], special=False)[:1024]
    logits = demo.logits(ids)[:-1].astype(np.float64)
    target = logits[np.arange(len(ids) - 1), ids[1:]]
    loss = (np.log(np.exp(logits).sum(-1)) - target).mean()
    # Better than any model without context could be, even one fitted to this very text.
    share = np.unique(ids, return_counts=True)[1] / len(ids)
    assert loss < -(share * np.log(share)).sum()


def test_it_is_what_runs_without_a_model_named() -> None:
    command = [sys.executable, "-c", "from deskside.cli import main; main()", "run"]
    done = subprocess.run(
        [*command, "-p", "Hello, who are you?", "--temp", "0", "-n", "80"],
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == 0 and b"demo model" in done.stdout
