from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from deskside.engine.sampler import (
    Sampler,
    SamplingParams,
    candidates,
    largest,
    log_softmax,
    logprobs,
    penalise,
)
from deskside.errors import DesksideError

# Every step off: the model's own distribution.
PLAIN: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
NEVER = -math.inf


def floats(*values: float) -> np.ndarray:
    return np.array(values, dtype=np.float32)


def draws(logits: np.ndarray, count: int = 300, **params: Any) -> set[int]:
    sampler = Sampler(SamplingParams(**({"seed": 1} | PLAIN | params)), len(logits))
    return {sampler.sample(logits) for _ in range(count)}


def greedy(logits: np.ndarray, seen: Sequence[int] = (), **params: Any) -> int:
    sampler = Sampler(SamplingParams(temperature=0, **params), len(logits))
    for token in seen:
        sampler.accept(token)
    return sampler.sample(logits)


# The filters, against a plain twin.


def twin(x: list[float], p: SamplingParams, require: Callable[[bool], object]) -> dict[int, float]:
    """{id: probability}, step by step on a sorted list of (id, logit).

    `require` is told what must hold for rounding not to decide.
    """
    kept = sorted(((i, v) for i, v in enumerate(x) if v > NEVER), key=lambda pair: -pair[1])
    if p.top_k > 0:
        kept = kept[: p.top_k]
    if p.top_p < 1:
        total, cumulative = sum(math.exp(v - kept[0][1]) for _, v in kept), 0.0
        for n, (_, v) in enumerate(kept, start=1):
            cumulative += math.exp(v - kept[0][1]) / total
            require(abs(cumulative - p.top_p) > 1e-9)
            if cumulative >= p.top_p:
                kept = kept[:n]
                break
    if p.min_p > 0:
        ratios = [math.exp(v - kept[0][1]) for _, v in kept]
        # x_max + log p is rounded to float32 (2^-24 of at most 32, as a factor)
        require(all(abs(ratio / p.min_p - 1) > 1e-5 for ratio in ratios))
        kept = [pair for pair, ratio in zip(kept, ratios, strict=True) if ratio >= p.min_p]
    weights = {i: math.exp((v - kept[0][1]) / p.temperature) for i, v in kept}
    return {i: w / sum(weights.values()) for i, w in weights.items()}


# Quarters within ±16: ties are frequent and every value is exact in float32.
LOGITS = st.lists(st.just(NEVER) | st.integers(-64, 64).map(lambda n: n / 4), min_size=1).filter(
    lambda x: max(x) > NEVER
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(-1, 12),
    top_p=st.just(1.0) | st.floats(0, 1),
    min_p=st.just(0.0) | st.floats(0, 1),
)


@given(x=LOGITS, params=PARAMS)
def test_candidates_equal_the_twins(x: list[float], params: SamplingParams) -> None:
    expected = twin(x, params, assume)
    ids, probabilities = candidates(floats(*x), params)
    found = dict(zip(ids.tolist(), probabilities.tolist(), strict=True))
    # Without a filter, ids of probability 0 may be listed: they cannot be drawn.
    assert {i: q for i, q in found.items() if q > 0} == pytest.approx(
        {i: q for i, q in expected.items() if q > 0}, rel=1e-12, abs=1e-300
    )


@pytest.mark.parametrize(
    "params", [{}, {"temperature": 1.7}, {"top_k": 5}, {"top_p": 0.8, "min_p": 0.1}]
)
def test_draws_follow_the_probabilities(params: dict[str, Any]) -> None:
    x = np.random.default_rng(5).normal(0, 1.5, 12).astype(np.float32)
    full = SamplingParams(seed=11, **(PLAIN | params))
    expected = twin(x.tolist(), full, require=bool)
    sampler, n = Sampler(full, len(x)), 20_000
    counts = Counter(sampler.sample(x) for _ in range(n))
    assert set(counts) <= set(expected)
    chi2 = sum((counts[i] - n * q) ** 2 / (n * q) for i, q in expected.items())
    # Laurent & Massart: P(chi2_d >= d + 2 sqrt(d t) + 2 t) <= e^-t; t = 14 is one in a million.
    degrees, t = len(expected) - 1, 14.0
    assert chi2 < degrees + 2 * math.sqrt(degrees * t) + 2 * t


# The order of the steps: each example gives another answer if its two steps change places.


def test_bias_before_penalties() -> None:
    # (-1 + 3) / 4 = 0.5 wins against 0; -1 * 4 + 3 = -1 would not.
    assert greedy(floats(-1, 0), [0], repeat_penalty=4, logit_bias={0: 3}) == 0


def test_penalties_before_top_k() -> None:
    logits = floats(5, 4, 3)
    sampler = Sampler(SamplingParams(**PLAIN | {"top_k": 1}, presence_penalty=3), 3)
    sampler.accept(0)
    assert {sampler.sample(logits) for _ in range(50)} == {1}


def test_top_k_before_top_p() -> None:
    # Two of ten equals stay; the first is then half of the mass, not a tenth.
    assert draws(floats(*[0] * 10), top_k=2, top_p=0.5) == {0}


def test_top_p_before_min_p() -> None:
    # 0.3 + 0.3 >= 0.45 keeps two; after min-p the first alone would be 0.5.
    assert draws(np.log(floats(0.3, 0.3, 0.2, 0.2)), top_p=0.45, min_p=0.9) == {0, 1}


def test_top_p_before_temperature() -> None:
    # e^2 / (e^2 + 3) = 0.71 is enough; at temperature 100 it would be 0.25.
    assert draws(floats(2, 0, 0, 0), top_p=0.7, temperature=100) == {0}


# Penalties.


@given(
    x=st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=8),
    seen=st.lists(st.integers(0, 7), max_size=20),
    repeat=st.floats(0.25, 4),
    presence=st.floats(-2, 2),
    frequency=st.floats(-2, 2),
)
def test_penalties_as_llama_cpp_has_them(
    x: list[float], seen: list[int], repeat: float, presence: float, frequency: float
) -> None:
    counts = Counter(t % len(x) for t in seen)
    found = floats(*x)
    penalise(found, counts, repeat, presence, frequency)
    for i, logit in enumerate(x):
        c = counts[i]
        expected = logit
        if c > 0:
            expected = logit / repeat if logit > 0 else logit * repeat
            expected -= c * frequency + presence
        # Each of the five float32 roundings errs by 2^-24 of a term at most this large.
        bound = 5 * 2**-24 * (50 * 4 + c * 2 + 2 + abs(expected))
        assert found[i] == pytest.approx(expected, rel=0, abs=bound if c else 0)


def test_the_penalty_window() -> None:
    logits = floats(3, 2, 1)
    penalty = {"presence_penalty": 2.5}
    assert greedy(logits, [0], **penalty) == 1
    assert greedy(logits, [0, 1], **penalty) == 2
    assert greedy(logits, [0, 1], repeat_last_n=1, **penalty) == 0
    assert greedy(logits, [0], repeat_last_n=1, **penalty) == 1
    assert greedy(logits, [0, *[2] * 63], **penalty) == 1
    assert greedy(logits, [0, *[2] * 64], **penalty) == 0
    assert greedy(logits, [0, *[2] * 64], repeat_last_n=-1, **penalty) == 1
    assert greedy(logits, [0], repeat_last_n=0, **penalty) == 0


def test_frequency_counts_within_the_window() -> None:
    logits = floats(3, 2.1)
    assert greedy(logits, [0], frequency_penalty=0.5) == 0
    assert greedy(logits, [0, 0], frequency_penalty=0.5) == 1
    assert greedy(logits, [0, 0, 1], frequency_penalty=0.5, repeat_last_n=2) == 0


# Bias, bans, greedy, seeds.


def test_greedy_takes_the_best_and_the_lower_id_of_equals() -> None:
    assert greedy(floats(0, 2, 2, 1)) == 1
    assert greedy(floats(0, 2, 2, 1), logit_bias={3: 5}) == 3


def test_infinite_bias_forces_or_bans() -> None:
    logits = floats(9, 0, NEVER)
    assert draws(logits, logit_bias={1: math.inf, 2: math.inf}) == {1, 2}
    assert draws(logits, logit_bias={0: -math.inf}) == {1}


@pytest.mark.parametrize("temperature", [0, 1])
def test_banned_tokens_are_never_sampled(temperature: float) -> None:
    banned = np.array([True, False, True])
    params = SamplingParams(
        **PLAIN | {"temperature": temperature}, logit_bias={0: math.inf, 2: 99}, seed=1
    )
    sampler = Sampler(params, 3, banned)
    assert {sampler.sample(floats(5, -40, 5)) for _ in range(100)} == {1}


def test_equal_seeds_give_equal_tokens() -> None:
    logits = np.random.default_rng(0).normal(size=1000).astype(np.float32)

    def tokens(seed: int | None) -> tuple[list[int], int]:
        sampler = Sampler(SamplingParams(**PLAIN, seed=seed), 1000)
        return [sampler.sample(logits) for _ in range(20)], sampler.seed

    assert tokens(3) == tokens(3)
    assert tokens(3)[0] != tokens(4)[0]
    random, seed = tokens(None)
    assert tokens(seed)[0] == random
    assert tokens(-1)[1] != seed


def test_logits_are_left_as_they_are() -> None:
    logits = floats(1, 2, 3)
    sampler = Sampler(
        SamplingParams(logit_bias={0: 4}, repeat_penalty=2), 3, np.array([False, False, True])
    )
    sampler.accept(1)
    sampler.sample(logits)
    assert logits.tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_logits_are_an_error(value: float) -> None:
    with pytest.raises(DesksideError, match="NaN or"):
        greedy(floats(0, value, 1))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_left_to_sample_is_an_error(temperature: float) -> None:
    with pytest.raises(DesksideError, match="no token is left"):
        draws(floats(NEVER, NEVER), temperature=temperature)
    with pytest.raises(DesksideError, match="no token is left"):
        draws(floats(1, 2), logit_bias={0: NEVER, 1: NEVER}, temperature=temperature)


def test_extreme_temperatures() -> None:
    assert draws(floats(1, 0.9999), temperature=1e-300) == {0}
    assert draws(floats(50, -50), temperature=1e300) == {0, 1}


def test_ids_out_of_range_are_errors() -> None:
    sampler = Sampler(SamplingParams(), 3)
    for token in (-1, 3):
        with pytest.raises(DesksideError, match="token id"):
            sampler.accept(token)
    with pytest.raises(DesksideError, match="logit_bias: token id 3"):
        Sampler(SamplingParams(logit_bias={3: 1}), 3)
    with pytest.raises(DesksideError, match="banned_mask"):
        Sampler(SamplingParams(), 3, np.zeros(2, dtype=bool))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", -2),
        ("max_tokens", 1.5),
        ("temperature", math.nan),
        ("temperature", "1"),
        ("top_k", 2.0),
        ("top_k", True),
        ("top_p", 1.1),
        ("top_p", -0.1),
        ("min_p", 2),
        ("repeat_penalty", 0),
        ("repeat_penalty", -1),
        ("repeat_last_n", -2),
        ("presence_penalty", math.inf),
        ("frequency_penalty", None),
        ("seed", -2),
        ("seed", 0.5),
        ("logit_bias", [1]),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {"a": 0.0}),
        ("logit_bias", {1: math.nan}),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", 5),
        ("ignore_eos", 1),
    ],
)
def test_a_wrong_parameter_is_named(field: str, value: Any) -> None:
    with pytest.raises(DesksideError, match=f"^{field}"):
        SamplingParams(**{field: value})


def test_parameters_that_are_accepted() -> None:
    params = SamplingParams(
        max_tokens=None,
        temperature=-1,
        stop="end",  # type: ignore[arg-type]
        seed=2**64,
    )
    assert params.stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert Sampler(params, 2).sample(floats(0, 1)) == 1


# Log-probabilities.


@given(x=LOGITS, n=st.integers(0, 20))
def test_logprobs(x: list[float], n: int) -> None:
    logits = floats(*x)
    total = sum(math.exp(v - max(x)) for v in x)
    order = sorted(range(len(x)), key=lambda i: -x[i])[:n]
    ids, values = logprobs(logits, n)
    assert ids.tolist() == order
    expected = [x[i] - max(x) - math.log(total) for i in order]
    # float64: exp, sum and log err by some 2^-53, the differences by 2^-53 of at most 40
    assert values.tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)
    assert np.exp(log_softmax(logits)).sum() == pytest.approx(1, abs=1e-12)


@settings(deadline=None)
@given(
    st.lists(st.floats(-5, 5, width=16) | st.just(-np.inf), min_size=1, max_size=700),
    st.integers(1, 12),
)
def test_largest_by_groups_is_largest_by_sorting(values: list[float], k: int) -> None:
    x = np.array(values, np.float32)
    k = min(k, len(x))
    np.testing.assert_array_equal(largest(x, k), np.sort(x)[::-1][:k])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_padding_behind_the_vocabulary_is_never_read(temperature: float) -> None:
    """Bias and penalties of padding ids change nothing either."""
    banned = np.zeros(100, bool)
    banned[[3, *range(60, 100)]] = True
    logits = np.linspace(0, 1, 100, dtype=np.float32)
    logits[3] = logits[80] = 50
    params = SamplingParams(
        temperature=temperature, seed=1, top_k=0, repeat_penalty=1.5, logit_bias={80: 9.0}
    )
    sampler = Sampler(params, 100, banned)
    sampler.accept(80)
    drawn = {sampler.sample(logits) for _ in range(200)}
    assert drawn == {59} if temperature == 0 else max(drawn) < 60 and 3 not in drawn
