"""What can be measured: the protocol, and an engine in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

from deskside import __version__
from deskside.backends.native.program import CpuBackend
from deskside.bench.measure.ceiling import Roof
from deskside.bench.measure.hashes import hashed
from deskside.bench.measure.text import Token
from deskside.bench.record import Run, Target
from deskside.bench.workload import Workload, fit_context
from deskside.engine import LLM
from deskside.engine.config import EngineConfig
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine import watch
from deskside.machine.system import available_memory
from deskside.models import build_tape
from deskside.progress import Progress, silent
from deskside.tape import Tape
from deskside.tape.cache import cache_bytes, kv_type
from deskside.tape.cost import Work
from deskside.text.prompt import Prompt

OPENED = 2  # tokens of "<think>\n", behind which a thinking model's prompt ends


class TargetRunner(Protocol):
    """Something that generates text, one prompt at a time.

    n_ctx      tokens that a context may hold, None if unknown; `limit` says why no more
    own        it runs in this process
    local      it runs on this machine
    caches     it may answer from a cache that cannot be switched off
    """

    n_ctx: int | None
    limit: str
    own: bool
    local: bool
    caches: bool

    def describe(self) -> Target:
        """What it is, for the record."""

    def roof(self) -> Roof | None:
        """What decides its ceiling; None where that is not known."""

    def learn(self, sample: str) -> None:
        """Take note of some of the text that prompts are cut from, before any is."""

    def encode(self, text: str, first: bool) -> list[Token]:
        """Plain text as tokens; `first` at the beginning of a prompt."""

    def run(
        self,
        prompt: Sequence[Token],
        params: SamplingParams,
        *,
        reuse: bool,
        thinks: bool,
        on_token: Callable[[], None],
    ) -> tuple[Run, list[Token]]:
        """Generate `params.max_tokens` tokens: a run with its clocks, and the answer.

        reuse: whether a cache may hold what the prompt begins with; else all is computed. thinks:
        whether a later prompt may leave out the beginning of the answer.
        on_token is called as tokens arrive and must return at once. DesksideError: the run failed.
        """

    def check(self) -> None:
        """DesksideError if it cannot run anything more."""

    def close(self) -> None:
        """Release what it holds."""


class InProcess:
    """An engine in this process, on the path that serves: `LLM.stream`."""

    own = local = True
    caches = False

    def __init__(
        self,
        path: str | Path | GGUF,
        *,
        limit: str = "",
        sha: bool = True,
        progress: Progress = silent,
        **options: Any,
    ) -> None:
        """Loads the model. limit: why its context is no larger; sha: hash its files; options: of
        `EngineConfig`."""
        file = path if isinstance(path, GGUF) else GGUF.open(path)
        self._files = hashed(file.paths, sha, progress)
        began = time.perf_counter()
        self.llm = LLM(file, progress=progress, **options)
        self._load_seconds = time.perf_counter() - began
        self._resident = watch.rss(os.getpid()).get("anonymous")
        self._path = str(file.path)
        self._cold = True
        self.n_ctx: int | None = self.llm.ctx
        self.limit = limit or f"its context is {self.llm.ctx}"

    def describe(self) -> Target:
        llm, config = self.llm, self.llm.config
        native = llm.backend if isinstance(llm.backend, CpuBackend) else None
        threads = native is not None or llm.plan is not None
        weights = llm.tape.weights().values()
        types: dict[str, int] = {}
        for info in weights:
            types[info.type.name] = types.get(info.type.name, 0) + info.nbytes
        k, v = kv_type(config.ctk, "-ctk"), kv_type(config.ctv, "-ctv")
        kv, recurrent = cache_bytes(llm.tape.states, llm.ctx, k, v)
        plan = {"weights": sum(types.values()), "kv": kv, "recurrent": recurrent}
        how = native.isa if native else config.backend
        if native:
            plan["buffers"] = native.nbytes
        elif llm.plan:
            how = " and ".join(llm.plan.used)
            plan["buffers"] = sum(u.buffers for u in llm.plan.usage)
            plan |= {f"of them on {u.device.name}": u.held for u in llm.plan.usage if u.held}
        return Target(
            kind="deskside",
            name=str(llm.file.get("general.name", llm.file.path.stem)),
            engine=f"deskside {__version__}, {how}",
            options={
                "model": self._path,
                "ctx": llm.ctx,
                "threads": config.n_threads if threads else None,
                "ubatch": llm.ubatch,
                "ctk": config.ctk,
                "ctv": config.ctv,
                "isa": config.isa,
                "numa": config.numa,
                "huge_pages": config.huge_pages,
                "backend": config.backend,
                **config.placement_options(),
            },
            files=self._files,
            architecture=str(llm.file.get("general.architecture", "")),
            weights_bytes=plan["weights"],
            types=types,
            plan=plan,
            load_seconds=self._load_seconds,
            n_ctx=llm.ctx,
            resident_bytes=self._resident,
        )

    def roof(self) -> Roof | None:
        llm, config = self.llm, self.llm.config
        if not isinstance(llm.backend, CpuBackend):
            return None  # NumPy and other devices have other limits
        isa = llm.backend.isa
        work = Work.of(llm.tape)
        return Roof(work, config.n_threads, llm.ubatch, config.ctk, config.ctv, isa)

    def learn(self, sample: str) -> None:
        """Its tokenizer is here."""

    def encode(self, text: str, first: bool) -> list[Token]:
        ids = self.llm.tokenize(text, special=False, add_bos=None if first else False)
        return list(ids)

    def run(
        self,
        prompt: Sequence[Token],
        params: SamplingParams,
        *,
        reuse: bool,
        thinks: bool,
        on_token: Callable[[], None],
    ) -> tuple[Run, list[Token]]:
        if not reuse:
            self.llm.reset()
        ids = [token for token in prompt if isinstance(token, int)]
        cold, self._cold = self._cold, False
        began = time.perf_counter()
        marks = (max(1, len(ids) - OPENED),) if thinks else ()
        stream = self.llm.stream(Prompt(ids, marks), params)
        text, reached, gaps = [], 0.0, []
        for chunk in stream:
            text.append(chunk.text)
            if chunk.token is None:
                continue
            # The engine's own clock, so that gaps add up to its decode time.
            if len(stream.tokens) > 1:
                gaps.append(stream.timings.decode_seconds - reached)
                reached = stream.timings.decode_seconds
            on_token()
        total = time.perf_counter() - began
        t = stream.timings
        run = Run(
            index=0,
            name="",
            cold=cold,
            prompt_tokens=t.prompt_tokens,
            cached_tokens=t.cached_tokens,
            generated_tokens=t.generated_tokens,
            prefill_seconds=t.prompt_seconds,
            first_seconds=t.first_seconds,
            decode_seconds=t.decode_seconds,
            total_seconds=total,
            gaps=gaps,
            clock="engine",
            stop_reason=stream.stop_reason,
            output=sha256("".join(text).encode("utf-8", "replace")).hexdigest(),
        )
        return run, list(stream.tokens)

    def check(self) -> None:
        """What runs in this process can run again."""

    def close(self) -> None:
        del self.llm


def load(
    file: GGUF,
    workload: Workload,
    *,
    beside: GGUF | None = None,
    sha: bool = True,
    progress: Progress = silent,
    **options: Any,
) -> InProcess:
    """A model with a context that is as long as the workload needs.

    Where the model or the memory does not allow that, the longest that they do, or a DesksideError
    that names the item, as the workload says. beside: another model that must fit, too.
    """
    config = EngineConfig(**options)
    other = None if beside is None else build_tape(beside)
    room, limit = context_room(build_tape(file), config, other)
    kept, _ = fit_context(workload, room, limit)
    if config.ctx is None:
        options["ctx"] = max(depth for _, depth in kept.depths())
    return InProcess(file, limit=limit, sha=sha, progress=progress, **options)


def context_room(tape: Tape, config: EngineConfig, beside: Tape | None = None) -> tuple[int, str]:
    """Tokens that a context may hold, and why no more: -c, the model, or the free memory.

    beside: a second model with the same options, whose memory is shared out alike. DesksideError if
    not even the weights fit together.
    """
    own = tape.n_ctx_train
    if config.ctx:
        return config.ctx, f"-c {config.ctx} was given"
    if config.devices is not None:
        return own, f"the model's context is {own}"  # what does not fit, the planner refuses
    tapes = [tape] if beside is None else [tape, beside]
    free = available_memory()
    weights = sum(w.nbytes for t in tapes for w in t.weights().values())
    room = (free - weights - watch.WORK_BYTES * len(tapes)) // len(tapes)
    k, v = kv_type(config.ctk, "-ctk"), kv_type(config.ctv, "-ctv")
    if beside is not None and room < max(sum(cache_bytes(t.states, 1, k, v)) for t in tapes):
        raise DesksideError(
            f"--vs: the two models hold {weights / 1e9:.1f} GB of weights together and "
            f"{free / 1e9:.1f} GB of memory are free; measure each alone, then deskside compare"
        )
    if config.ctx == 0 or sum(cache_bytes(tape.states, own, k, v)) <= room:
        return own, f"the model's context is {own}"
    low, high = 1, own
    while low + 1 < high:
        middle = (low + high) // 2
        fits = sum(cache_bytes(tape.states, middle, k, v)) <= room
        low, high = (middle, high) if fits else (low, middle)
    return low, f"{free / 1e9:.1f} GB of free memory hold the weights and a cache of {low} tokens"
