"""Targets that can be measured: the protocol, and an engine in this process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from deskside import __version__
from deskside.backends.native.program import CpuBackend
from deskside.bench.measure import answers
from deskside.bench.measure.ceiling import Roof
from deskside.bench.measure.hashes import hashed
from deskside.bench.measure.text import Token
from deskside.bench.predict import slices
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

OPENED = 2  # tokens of "<think>\n", which ends the prompt of a thinking model


class TargetRunner(Protocol):
    """An engine that generates text, one prompt at a time.

    n_ctx      most tokens of a context; None if unknown
    limit      why the context is no longer, to show to the user
    own        whether it runs in this process
    local      whether it runs on this machine
    caches     whether it may use a cache that cannot be switched off
    """

    n_ctx: int | None
    limit: str
    own: bool
    local: bool
    caches: bool

    def describe(self) -> Target:
        """The description for the record."""

    def roof(self) -> Roof | None:
        """What its ceiling depends on; None if unknown."""

    def learn(self, sample: str) -> None:
        """See a sample of the text, before the first prompt is cut from it."""

    def encode(self, text: str, first: bool) -> list[Token]:
        """Tokenize plain text. first: whether it begins a prompt."""

    def run(
        self,
        prompt: Sequence[Token],
        params: SamplingParams,
        *,
        reuse: bool,
        thinks: bool,
        on_token: Callable[[], None],
    ) -> tuple[Run, list[Token]]:
        """Generate `params.max_tokens` tokens. Returns a run with its times, and the answer.

        reuse: whether to use a cache of the prompt's beginning; else all of it is computed.
        thinks: whether a later prompt may leave out the beginning of the answer.
        on_token: called for each token; it must return at once.
        DesksideError if the run failed.
        """

    def check(self) -> None:
        """DesksideError if the target can run nothing more."""

    def close(self) -> None:
        """Release its resources."""


class InProcess:
    """An engine in this process, measured through `LLM.stream`, as users call it."""

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
        """Load the model.

        limit: why its context is no longer. sha: hash its files. options: fields of `EngineConfig`.
        """
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
                **({"threads_batch": config.n_threads_batch} if config.threads_batch > 0 else {}),
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
            random=slices.is_random(llm.file),
            part=slices.part(llm.file),
        )

    def roof(self) -> Roof | None:
        llm, config = self.llm, self.llm.config
        if not isinstance(llm.backend, CpuBackend):
            return None  # the limits of NumPy and of other devices are not known here
        isa = llm.backend.isa
        work = Work.of(llm.tape)
        threads = max(config.n_threads, config.n_threads_batch)
        return Roof(work, threads, llm.ubatch, config.ctk, config.ctv, isa)

    def learn(self, sample: str) -> None:
        """Do nothing, because the tokenizer is in this process."""

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
            # Use the engine's clock, so that the gaps add up to its decode time.
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
        )
        answers.note(run, "".join(text), params.max_tokens or run.generated_tokens)
        return run, list(stream.tokens)

    def check(self) -> None:
        """Do nothing, because an engine in this process can always run again."""

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
    """Load a model with the context that the workload needs.

    If model or memory do not allow that context, the longest possible one is used. Or, if the
    workload says so, DesksideError names the item. beside: another model that must fit, too.
    """
    config = EngineConfig(**options)
    other = None if beside is None else build_tape(beside)
    room, limit = context_room(build_tape(file), config, other)
    kept, _ = fit_context(workload, room, limit)
    if config.ctx is None:
        options["ctx"] = max(depth for _, depth in kept.depths())
    return InProcess(file, limit=limit, sha=sha, progress=progress, **options)


def context_room(tape: Tape, config: EngineConfig, beside: Tape | None = None) -> tuple[int, str]:
    """Most tokens of a context, and why no more: -c, the model, or the free memory.

    beside: a second model with the same options, which gets the same context. DesksideError if the
    weights of both do not fit.
    """
    own = tape.n_ctx_train
    if config.ctx:
        return config.ctx, f"-c {config.ctx} was given"
    if config.devices is not None:
        return own, f"the model's context is {own}"  # the planner checks the memory
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
