"""deskside with the interface of `tests/oracles/capi.py`, for a worker process.

This is the only file of the comparison that uses the engine's internals.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from deskside import LLM, SamplingParams
from deskside.engine.slots import Slot
from deskside.gguf.quants import quant_type
from deskside.tape.cache import Batch, Cache, Segment


class _Clocked:
    """Wraps the native program and times every run."""

    def __init__(self, program: Any) -> None:
        self._program = program
        self.seconds: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._program, name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self._program.run(*args, **kwargs)
        self.seconds.append(time.perf_counter() - start)
        return result


class _Given:
    """Wraps a sampler: it samples as usual, but returns tokens given beforehand."""

    def __init__(self, sampler: Any, tokens: Iterator[int]) -> None:
        self._sampler = sampler
        self._tokens = tokens

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def sample(self, logits: Any) -> int:
        self._sampler.sample(logits)
        return next(self._tokens)


@dataclass
class _Context:
    """A context. ids: tokens in the first slot, plus one. lengths: tokens of each sequence."""

    cache: Cache
    slots: list[Slot]
    ubatch: int
    ids: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)


class Deskside:
    """A model with room for any context that `open` will make."""

    def __init__(
        self,
        path: str,
        n_ctx: int = 2048,
        threads: int = 2,
        ubatch: int = 512,
        isa: str | None = None,
    ) -> None:
        start = time.perf_counter()
        self.llm = LLM(path, ctx=n_ctx, threads=threads, ubatch=ubatch, isa=isa)
        self.load_seconds = time.perf_counter() - start
        self._clock = _Clocked(self.llm.backend.program)  # type: ignore[attr-defined]
        self.llm.backend.program = self._clock  # type: ignore[attr-defined]
        self._contexts: dict[str, _Context] = {}
        self._share = 0.0

    def open(
        self, name: str, n_ctx: int, kv: str = "f16", ubatch: int = 512, n_seq: int = 1
    ) -> None:
        """Make and use a context of n_ctx tokens, counted over all sequences."""
        kind = quant_type(kv)
        states = self.llm.tape.states
        cache = Cache(states, n_slots=n_seq, n_ctx=n_ctx // n_seq, k_type=kind, v_type=kind)
        slots = [Slot(i, cache) for i in range(n_seq)]
        self._contexts[name] = _Context(cache, slots, ubatch, lengths=[0] * n_seq)
        self.use(name)

    def use(self, name: str) -> None:
        """Continue with this context as it was left."""
        self._now = now = self._contexts[name]
        self.llm.loaded = replace(
            self.llm.loaded,
            cache=now.cache,
            slots=tuple(now.slots),
            ctx=now.cache.n_ctx,
            ubatch=now.ubatch,
        )
        self.llm.ubatch = now.ubatch

    def drop(self) -> None:
        """Free all contexts."""
        self._contexts.clear()

    def loaded(self) -> float:
        """Seconds that the model took to load."""
        return self.load_seconds

    def _generate(self, ids: list[int], given: Sequence[int]) -> tuple[float, float]:
        """Seconds of the prompt, and of the steps after its first token. `given` are the tokens."""
        params = SamplingParams(max_tokens=len(given), temperature=0, ignore_eos=True)
        stream = self.llm.stream(ids, params)
        sequence = stream._sequence
        sequence._sampler = _Given(sequence._sampler, iter(given))  # type: ignore[assignment]
        for _ in stream:
            pass
        t = stream.timings
        if t.generated_tokens != len(given):
            raise RuntimeError(f"{t.generated_tokens} of {len(given)} tokens were generated")
        self._now.ids = [*ids, *given]
        self._fresh = t.prompt_tokens
        return t.prompt_seconds, t.decode_seconds

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds to compute a new sequence, and the logits of its last token."""
        self.llm.reset()
        seconds, _ = self._generate(list(ids), ids[:1])
        return seconds

    def decode(self, ids: Sequence[int]) -> float:
        """Seconds for one step per token, with sampler and text. Step i chooses ids[i]."""
        self._clock.seconds.clear()
        _, seconds = self._generate(self._now.ids, [*ids, ids[-1]])
        if self._fresh != 1:
            raise RuntimeError(f"{self._fresh} tokens were computed again")
        self._share = 1 - sum(self._clock.seconds[1:]) / seconds
        return seconds

    def python_share(self) -> float:
        """The share of the last `decode` that was not spent in native code."""
        return self._share

    def _advance(self, tokens: Sequence[int], segments: Sequence[Segment]) -> None:
        outputs = np.cumsum([s.n for s in segments], dtype=np.int32) - 1
        batch = Batch(np.array(tokens, np.int32), tuple(segments), outputs.astype(np.int32))
        self.llm.backend.run(batch, self._now.cache).argmax(axis=1)
        for s in segments:
            self._now.lengths[s.slot] += s.n

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Begin a new sequence for each prompt."""
        for slot, ids in enumerate(prompts):
            self._now.cache.clear(slot)
            self._now.lengths[slot] = 0
            self._advance(ids, [Segment(slot, 0, len(ids))])

    def step_all(self, steps: Sequence[Sequence[int]]) -> float:
        """Seconds for steps that each append one given token to every sequence."""
        start = time.perf_counter()
        for ids in steps:
            lengths = self._now.lengths
            self._advance(ids, [Segment(slot, n, 1) for slot, n in enumerate(lengths)])
        return time.perf_counter() - start

    def info(self) -> dict[str, Any]:
        """The instruction set in use."""
        return {"system": getattr(self.llm.backend, "isa", "?")}
