"""`LLM` loads a model file, computes logits and generates text."""

from __future__ import annotations

import time
from collections import abc
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.engine.config import EngineConfig
from deskside.engine.load import Part, load
from deskside.engine.results import Chunk, Completion, Timings
from deskside.engine.sampler import SamplingParams
from deskside.engine.scheduler import accept, schedule
from deskside.engine.sequence import Sequence
from deskside.engine.slots import Slot
from deskside.errors import DamagedLogits, DesksideError
from deskside.gguf import GGUF
from deskside.progress import Progress, silent
from deskside.text.chat import ChatTemplate
from deskside.text.prompt import Prompt, chat_prompt

__all__ = ["LLM", "Stream"]


class LLM:
    """A GGUF model on this machine's CPU, or spread over the CPU and GPUs.

    llm = LLM("model.gguf", ctx=8192, threads=2, ctk="q8_0", ctv="q8_0")
    llm = LLM("model.gguf", devices=["cuda0"], cpu_moe=True)

    options: fields of `EngineConfig`. progress: called while the file is loaded.
    DesksideError for a bad file, for a bad option, and for a model that does not fit the free
    memory.

    plan: where the tensors are; None if all are on the CPU. notes: lines to show to the user.

    Up to `parallel` sequences run at once, each in a slot. One more ends the oldest. Threads may
    share an LLM, and their steps take turns. A stream belongs to one thread.
    """

    def __init__(
        self, path: str | Path | GGUF, *, progress: Progress = silent, **options: Any
    ) -> None:
        unknown = sorted(options.keys() - EngineConfig.__dataclass_fields__.keys())
        if unknown:
            raise DesksideError(f"unknown option {', '.join(unknown)}")
        self.loaded = loaded = load(path, EngineConfig(**options), progress)
        self.config, self.file, self.tokenizer = loaded.config, loaded.file, loaded.tokenizer
        self.tape, self.backend, self.cache = loaded.tape, loaded.backend, loaded.cache
        self.ctx, self.ubatch, self.max_outputs = loaded.ctx, loaded.ubatch, loaded.max_outputs
        self.plan, self.notes = loaded.plan, loaded.notes
        self._owners: dict[int, Sequence | _Raw] = {}  # by slot index, the oldest first

    def step(self, sequences: abc.Sequence[Sequence]) -> list[tuple[Sequence, Chunk]]:
        """Run the model once for the sequences that are not done. Returns the text now final.

        Decoding sequences get one token each. Prompts are computed in pieces, up to `ubatch` tokens
        a step. `Sequence.end` may end a sequence between two steps. DesksideError for more than
        `parallel` sequences, or for one whose slot was taken by another.
        """
        with self.loaded.turn:
            living = [s for s in sequences if not s.done]
            if len(living) > len(self.loaded.slots):
                raise DesksideError(
                    f"{len(living)} sequences at once: the model has {len(self.loaded.slots)} "
                    "slots; raise parallel"
                )
            for sequence in living:
                self._seat(sequence, living)
            parts = schedule(living, self.ubatch, self.max_outputs)
            if not parts:
                return []
            try:
                logits = self.loaded.compute([part for _, part in parts])
            except BaseException:
                for sequence, _ in parts:  # their slots hold only checkpoints now
                    sequence.end("failed")
                raise
            try:
                return accept(parts, logits)
            except DamagedLogits:
                self.loaded.damaged()

    def begin(self, prompt: str | abc.Sequence[int] | Prompt, params: SamplingParams) -> Sequence:
        """Make a sequence for `step`, which also gives it a slot.

        prompt: text, token ids, or the result of `prompt`. DesksideError for a prompt that is empty
        or longer than the context.
        """
        began = time.perf_counter()
        if isinstance(prompt, str):
            prompt = self.tokenize(prompt)
        if not isinstance(prompt, Prompt):
            prompt = Prompt(prompt)
        loaded = self.loaded
        return Sequence(
            loaded.checked(prompt.tokens),
            params,
            loaded.tokenizer,
            ctx=loaded.ctx,
            banned=loaded.banned,
            marks=prompt.marks,
            began=began,
        )

    def _seat(self, sequence: Sequence, beside: abc.Sequence[Sequence]) -> None:
        """Give a sequence the free slot that holds most of its prompt.

        If none is free, take the slot of the oldest sequence that is not in this step.
        """
        if sequence.slot is not None:
            self._check(sequence, sequence.slot)
            return
        taken = {i for i, owner in self._owners.items() if not owner.done}
        free = [slot for slot in self.loaded.slots if slot.index not in taken]
        prompt = sequence.prompt.tolist()
        others = (i for i, o in self._owners.items() if not any(o is s for s in beside))
        slot = max(free, key=lambda s: s.shared(prompt), default=None)
        slot = slot or self.loaded.slots[next(others)]
        self._own(slot, sequence)
        sequence.start(slot)

    def _own(self, slot: Slot, owner: Sequence | _Raw) -> None:
        self._owners.pop(slot.index, None)
        self._owners[slot.index] = owner

    def _check(self, owner: Sequence | _Raw, slot: Slot) -> None:
        if self._owners.get(slot.index) is not owner:
            raise DesksideError(
                "this generation is over: another one took its slot, or the model was reset"
            )

    def generate(
        self, prompt: str | abc.Sequence[int] | Prompt, params: SamplingParams | None = None
    ) -> Completion:
        """Complete a prompt: text, token ids, or the result of `prompt`. params: None = defaults.

        DesksideError for a bad prompt, or if the weights are damaged.
        """
        stream = self.stream(prompt, params)
        text = "".join(chunk.text for chunk in stream)
        return stream.completion(text)

    def stream(
        self, prompt: str | abc.Sequence[int] | Prompt, params: SamplingParams | None = None
    ) -> Stream:
        """As `generate`, but returns an iterator of chunks."""
        return Stream(self, self.begin(prompt, params or SamplingParams()))

    def logits(
        self, ids: abc.Sequence[int], chunks: abc.Sequence[int] | None = None
    ) -> NDArray[np.float32]:
        """Logits (len(ids), n_vocab) at every position, for token ids without a context before.

        chunks: numbers of tokens to compute at once, each at most `max_outputs`, which is also the
        default. On the CPU alone, `max_outputs` is `ubatch`; with other devices it may be less.
        """
        tokens, largest = self.loaded.checked(ids), self.max_outputs
        if chunks is None:
            chunks = [largest] * (len(tokens) // largest)
            chunks += [len(tokens) % largest] if len(tokens) % largest else []
        if sum(chunks) != len(tokens) or not all(1 <= c <= largest for c in chunks):
            raise DesksideError(
                f"chunks {list(chunks)} must be 1 to {largest} each and add up to {len(tokens)}"
            )
        out = np.empty((len(tokens), self.tape.n_vocab), np.float32)
        raw, start = self._raw(), 0
        for n in chunks:
            out[start : start + n] = raw.compute(tokens[start : start + n], np.arange(n))
            start += n
        raw.done = True
        if np.isnan(out.min()):  # min returns NaN if there is one
            self.loaded.damaged()
        return out

    def logits_from(
        self, ids: abc.Sequence[int], first: int, rows: int
    ) -> Iterator[NDArray[np.float32]]:
        """Logits at the positions from `first` on, in pieces, for ids without a context before.

        Yields pieces (1 to `rows`, n_vocab). A piece is valid until the next one. Until the last
        piece, do not use the model for anything else.
        """
        tokens = self.loaded.checked(ids)
        raw, start = self._raw(), 0
        while start < len(tokens):
            end = min(
                start + self.ubatch, max(start, first) + min(rows, self.max_outputs), len(tokens)
            )
            wanted = np.arange(max(first - start, 0), end - start)
            logits = raw.compute(tokens[start:end], wanted)
            start = end
            if len(wanted):
                yield logits
        raw.done = True

    def _raw(self) -> _Raw:
        """Take and empty the first slot. This ends a sequence in it."""
        with self.loaded.turn:
            slot = self.loaded.slots[0]
            raw = _Raw(self, slot)
            self._own(slot, raw)
            slot.clear()
            return raw

    def reset(self) -> None:
        """Forget all sequences. This also ends those that are not done."""
        with self.loaded.turn:
            self._owners.clear()
            for slot in self.loaded.slots:
                slot.clear()

    def offload_metrics(self) -> Any:
        """`ExpertMetrics` of `stream_experts` and `expert_cache`; None if neither is used."""
        backend: Any = self.backend
        return backend.expert_metrics if self.loaded.offloads else None

    @cached_property
    def template(self) -> ChatTemplate:
        """The file's chat template; DesksideError if the file has none."""
        return ChatTemplate.from_metadata(self.file.metadata, str(self.file.path))

    def tokenize(
        self, text: str, *, special: bool = True, add_bos: bool | None = None
    ) -> list[int]:
        """Token ids of `text`.

        special: whether the name of a control token in the text becomes that token.
        add_bos: whether to begin with the BOS token; None = as the file says.
        """
        return self.tokenizer.encode(text, special=special, add_bos=add_bos)

    def detokenize(self, ids: abc.Sequence[int]) -> str:
        """The text of token ids."""
        return self.tokenizer.decode(ids)

    def chat(self, messages: abc.Sequence[dict[str, Any]], **options: Any) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's answer.

        messages: dicts such as {"role": "user", "content": "…"}.
        options: enable_thinking, tools and whatever else the template reads.
        """
        return list(self.prompt(messages, **options).tokens)

    def prompt(self, messages: abc.Sequence[dict[str, Any]], **options: Any) -> Prompt:
        """As `chat`, but for `stream`: with marks, so that the next turn reuses the cache."""
        text = self.template.render(messages, **options)
        prompt = chat_prompt(self.tokenizer, text)
        with self.loaded.turn:
            slot = max(self.loaded.slots, key=lambda s: s.shared(prompt.tokens))
            held = list(slot.tokens)
        return chat_prompt(self.tokenizer, text, held) if held else prompt


class _Raw:
    """A slot that computes logits without a sequence."""

    def __init__(self, llm: LLM, slot: Slot) -> None:
        self.done = False
        self._llm = llm
        self._slot = slot

    def compute(
        self, tokens: NDArray[np.int32], outputs: NDArray[np.integer]
    ) -> NDArray[np.float32]:
        """Append tokens (n,) to the slot. Returns logits (len(outputs), n_vocab) of these rows."""
        with self._llm.loaded.turn:
            self._llm._check(self, self._slot)
            return self._llm.loaded.compute([Part(self._slot, tokens, outputs)])


class Stream(Iterator[Chunk]):
    """An iterator over the chunks of an answer.

    `timings` are up to date after each chunk. `stop_reason` is "" until the end. The first chunk
    takes a slot of the model. If another stream takes that slot, the next chunk is a DesksideError.
    """

    def __init__(self, llm: LLM, sequence: Sequence) -> None:
        self.llm = llm
        self._sequence = sequence
        self._ready: list[Chunk] = []

    def __next__(self) -> Chunk:
        while not self._ready:
            if self._sequence.done:
                raise StopIteration
            self._ready = [chunk for _, chunk in self.llm.step([self._sequence])]
        return self._ready.pop(0)

    @property
    def tokens(self) -> list[int]:
        return self._sequence.tokens

    @property
    def timings(self) -> Timings:
        return self._sequence.timings

    @property
    def stop_reason(self) -> str:
        return self._sequence.stop_reason

    def completion(self, text: str) -> Completion:
        """The result so far, whose chunks joined are `text`."""
        return self._sequence.completion(text)
