"""A real model in real formats (Q4_1, Q8_0): SmolLM2-135M-Instruct.

Rounding activations to 8 bits moves its logits by 2 to 4 % of their spread, in llama.cpp as in
deskside, so greedy text is compared where no step is nearer to a tie than 0.1. (Asked for the
capital of France without more, the model has "The" and "L'" 0.02 apart: both engines take "L'".)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from deskside import LLM, SamplingParams

from . import need, peers
from .fetch import SMOLLM2

MARGIN = 0.1

CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n<|im_start|>user\nWhat is the capital of France? Answer in one sentence."
    "<|im_end|>\n<|im_start|>assistant\n"
)
CONTINUED = {
    "numbers": "1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11,",
    "even numbers": "2, 4, 6, 8, 10, 12,",
    "bullets": "Äpfel, 東京 and naïve — 3.14159\n\n\t* one\n\t* two\n",
}
TEXTS = {
    **CONTINUED,
    "chat": CHAT,
    "prose": "In 1905, Albert Einstein's 4 papers weren't read; he'd wait...  \n\n  They'll see!",
    "code": "def fibonacci(n):\n    if n < 2:\n\t\treturn n  # 0b1010, 1_000\n    return",
    "scripts": "Привет, мир! שלום עולם नमस्ते 🦙🦙‍🌫️ e\u0301 \x00 1234567",
}


@pytest.fixture(scope="module")
def path() -> Path:
    return need.member(SMOLLM2)


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return LLM(path, ctx=512, threads=2)


@pytest.fixture(scope="module")
def theirs(path: Path) -> Iterator[peers.Remote]:
    with peers.llama_cpp(path, n_ctx=512) as engine:
        yield engine


@pytest.mark.parametrize("name", TEXTS)
def test_same_token_ids_as_llama_cpp(name: str, llm: LLM, theirs: peers.Remote) -> None:
    ids = llm.tokenize(TEXTS[name])
    assert ids == theirs.tokenize(TEXTS[name])
    assert llm.detokenize(ids) == TEXTS[name]


def test_it_knows_the_capital_of_france(llm: LLM) -> None:
    question = {"role": "user", "content": "What is the capital of France? Answer in one sentence."}
    ids = llm.chat([question])
    assert ids == llm.tokenize(CHAT)
    done = llm.generate(ids, SamplingParams(max_tokens=32, temperature=0))
    assert "Paris" in done.text
    assert done.stop_reason == "stop"


@pytest.fixture(scope="module")
def clear_text(theirs: peers.Remote) -> Callable[[str], list[int]]:
    """Prompt -> llama.cpp's first 32 greedy tokens, none of them near a tie."""

    def continued(prompt: str) -> list[int]:
        ids = theirs.tokenize(prompt)
        tokens = theirs.greedy(ids, 32)
        logits = theirs.logits([*ids, *tokens[:-1]])[len(ids) - 1 :]
        best = np.partition(logits, -2, axis=1)[:, -2:]
        assert ((best[:, 1] - best[:, 0]) / logits.std(axis=1)).min() > MARGIN
        return tokens

    return cache(continued)


@pytest.mark.parametrize("name", CONTINUED)
def test_first_32_greedy_tokens_equal_llama_cpps(
    name: str, llm: LLM, clear_text: Callable[[str], list[int]]
) -> None:
    done = llm.generate(CONTINUED[name], SamplingParams(max_tokens=32, temperature=0))
    assert done.tokens == clear_text(CONTINUED[name])
