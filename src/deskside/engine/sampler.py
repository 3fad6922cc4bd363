"""Logits to a token, in the order of llama.cpp's default chain.

logit bias -> repeat, presence and frequency penalties -> top-k -> top-p -> min-p -> temperature
-> draw.

Each of the three filters keeps a beginning of the descending order of the logits. So the filters
work on sorted values alone and only say how many stay; which ids those are is read off once, at
the end. That needs no sort of the vocabulary's ids, and a tie always goes to the lower id.
"""

from __future__ import annotations

import math
import secrets
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray

from deskside.errors import DamagedLogits, DesksideError
from deskside.schema import Finite, Name, Positive, check_fields

Floats = NDArray[np.floating]

OrMinusOne = Annotated[int, Meta(ge=-1)]
Share = Annotated[float, Meta(ge=0, le=1, description="a number from 0 to 1")]


@dataclass(frozen=True)
class SamplingParams:
    """How to choose tokens; the defaults are llama.cpp's.

    max_tokens: None or -1 = to the context's end. temperature <= 0 = greedy. top_k <= 0,
    top_p = 1, min_p = 0, repeat_penalty = 1 and repeat_last_n = 0 switch that step off;
    repeat_last_n = -1 looks at the whole context, prompt included. seed None or -1 = a random one
    (`Sampler.seed` tells it). logit_bias: token id -> added to its logit; -inf bans, +inf forces.
    stop: strings that end the answer. ignore_eos: stop tokens do not end it (the engine's part).
    """

    max_tokens: OrMinusOne | None = 256
    temperature: Finite = 0.8
    top_k: int = 40
    top_p: Share = 0.95
    min_p: Share = 0.05
    repeat_penalty: Positive = 1.0
    repeat_last_n: OrMinusOne = 64
    presence_penalty: Finite = 0.0
    frequency_penalty: Finite = 0.0
    seed: OrMinusOne | None = None
    logit_bias: Mapping[Annotated[int, Meta(ge=0)], float] = field(default_factory=dict)
    stop: tuple[Name, ...] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check_fields(self)
        object.__setattr__(self, "stop", tuple(self.stop))
        for token, bias in self.logit_bias.items():
            if math.isnan(bias):
                raise DesksideError(f"logit_bias of token {token} is {bias}; expected a number")


class Sampler:
    """The sampling state of one sequence: its recent tokens and its random numbers.

    banned_mask: bool (n_vocab,), tokens that are never sampled whatever the bias, or None.
    """

    def __init__(
        self, params: SamplingParams, n_vocab: int, banned_mask: NDArray[np.bool_] | None = None
    ) -> None:
        if banned_mask is not None and banned_mask.shape != (n_vocab,):
            raise DesksideError(f"banned_mask has shape {banned_mask.shape}, not ({n_vocab},)")
        for token in params.logit_bias:
            if token >= n_vocab:
                raise DesksideError(f"logit_bias: token id {token} is not in 0..{n_vocab - 1}")
        self.params = params
        self.seed = secrets.randbits(63) if params.seed in (None, -1) else params.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))
        self._n_vocab = n_vocab
        allowed = np.ones(n_vocab, np.bool_) if banned_mask is None else ~banned_mask
        # A vocabulary's padding is at its end: what lies behind the last allowed id is not read.
        self._end = int(np.flatnonzero(allowed)[-1]) + 1 if allowed.any() else n_vocab
        self._banned = np.flatnonzero(~allowed[: self._end])
        self._banned_ids = frozenset(self._banned.tolist())
        # A new array of a large vocabulary's size would cost hundreds of page faults a token.
        self._scratch = np.empty(self._end, np.float32)
        bias = {token: b for token, b in params.logit_bias.items() if token < self._end}
        self._bias_ids = np.array(list(bias), dtype=np.int64)
        self._bias = np.array(list(bias.values()), dtype=np.float32)
        self._recent: deque[int] = deque()
        self._counts: Counter[int] = Counter()
        self._penalties = params.repeat_last_n != 0 and (
            params.repeat_penalty != 1
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
        )

    def accept(self, token: int) -> None:
        """Take note of a token of the prompt or of the answer, for the penalties."""
        if not 0 <= token < self._n_vocab:
            raise DesksideError(f"token id {token} is not in 0..{self._n_vocab - 1}")
        if not self._penalties or token >= self._end:
            return
        self._recent.append(token)
        self._counts[token] += 1
        if 0 <= self.params.repeat_last_n < len(self._recent):
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if self._counts[oldest] == 0:
                del self._counts[oldest]

    def sample(self, logits: NDArray[np.float32]) -> int:
        """The next token for float32 logits (n_vocab,), which are left as they are.

        DamagedLogits if they hold NaN or +Inf.
        """
        # argmax finds a NaN if there is one.
        best = int(logits.argmax())
        if not logits[best] < np.inf:
            raise DamagedLogits("the logits hold NaN or +Inf: the model's weights are damaged")
        p = self.params
        penalised = self._penalties and bool(self._counts)
        allowed = best < self._end and best not in self._banned_ids and logits[best] > -np.inf
        if p.temperature <= 0 and allowed and not penalised and not len(self._bias_ids):
            return best
        x = self._scratch
        np.copyto(x, logits[: self._end])
        add_bias(x, self._bias_ids, self._bias)
        if penalised:
            penalise(x, self._counts, p.repeat_penalty, p.presence_penalty, p.frequency_penalty)
        x[self._banned] = -np.inf
        best = int(x.argmax())
        if x[best] == -np.inf:
            raise DesksideError("no token is left to sample: all are banned or have logit -Inf")
        if p.temperature <= 0:
            return best
        ids, probabilities = candidates(x, p)
        cumulative = np.cumsum(probabilities)
        # The first id whose cumulative probability exceeds the draw: never one of probability 0.
        # Rounding may put the draw at the total itself; the last id that added to it then counts.
        draw = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        last = np.searchsorted(cumulative, cumulative[-1], side="left")
        return int(ids[min(draw, last)])


def candidates(
    x: NDArray[np.float32], p: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Top-k, top-p, min-p, temperature: ids, ascending, and the probabilities to draw them with.

    x (n_vocab,) must hold a logit above -Inf; a logit of +Inf leaves only such logits.
    """
    if x.max() == np.inf:
        x = np.where(x == np.inf, np.float32(0), np.float32(-np.inf))
    descending = largest(x, p.top_k if 0 < p.top_k < len(x) else len(x))
    descending = descending[: count_top_p(descending, p.top_p)]
    kept = count_min_p(descending, p.min_p)
    ids = ids_of_largest(x, kept, descending[kept - 1])
    return ids, softmax(x[ids], p.temperature)


def add_bias(x: NDArray[np.float32], ids: NDArray[np.int64], bias: NDArray[np.float32]) -> None:
    """In place: x[i] += bias[i]; an infinite bias replaces the logit."""
    x[ids] = np.where(np.isinf(bias), bias, x[ids] + np.where(np.isinf(bias), 0, bias))


def penalise(
    x: NDArray[np.float32],
    counts: Mapping[int, int],
    repeat: float,
    presence: float,
    frequency: float,
) -> None:
    """In place, for a token seen c > 0 times: x / repeat if x > 0 else x * repeat (both lower it),
    then - c * frequency - presence."""
    ids = np.fromiter(counts.keys(), dtype=np.int64, count=len(counts))
    seen = np.fromiter(counts.values(), dtype=np.float32, count=len(counts))
    value = x[ids]
    value = np.where(value > 0, value / np.float32(repeat), value * np.float32(repeat))
    x[ids] = value - seen * np.float32(frequency) - np.float32(presence)


def largest(x: Floats, k: int) -> Floats:
    """The k largest values, descending."""
    group = 64
    n = len(x) // group
    if k < n:
        # k groups have a largest value of at least `floor`, so k values do: few others are sorted.
        tops = x[: n * group].reshape(group, n).max(axis=0)
        floor = np.partition(tops, n - k)[n - k]
        x = x[x >= floor]
    top = x if k >= len(x) else np.partition(x, len(x) - k)[len(x) - k :]
    return np.sort(top)[::-1]


def count_top_p(descending: Floats, p: float) -> int:
    """How many of the most probable tokens it takes for probabilities to sum to p or more."""
    if p >= 1:
        return len(descending)
    cumulative = np.cumsum(softmax(descending))
    return min(int(np.searchsorted(cumulative, p * cumulative[-1])) + 1, len(descending))


def count_min_p(descending: Floats, p: float) -> int:
    """How many are at least p times as probable as the best: x >= x_max + log p. -Inf never is."""
    floor = descending[0] + math.log(p) if p > 0 else -math.inf
    return max(int(np.count_nonzero((descending >= floor) & (descending > -np.inf))), 1)


def ids_of_largest(x: Floats, n: int, smallest: np.floating) -> NDArray[np.int64]:
    """Ids, ascending, of the n largest values, `smallest` being the n-th; ties: the lower ids."""
    ids = np.flatnonzero(x >= smallest)
    if len(ids) == n:
        return ids
    above = x[ids] > smallest
    ties = ids[~above][: n - int(above.sum())]
    return np.sort(np.concatenate([ids[above], ties]))


def softmax(x: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """exp(x / temperature) / sum, in float64."""
    with np.errstate(over="ignore"):  # a tiny temperature: -inf, whose exp is 0
        e = np.exp((x.astype(np.float64) - float(x.max())) / temperature)
    return np.asarray(e / e.sum())


def logprobs(logits: NDArray[np.float32], top_n: int) -> tuple[NDArray[np.int64], Floats]:
    """(ids, log-probabilities float64) of the top_n most probable tokens, most probable first.

    log p_i = x_i - log(sum exp x), of the model's own distribution, before any sampling step.
    """
    top_n = min(top_n, len(logits))
    if top_n <= 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    ids = ids_of_largest(logits, top_n, largest(logits, top_n)[-1])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids, log_softmax(logits)[ids]


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """log p_i of every token, float64 (n_vocab,)."""
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - math.log(float(np.exp(x).sum())))
