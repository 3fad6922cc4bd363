"""deskside against the Hugging Face implementations on tiny random float32 checkpoints.

The project's bounds on the relative L2 of the logits are 1e-4 for the reference backend and 1e-3
for the CPU backend. With float32 weights and an f32 KV cache both reach 2e-6, as far as torch's own
two forms of the delta rule are from each other; the tests hold ten times that, which is still below
any slip in an epsilon. Prompts stay away from router ties (`cases.ROUTER_MARGIN`), so no token is
excused.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import pytest

from deskside import LLM, SamplingParams

from . import need
from .cases import NAMES, ROUTER_MARGIN
from .metrics import describe, relative_l2

need.packages("torch", "transformers", "safetensors")

LENGTHS = (1, 63, 64, 65, 200, 1000)

BOUND = 2e-5

# name -> backend, isa
ENGINES = {"reference": ("reference", None), "scalar": ("cpu", "scalar"), "native": ("cpu", None)}


class Runner:
    """One model in one engine with one KV type, and what it gave for prefixes of its prompt."""

    def __init__(self, case: Any, engine: str, kv: str) -> None:
        backend, isa = ENGINES[engine]
        self.case = case
        self.llm = LLM(case.gguf, ctx=1024, threads=2, backend=backend, isa=isa, ctk=kv, ctv=kv)
        self.logits = cache(lambda n: self.llm.logits(case.prompt[:n]))


Open = Callable[..., Runner]


@pytest.fixture(scope="module")
def opened(hf_case: Callable[[str], Any]) -> Open:
    """(model, engine, kv) -> Runner."""
    return cache(lambda name, engine, kv="f32": Runner(hf_case(name), engine, kv))


def uneven(n: int) -> list[int]:
    """n tokens as chunks that meet the 64-token chunk of the delta rule at every angle."""
    sizes: list[int] = []
    for size in cycle((3, 60, 1, 2, 64, 65, 1, 128, 17)):
        if sum(sizes) + size >= n:
            return [*sizes, n - sum(sizes)]
        sizes.append(size)
    raise AssertionError


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, engine: str, opened: Open, report: Callable[..., None]) -> None:
    run = opened(name, engine)
    errors = {}
    for n in LENGTHS:
        got, want = run.logits(n), run.case.logits[:n]
        assert got.shape == want.shape and got.dtype == np.float32
        errors[f"{n} tokens"] = relative_l2(got, want)
        assert errors[f"{n} tokens"] <= BOUND, f"{n} tokens: {describe(got, want)}"
    report("relative L2 of the logits against transformers", model=name, engine=engine, **errors)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_chunks_change_nothing_beyond_rounding(
    name: str, engine: str, opened: Open, report: Callable[..., None]
) -> None:
    """The same numbers, summed in another order: uneven pieces, and one token at a time."""
    run = opened(name, engine)
    errors = {}
    plans = {65: [1] * 65, 200: uneven(200), 1000: uneven(1000)}
    if engine == "reference":
        del plans[1000]  # slow, and plain enough
    for n, chunks in plans.items():
        got = run.llm.logits(run.case.prompt[:n], chunks=chunks)
        errors[f"{n} in {len(chunks)}"] = relative_l2(got, run.logits(n))
        assert relative_l2(got, run.logits(n)) <= BOUND, describe(got, run.logits(n))
    report("relative L2 of chunked against whole prefill", model=name, engine=engine, **errors)


@pytest.mark.parametrize("kv", ["f32", "f16"])
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_greedy_text(name: str, engine: str, kv: str, opened: Open) -> None:
    run = opened(name, engine, kv)
    want = run.case.greedy
    # two logits, each wrong by the f16 cache's share of the spread (next test), differ by sqrt(2)
    # of it; five sigma
    assert want.margin > 5 * 2**0.5 * KV_BOUND["f16"]
    assert want.router_margin > ROUTER_MARGIN
    done = run.llm.generate(want.prompt, SamplingParams(max_tokens=48, temperature=0))
    assert done.tokens == want.tokens
    assert done.text == run.llm.detokenize(want.tokens)


# Rounding a value to f16 is wrong by up to 2**-11 of it, 2e-4 rms; Q8_0 by amax / 127 / sqrt(12),
# and amax of 32 normal values is 2.1 sigma: 5e-3 rms. An error of the logits above three times
# those shares means a wrong block or scale.
KV_BOUND = {"f16": 6e-4, "q8_0": 1.5e-2}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NAMES)
def test_kv_types_cost_what_they_should(
    name: str, engine: str, opened: Open, report: Callable[..., None]
) -> None:
    """f16 and q8_0 caches move the logits, and by no more than their rounding explains."""
    want = opened(name, engine).logits(200)
    error = {kv: relative_l2(opened(name, engine, kv).logits(200), want) for kv in KV_BOUND}
    report("relative L2 of the logits against an f32 cache", model=name, engine=engine, **error)
    assert 1e-6 < error["f16"] <= KV_BOUND["f16"]
    assert 1e-4 < error["q8_0"] <= KV_BOUND["q8_0"]


def test_the_oracle_agrees_with_itself(hf_case: Callable[[str], Any]) -> None:
    """Token by token or in chunks of 64, torch's delta rule gives the same logits."""
    from . import hf

    for name in ("qwen35moe", "qwen35moe-odd", "qwen35"):
        case = hf_case(name)
        chunked = hf.HFModel(case.folder).logits(case.prompt, recurrent=False)
        assert relative_l2(chunked, case.logits) <= 5e-6
