"""LLM: a model file made ready to compute logits and to generate text."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from deskside.backends import Backend
from deskside.backends.native.program import CpuBackend
from deskside.backends.reference import ReferenceBackend
from deskside.engine.config import DEFAULT_CTX, EngineConfig
from deskside.engine.placing import ExpertOffload, place
from deskside.engine.results import Chunk, Completion, Timings
from deskside.engine.sampler import Sampler, SamplingParams
from deskside.errors import DamagedLogits, DesksideError, drop_frames
from deskside.gguf import GGUF
from deskside.gguf.quants import QuantType
from deskside.lowering.scratch import MAX_OUTPUTS
from deskside.machine.devices import CPU
from deskside.machine.pages import lock, need_lockable
from deskside.machine.system import available_memory
from deskside.models import build_tape
from deskside.plan import Plan
from deskside.progress import Progress, silent
from deskside.tape import KVState
from deskside.tape.cache import Batch, Cache, Segment, cache_bytes, kv_type
from deskside.text.chat import ChatTemplate
from deskside.text.streaming import StopStrings, StreamDecoder
from deskside.text.tokenizer import Tokenizer

# Files up to this size are checked for NaN and infinity in full when they are loaded.
CHECK_BYTES = 1 << 30

__all__ = ["LLM", "Chunk", "Completion", "Timings"]


class LLM:
    """A GGUF model on this machine's CPU, or spread over it and other devices.

    llm = LLM("model.gguf", ctx=8192, threads=2, ctk="q8_0", ctv="q8_0")
    llm = LLM("model.gguf", devices=["cuda0"], cpu_moe=True)

    Options are those of `EngineConfig`. DesksideError for a bad file, a bad option, or what does
    not fit the free memory. `plan` tells where tensors are, None where all are on the CPU.
    `progress` is told of loading. One sequence at a time; not safe for threads.
    """

    def __init__(self, path: str | Path, *, progress: Progress = silent, **options: Any) -> None:
        try:
            self._load(path, progress, options)
        except BaseException as failure:  # Ctrl-C, too: a failed load keeps no memory
            self.__dict__.clear()
            drop_frames(failure)
            raise

    def _load(self, path: str | Path, progress: Progress, options: dict[str, Any]) -> None:
        unknown = sorted(options.keys() - EngineConfig.__dataclass_fields__.keys())
        if unknown:
            raise DesksideError(f"unknown option {', '.join(unknown)}")
        self.config = EngineConfig(**options)
        self.file = GGUF.open(path)
        self.tokenizer = Tokenizer.from_metadata(self.file.metadata, str(path))
        self.tape = build_tape(self.file)
        self.ctx = self._context()
        self.ubatch = min(self.config.ubatch, self.ctx)
        placing = place(self.tape, self.config, self.ctx, self.ubatch)
        self.notes = placing.notes
        self.plan = placing.plan if placing.over_devices else None
        if self.plan is not None:
            self.ubatch = self.plan.options.ubatch
        if self.config.mlock and placing.plan is not None:
            need_lockable(placing.plan.usage[0].held)
        if self.config.no_mmap or self.config.mlock:
            self.file.read_in(
                w.name for op in self.tape.ops if op.kind == "embed" for w in op.weights
            )
        self._offloads = self.plan is not None and placing.offload is not None
        self._check_values()
        k_type, v_type = kv_type(self.config.ctk, "-ctk"), kv_type(self.config.ctv, "-ctv")
        self.max_outputs = self.ubatch
        self.backend: Backend
        if self.plan is not None:
            self.backend, self.cache = self._placed(
                self.plan, placing.offload, k_type, v_type, progress
            )
        else:
            self._check_memory(k_type, v_type)
            self.backend = self._backend(k_type, v_type, progress)
            self.cache = Cache(
                self.tape.states, n_slots=1, n_ctx=self.ctx, k_type=k_type, v_type=v_type
            )
        if self.config.mlock:
            lock()
        self._cached: list[int] = []
        self._logits = np.empty((1, self.tape.n_vocab), np.float32)  # of a step with one output
        self._can_cut = all(isinstance(state, KVState) for state in self.tape.states)
        self._stream: Stream | None = None
        self._banned = self.tokenizer.banned(self.tape.n_vocab)
        self._template: ChatTemplate | None = None

    def _backend(self, k_type: QuantType, v_type: QuantType, progress: Progress) -> Backend:
        if self.config.backend != "cpu":
            return ReferenceBackend(self.file, self.tape)
        return CpuBackend(
            self.file,
            self.tape,
            n_threads=self.config.n_threads,
            max_tokens=self.ubatch,
            isa=self.config.isa,
            reserve=sum(cache_bytes(self.tape.states, self.ctx, k_type, v_type)),
            huge_pages=self.config.huge_pages,
            numa=self.config.numa,
            progress=progress,
        )

    def _placed(
        self,
        plan: Plan,
        offload: ExpertOffload | None,
        k_type: QuantType,
        v_type: QuantType,
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
        self.max_outputs = min(self.ubatch, MAX_OUTPUTS)
        stream = cache = None
        if offload is not None and offload.stream is not None:
            s = offload.stream
            stream = StreamOptions(
                offload.device, offload.min_tokens, s.slot_bytes, s.slots, s.host_below
            )
        if offload is not None and offload.cache_bytes:
            cache = ExpertCache(offload.device, offload.cache_bytes)
        usage = {u.device.name: u for u in plan.usage}
        backend = PlacedBackend(
            self.file,
            self.tape,
            plan.placement,
            open_devices([usage[name].device for name in plan.used if name != CPU]),
            n_threads=self.config.n_threads,
            max_tokens=self.ubatch,
            max_outputs=self.max_outputs,
            isa=self.config.isa,
            reserve=usage[CPU].kv + usage[CPU].recurrent,
            stream=stream,
            expert_cache=cache,
            huge_pages=self.config.huge_pages,
            numa=self.config.numa,
            progress=progress,
        )
        shape = {"n_slots": 1, "n_ctx": self.ctx}
        return backend, backend.new_cache(**shape, k_type=k_type, v_type=v_type)

    def _check_values(self) -> None:
        """Refuse NaN and infinity: in all of a small file, in the float tensors of a large one.

        Reading hundreds of gigabytes for this would double the time to load; the rest is looked at
        when a NaN comes out.
        """
        weights = self.tape.weights()
        if sum(w.nbytes for w in weights.values()) > CHECK_BYTES:
            weights = {name: w for name, w in weights.items() if w.type.name == "F32"}
        self.file.check_values(weights)

    def _context(self) -> int:
        own = self.tape.n_ctx_train
        ctx = min(DEFAULT_CTX, own) if self.config.ctx is None else self.config.ctx or own
        if ctx > own:
            raise DesksideError(f"-c {ctx} is more than the model's context of {own} tokens")
        return ctx

    def _check_memory(self, k_type: QuantType, v_type: QuantType) -> None:
        needed = sum(cache_bytes(self.tape.states, self.ctx, k_type, v_type))
        free = available_memory()
        if needed > free:
            raise DesksideError(
                f"-c {self.ctx} needs {needed / 1e9:.1f} GB of cache, of {free / 1e9:.1f} GB free; "
                "lower -c or use -ctk q8_0 -ctv q8_0"
            )

    def offload_metrics(self) -> Any:
        """`ExpertMetrics` of --stream-experts and --expert-cache; None without either."""
        backend: Any = self.backend
        return backend.expert_metrics if self._offloads else None

    @property
    def template(self) -> ChatTemplate:
        """The file's chat template; DesksideError if it has none."""
        if self._template is None:
            self._template = ChatTemplate.from_metadata(self.file.metadata, str(self.file.path))
        return self._template

    def tokenize(
        self, text: str, *, special: bool = True, add_bos: bool | None = None
    ) -> list[int]:
        """Token ids of `text`; spelled-out control tokens count as such unless special=False."""
        return self.tokenizer.encode(text, special=special, add_bos=add_bos)

    def detokenize(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def chat(self, messages: Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, ready for the assistant's turn.

        options: enable_thinking, tools and whatever else the template reads.
        """
        return self.tokenize(self.template.render(messages, **options), add_bos=False)

    def logits(
        self, ids: Sequence[int], chunks: Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Logits (len(ids), n_vocab) of a fresh sequence, at every position.

        chunks: sizes of the pieces in which the tokens are computed (default: `max_outputs` each,
        which is `ubatch` but over devices).
        """
        tokens = self._checked(ids)
        most = self.max_outputs
        if chunks is None:
            chunks = [most] * (len(tokens) // most)
            chunks += [len(tokens) % most] if len(tokens) % most else []
        if sum(chunks) != len(tokens) or not all(1 <= c <= most for c in chunks):
            raise DesksideError(
                f"chunks {list(chunks)} must be 1 to {most} each and add up to {len(tokens)}"
            )
        self._stream = None
        self.reset()
        out = np.empty((len(tokens), self.tape.n_vocab), np.float32)
        start = 0
        for n in chunks:
            out[start : start + n] = self._step(tokens[start : start + n], np.arange(n))
            start += n
        if np.isnan(out.min()):  # min gives NaN if there is one
            self._damaged()
        return out

    def logits_from(
        self, ids: Sequence[int], first: int, rows: int
    ) -> Iterator[NDArray[np.float32]]:
        """Logits of a fresh sequence at the positions from `first` on, in pieces.

        A piece is (1 to `rows`, n_vocab) and lasts until the next one is asked for; the model must
        not be used for anything else before the last one.
        """
        tokens = self._checked(ids)
        self._stream = None
        self.reset()
        start = 0
        while start < len(tokens):
            end = min(
                start + self.ubatch, max(start, first) + min(rows, self.max_outputs), len(tokens)
            )
            wanted = np.arange(max(first - start, 0), end - start)
            logits = self._step(tokens[start:end], wanted)
            start = end
            if len(wanted):
                yield logits

    def generate(
        self, prompt: str | Sequence[int], params: SamplingParams | None = None
    ) -> Completion:
        """Complete a prompt, given as text or token ids."""
        stream = self.stream(prompt, params)
        text = "".join(chunk.text for chunk in stream)
        return stream.completion(text)

    def stream(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Stream:
        """As `generate`, chunk by chunk."""
        return Stream(self, prompt, params or SamplingParams())

    def reset(self) -> None:
        """Forget the sequence in the cache."""
        self._cached = []  # first: an interruption must not leave tokens that are half cleared
        self.cache.clear(0)

    def _checked(self, ids: Sequence[int]) -> NDArray[np.int32]:
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

    def _step(self, tokens: NDArray[np.int32], outputs: NDArray[np.integer]) -> NDArray[np.float32]:
        """Compute tokens behind those in the cache; interrupted, the cache counts as empty."""
        pos = len(self._cached)
        batch = Batch(tokens, (Segment(0, pos, len(tokens)),), outputs.astype(np.int32))
        cached, self._cached = self._cached, []
        out = self._logits if len(outputs) == 1 else None
        logits = self.backend.run(batch, self.cache, out)
        cached.extend(tokens.tolist())
        self._cached = cached
        return logits

    def _damaged(self) -> NoReturn:
        """The model computed NaN: name the tensor that holds it."""
        self.reset()
        self.file.check_values(self.tape.weights())
        raise DesksideError(f"{self.file.path}: the model computed NaN; its weights may be damaged")

    def _prefill(self, tokens: NDArray[np.int32]) -> tuple[NDArray[np.float32], int]:
        """Logits of the last token, and how many tokens the cache already held.

        The cached sequence is continued where the prompt extends it. Keys and values can also be
        cut back to what both have in common; recurrent state cannot, so there any other prompt
        starts anew.
        """
        shared = min(len(self._cached), len(tokens) - 1)
        differing = np.flatnonzero(tokens[:shared] != np.array(self._cached[:shared], np.int32))
        n = int(differing[0]) if len(differing) else shared
        if n > 0 and (n == len(self._cached) or self._can_cut):
            self._cached = self._cached[:n]
        else:
            n = 0
            self.reset()
        logits = np.empty((0, 0), np.float32)
        for start in range(n, len(tokens), self.ubatch):
            piece = tokens[start : start + self.ubatch]
            last = start + len(piece) == len(tokens)
            logits = self._step(piece, np.array([len(piece) - 1] if last else [], np.int32))
        return logits[0], n


class Stream(Iterator[Chunk]):
    """Generation as an iterator. `timings` are right after every step, `stop_reason` at the end.

    A stream belongs to its model's one sequence: when another generation begins, it ends with a
    DesksideError.
    """

    def __init__(self, llm: LLM, prompt: str | Sequence[int], params: SamplingParams) -> None:
        self.llm = llm
        self._started = time.perf_counter()
        ids = llm.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        self._prompt = llm._checked(ids)
        self._params = params
        banned = llm._banned
        if params.ignore_eos:
            banned = banned.copy()
            banned[list(llm.tokenizer.stop_ids)] = True
        self._sampler = Sampler(params, llm.tape.n_vocab, banned)
        for token in ids:
            self._sampler.accept(token)
        self._decoder = StreamDecoder(llm.tokenizer)
        self._stops = StopStrings(params.stop)
        self._chunks = self._generate()
        self.tokens: list[int] = []
        self.timings = Timings()
        self.stop_reason = ""

    def __next__(self) -> Chunk:
        return next(self._chunks)

    def completion(self, text: str) -> Completion:
        return Completion(text, self.tokens, self.timings, self.stop_reason, self._sampler.seed)

    def _generate(self) -> Iterator[Chunk]:
        llm, t = self.llm, self.timings
        llm._stream = self
        began = time.perf_counter()
        logits, t.cached_tokens = llm._prefill(self._prompt)
        t.prompt_tokens = len(self._prompt) - t.cached_tokens
        t.prompt_seconds = time.perf_counter() - began

        room = llm.ctx - len(llm._cached)
        limit = self._params.max_tokens
        limit = room + 1 if limit is None or limit < 0 else min(limit, room + 1)
        first, token = 0.0, -1
        self.stop_reason = "length" if limit <= room else "context"
        for step in range(limit):
            if llm._stream is not self:
                raise DesksideError("another generation has begun on this model; this one is over")
            if step > 0:
                logits = llm._step(np.array([token], np.int32), np.array([0]))[0]
            try:
                token = self._sampler.sample(logits)
            except DamagedLogits:
                llm._damaged()
            now = time.perf_counter()
            if step == 0:
                first = now
                t.first_seconds = now - self._started
            if token in llm.tokenizer.stop_ids:
                self.stop_reason = "stop"
                break
            t.decode_seconds = now - first
            self._sampler.accept(token)
            self.tokens.append(token)
            t.generated_tokens = len(self.tokens)
            text, hit = self._stops.push(self._decoder.push(token))
            yield Chunk(token, text)
            if hit:
                self.stop_reason = "stop"
                return
        text, hit = self._stops.push(self._decoder.flush())
        if hit:
            self.stop_reason = "stop"
        else:
            text += self._stops.flush()
        if text:
            yield Chunk(None, text)
