"""Loads a model: plans, checks the file, reads the weights, allocates the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from deskside.backends import Backend
from deskside.backends.native.program import CpuBackend
from deskside.engine.config import DEFAULT_CTX, EngineConfig
from deskside.engine.placing import ExpertOffload, place
from deskside.engine.slots import Slot
from deskside.engine.turn import Turn
from deskside.errors import DesksideError, drop_frames
from deskside.gguf import GGUF
from deskside.lowering.scratch import MAX_OUTPUTS
from deskside.machine.devices import CPU
from deskside.machine.host import HostOptions
from deskside.machine.pages import lock, need_lockable
from deskside.machine.system import available_memory
from deskside.models import build_tape
from deskside.plan import Plan
from deskside.progress import Progress, silent
from deskside.tape import Tape
from deskside.tape.cache import Batch, Cache, Segment, cache_bytes, kv_type
from deskside.text.tokenizer import Tokenizer

# Bytes of weights up to which loading checks all of them for NaN and infinity.
CHECK_BYTES = 1 << 30


@dataclass(frozen=True)
class Part:
    """The share of one slot in a step.

    tokens: (n,) int32, to compute after those that the slot holds.
    outputs: indices into `tokens` whose logits are wanted.
    """

    slot: Slot
    tokens: NDArray[np.int32]
    outputs: NDArray[np.integer]


@dataclass(frozen=True)
class Loaded:
    """A loaded model, for up to `config.parallel` sequences, each in a slot of the cache.

    ctx: tokens that a slot holds.
    ubatch: most tokens of a step.
    max_outputs: most tokens of a step whose logits are wanted.
    plan: where the tensors are; None if all are on the CPU.
    notes: lines to show to the user.
    offloads: whether a GPU computes experts of the CPU.
    banned: (n_vocab,) bool, ids that must never be chosen.

    Threads may share it. Use `turn` to compute, or to touch a slot. Ctrl-C waits for the end of a
    turn, so a step is never left half done.
    """

    file: GGUF
    config: EngineConfig
    tokenizer: Tokenizer
    tape: Tape
    backend: Backend
    cache: Cache
    slots: tuple[Slot, ...]
    ctx: int
    ubatch: int
    max_outputs: int
    plan: Plan | None
    notes: Sequence[str]
    offloads: bool
    banned: NDArray[np.bool_]
    _rows: NDArray[np.float32]  # reused for few logits: a new array would cost page faults
    turn: Turn = field(default_factory=Turn)

    def compute(self, parts: Sequence[Part]) -> NDArray[np.float32]:
        """Compute one step.

        Returns logits (wanted rows of all parts, n_vocab), which are valid until the next step. If
        the step fails, only the checkpoints of its slots are kept.
        """
        with self.turn:
            batch = _batch(parts)
            n = len(batch.outputs)
            try:
                out = self._rows[:n] if n <= len(self._rows) else None
                logits = self.backend.run(batch, self.cache, out)
            except BaseException:
                for part in parts:
                    part.slot.fail()
                raise
            for part in parts:
                part.slot.extend(part.tokens.tolist())
            return logits

    def checked(self, ids: Sequence[int]) -> NDArray[np.int32]:
        """Token ids as an int32 array (n,).

        DesksideError for no id, for more than the context, and for ids outside the vocabulary.
        """
        if len(ids) == 0:
            raise DesksideError("the prompt is empty: give at least one token")
        if len(ids) > self.ctx:
            raise DesksideError(
                f"the prompt has {len(ids)} tokens, the context {self.ctx}; "
                "raise -c or shorten the prompt"
            )
        tokens = np.asarray(ids)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DesksideError("token ids must be a flat list of whole numbers")
        bad = (tokens < 0) | (tokens >= self.tape.n_vocab)
        if bad.any():
            raise DesksideError(
                f"token id {tokens[bad][0]} is outside the vocabulary of {self.tape.n_vocab}"
            )
        return tokens.astype(np.int32)

    def damaged(self) -> NoReturn:
        """Raise the DesksideError for NaN logits. It names a damaged tensor, if there is one."""
        for slot in self.slots:
            slot.clear()
        self.file.check_values(self.tape.weights().values())
        raise DesksideError(f"{self.file.path}: the model computed NaN; its weights may be damaged")


def _batch(parts: Sequence[Part]) -> Batch:
    if len(parts) == 1:  # the common case: one answer decodes
        (p,) = parts
        segment = Segment(p.slot.index, len(p.slot.tokens), len(p.tokens))
        return Batch(p.tokens, (segment,), p.outputs.astype(np.int32))
    starts = np.cumsum([0, *(len(p.tokens) for p in parts)])
    outputs = [p.outputs + start for p, start in zip(parts, starts, strict=False)]
    return Batch(
        np.concatenate([p.tokens for p in parts]),
        tuple(Segment(p.slot.index, len(p.slot.tokens), len(p.tokens)) for p in parts),
        np.concatenate(outputs).astype(np.int32),
    )


def load(source: str | Path | GGUF, config: EngineConfig, progress: Progress = silent) -> Loaded:
    """Load a GGUF file, given by its path or opened.

    DesksideError for a bad file, for options that cannot be met, and for a model that does not fit
    the free memory. A load that fails, or that Ctrl-C stops, keeps no memory.
    """
    try:
        file = source if isinstance(source, GGUF) else GGUF.open(source)
        return _load(file, config, progress)
    except BaseException as failure:
        drop_frames(failure)
        raise


def _load(file: GGUF, config: EngineConfig, progress: Progress) -> Loaded:
    tokenizer = Tokenizer.from_metadata(file.metadata, str(file.path))
    tape = build_tape(file)
    ctx = context(tape, config)
    launch = place(tape, config, ctx, min(config.ubatch, ctx))
    plan = launch.plan if launch.over_devices else None
    if config.mlock and launch.plan is not None:
        need_lockable(launch.plan.usage[0].held)
    if config.no_mmap or config.mlock:
        file.read_in(w for op in tape.ops if op.kind == "embed" for w in op.weights)
    check_values(file, tape)
    ubatch = min(config.ubatch, ctx) if plan is None else plan.options.ubatch
    if plan is None:
        max_outputs = ubatch
        backend, cache = _on_cpu(file, tape, config, ctx, ubatch, progress)
    else:
        max_outputs = min(ubatch, MAX_OUTPUTS)
        backend, cache = _placed(file, tape, config, plan, launch.offload, max_outputs, progress)
    if config.mlock:
        lock()
    return Loaded(
        file=file,
        config=config,
        tokenizer=tokenizer,
        tape=tape,
        backend=backend,
        cache=cache,
        slots=tuple(Slot(i, cache) for i in range(config.parallel)),
        ctx=ctx,
        ubatch=ubatch,
        max_outputs=max_outputs,
        plan=plan,
        notes=[*config.notes, *tape.notes, *launch.notes],
        offloads=plan is not None and launch.offload is not None,
        banned=tokenizer.banned(tape.n_vocab),
        _rows=np.empty((config.parallel, tape.n_vocab), np.float32),
    )


def context(tape: Tape, config: EngineConfig) -> int:
    """Context of one sequence, in tokens; DesksideError if the model's own is shorter."""
    own = tape.n_ctx_train
    ctx = min(DEFAULT_CTX, own) if config.ctx is None else config.ctx or own
    if ctx > own:
        raise DesksideError(f"-c {ctx} is more than the model's context of {own} tokens")
    return ctx


def check_values(file: GGUF, tape: Tape) -> None:
    """DesksideError if weights hold NaN or infinity.

    Checks all tensors of a small file, but only the F32 tensors of a large one: to read all would
    double its time to load. If NaN logits appear later, `Loaded.damaged` checks the rest.
    """
    weights = tape.weights()
    if sum(w.nbytes for w in weights.values()) > CHECK_BYTES:
        weights = {name: w for name, w in weights.items() if w.type.name == "F32"}
    file.check_values(weights.values())


def _host_options(config: EngineConfig) -> HostOptions:
    return HostOptions(
        config.n_threads, config.isa, config.huge_pages, config.numa, config.n_threads_batch
    )


def _cache_options(config: EngineConfig, ctx: int) -> dict[str, Any]:
    return {
        "n_slots": config.parallel,
        "n_ctx": ctx,
        "k_type": kv_type(config.ctk, "-ctk"),
        "v_type": kv_type(config.ctv, "-ctv"),
    }


def _on_cpu(
    file: GGUF, tape: Tape, config: EngineConfig, ctx: int, ubatch: int, progress: Progress
) -> tuple[Backend, Cache]:
    options = _cache_options(config, ctx)
    kv = options["k_type"], options["v_type"]
    needed = config.parallel * sum(cache_bytes(tape.states, ctx, *kv))
    free = available_memory()
    if needed > free:
        raise DesksideError(
            f"-c {ctx} needs {needed / 1e9:.1f} GB of cache, of {free / 1e9:.1f} GB free; "
            "lower -c or use -ctk q8_0 -ctv q8_0"
        )
    backend: Backend
    if config.backend == "reference":
        from deskside.backends.reference import ReferenceBackend

        backend = ReferenceBackend(file, tape)
    else:
        host = _host_options(config)
        backend = CpuBackend(file, tape, host, max_tokens=ubatch, reserve=needed, progress=progress)
    return backend, Cache(tape.states, **options)


def _placed(
    file: GGUF,
    tape: Tape,
    config: EngineConfig,
    plan: Plan,
    offload: ExpertOffload | None,
    max_outputs: int,
    progress: Progress,
) -> tuple[Backend, Cache]:
    try:
        from deskside.backends.experts.resident import ExpertCache
        from deskside.backends.experts.stream import StreamOptions
        from deskside.backends.placed import PlacedBackend, open_devices
    except ImportError:
        raise DesksideError(
            f"device {plan.used[-1]} needs torch: pip install 'deskside[gpu]'"
        ) from None
    stream = resident = None
    if offload is not None and offload.stream is not None:
        s = offload.stream
        stream = StreamOptions(
            offload.device, offload.min_tokens, s.slot_bytes, s.slots, s.host_below
        )
    if offload is not None and offload.cache_bytes:
        resident = ExpertCache(offload.device, offload.cache_bytes)
    usage = {u.device.name: u for u in plan.usage}
    backend = PlacedBackend(
        file,
        tape,
        plan.placement,
        open_devices([usage[name].device for name in plan.used if name != CPU]),
        _host_options(config),
        max_tokens=plan.options.ubatch,
        max_outputs=max_outputs,
        reserve=usage[CPU].kv + usage[CPU].recurrent,
        stream=stream,
        expert_cache=resident,
        progress=progress,
    )
    return backend, backend.new_cache(**_cache_options(config, plan.options.ctx))
