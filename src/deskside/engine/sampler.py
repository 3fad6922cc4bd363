"""Chooses a token from logits, in the order of llama.cpp's default chain.

logit bias -> repeat, presence and frequency penalties -> top-k -> top-p -> min-p -> temperature
-> draw.

Each of the three filters keeps a prefix of the logits in descending order. So the filters need only
sorted values, and only count how many to keep. The ids of those are looked up once, at the end.
Ids are therefore never sorted by logit, and a tie always goes to the lower id.
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
    """How to choose tokens; the defaults are llama.cpp's. DesksideError for a bad value.

    max_tokens         most tokens of an answer; None or -1 = until the context is full
    temperature        0 or less = greedy
    top_k              0 or less = off
    top_p              1 = off
    min_p              0 = off
    repeat_penalty     1 = off
    repeat_last_n      tokens that the penalties look back on; 0 = off, -1 = the whole context,
                       prompt included
    presence_penalty, frequency_penalty   0 = off
    seed               None or -1 = a random one, which `Sampler.seed` tells
    logit_bias         token id -> number to add to its logit; -inf bans it, +inf forces it
    stop               strings that end the answer
    ignore_eos         never choose a token that ends the answer
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

    banned_mask: bool (n_vocab,), tokens never to sample, whatever their bias; None = no such token.
    DesksideError for a mask of another shape, or for a bias of an unknown token.
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
        # A vocabulary's padding is at its end. Logits after the last allowed id are not read.
        self._end = int(np.flatnonzero(allowed)[-1]) + 1 if allowed.any() else n_vocab
        self._banned = np.flatnonzero(~allowed[: self._end])
        self._banned_ids = frozenset(self._banned.tolist())
        # Reused: for a large vocabulary, a new array would cost hundreds of page faults a token.
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
        """Count a token of the prompt or of the answer, for the penalties.

        DesksideError if the id is not in the vocabulary.
        """
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
        """Sample a token id from float32 logits (n_vocab,), which are not changed.

        DamagedLogits if they hold NaN or +Inf. DesksideError if no token is left to sample.
        """
        # If there is a NaN, argmax returns its index.
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
        # Choose the first id whose cumulative probability exceeds the draw, so never one of
        # probability 0. If rounding makes the draw equal the total, choose the last id that added
        # to the total.
        draw = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        last = np.searchsorted(cumulative, cumulative[-1], side="left")
        return int(ids[min(draw, last)])


def candidates(
    x: NDArray[np.float32], p: SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Apply top-k, top-p, min-p and temperature to logits x (n_vocab,).

    Returns ids (n,), ascending, and their probabilities (n,). x must hold a logit above -Inf. If x
    holds +Inf, only ids with +Inf are kept.
    """
    if x.max() == np.inf:
        x = np.where(x == np.inf, np.float32(0), np.float32(-np.inf))
    descending = largest(x, p.top_k if 0 < p.top_k < len(x) else len(x))
    descending = descending[: count_top_p(descending, p.top_p)]
    kept = count_min_p(descending, p.min_p)
    ids = ids_of_largest(x, kept, descending[kept - 1])
    return ids, softmax(x[ids], p.temperature)


def add_bias(x: NDArray[np.float32], ids: NDArray[np.int64], bias: NDArray[np.float32]) -> None:
    """In place, x[ids] += bias; an infinite bias replaces the logit. ids, bias: (n,)."""
    x[ids] = np.where(np.isinf(bias), bias, x[ids] + np.where(np.isinf(bias), 0, bias))


def penalise(
    x: NDArray[np.float32],
    counts: Mapping[int, int],
    repeat: float,
    presence: float,
    frequency: float,
) -> None:
    """Lower, in place, the logits x (n_vocab,) of tokens that were seen before.

    For a token seen c > 0 times: x / repeat if x > 0 else x * repeat, then - c * frequency -
    presence. counts: token id -> c.
    """
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
        # k groups have a maximum of at least `floor`. So the k largest values are at least `floor`,
        # and only few other values have to be sorted.
        tops = x[: n * group].reshape(group, n).max(axis=0)
        floor = np.partition(tops, n - k)[n - k]
        x = x[x >= floor]
    top = x if k >= len(x) else np.partition(x, len(x) - k)[len(x) - k :]
    return np.sort(top)[::-1]


def count_top_p(descending: Floats, p: float) -> int:
    """Fewest leading tokens whose probabilities sum to p or more. descending: sorted logits."""
    if p >= 1:
        return len(descending)
    cumulative = np.cumsum(softmax(descending))
    return min(int(np.searchsorted(cumulative, p * cumulative[-1])) + 1, len(descending))


def count_min_p(descending: Floats, p: float) -> int:
    """Number of tokens at least p times as probable as the best: x >= x_max + log p.

    -Inf never counts. descending: sorted logits.
    """
    floor = descending[0] + math.log(p) if p > 0 else -math.inf
    return max(int(np.count_nonzero((descending >= floor) & (descending > -np.inf))), 1)


def ids_of_largest(x: Floats, n: int, smallest: np.floating) -> NDArray[np.int64]:
    """Ids (n,), ascending, of the n largest values of x (n_vocab,). A tie goes to the lower id.

    smallest: the n-th largest value.
    """
    ids = np.flatnonzero(x >= smallest)
    if len(ids) == n:
        return ids
    above = x[ids] > smallest
    ties = ids[~above][: n - int(above.sum())]
    return np.sort(np.concatenate([ids[above], ties]))


def softmax(x: Floats, temperature: float = 1.0) -> NDArray[np.float64]:
    """exp(x / temperature) / sum, in float64, of x (n,)."""
    with np.errstate(over="ignore"):  # a tiny temperature gives -inf, whose exp is 0
        e = np.exp((x.astype(np.float64) - float(x.max())) / temperature)
    return np.asarray(e / e.sum())


def logprobs(logits: NDArray[np.float32], top_n: int) -> tuple[NDArray[np.int64], Floats]:
    """The top_n most probable tokens of logits (n_vocab,), most probable first.

    Returns ids (top_n,) and log-probabilities (top_n,) float64: log p_i = x_i - log(sum exp x).
    These are the model's own, before any sampling step.
    """
    top_n = min(top_n, len(logits))
    if top_n <= 0:
        return np.zeros(0, dtype=np.int64), np.zeros(0)
    ids = ids_of_largest(logits, top_n, largest(logits, top_n)[-1])
    ids = ids[np.argsort(-logits[ids], kind="stable")]
    return ids, log_softmax(logits)[ids]


def log_softmax(logits: Floats) -> NDArray[np.float64]:
    """x_i - log(sum exp x) of every token, float64 (n_vocab,)."""
    x = logits.astype(np.float64)
    x -= x.max()
    return np.asarray(x - math.log(float(np.exp(x).sum())))
