"""llama.cpp and ik_llama.cpp through the C API inside their PyPI wheels, or of another build.

Both bring a ggml of their own under the same symbol names, so only one may be loaded per process:
use these classes through `remote.Remote`. Nothing but NumPy and the peer's wheel is needed, so the
process may run under another interpreter than deskside's.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from capi_structs import Batch, ContextParams, ModelParams, check_layout

GGML_TYPES = {"f32": 0, "f16": 1, "q8_0": 8}
FLASH_ATTENTION_ON = 1  # llama_flash_attn_type


class _Engine:
    """What the two libraries share. A subclass loads the library and the model.

    Beside what the tests ask for there is the interface of `tools/compare/engine.py`: contexts, and
    methods that return seconds.
    """

    said: str  # the engine's name
    lib: Any
    threads: int
    model: Any
    vocab: Any
    n_vocab: int
    ctx: Any
    load_seconds: float = 0.0
    _lengths: list[int]  # tokens of each sequence
    _last: int = -1  # row of sequence 0's newest logits in the last batch

    def __init__(self) -> None:
        self._contexts: dict[str, tuple[Any, list[int]]] = {}

    def open(
        self, name: str, n_ctx: int, kv: str = "f16", ubatch: int = 512, n_seq: int = 1
    ) -> None:
        """Makes a context of n_ctx tokens, those of all sequences together, and uses it."""
        ctx = self._context(n_ctx, kv, ubatch, n_seq)
        if not ctx:
            raise RuntimeError(f"no context of {n_ctx} tokens, {kv} KV, {n_seq} sequences")
        self._contexts[name] = (ctx, [0] * n_seq)
        self.use(name)

    def use(self, name: str) -> None:
        """The following calls work on this context, as it was left."""
        self.ctx, self._lengths = self._contexts[name]

    def drop(self) -> None:
        """Frees all contexts."""
        for ctx, _ in self._contexts.values():
            self.lib.llama_free(ctx)
        self._contexts.clear()

    def _begin(self, api: Any, path: str, n_ctx: int, ubatch: int) -> None:
        """The vocabulary of the loaded `model`, and a first context."""
        if not self.model:
            raise RuntimeError(f"{self.said} cannot load {path}")
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)
        self.open("", n_ctx, ubatch=ubatch)

    def _set(self, params: Any, n_ctx: int, kv: str, ubatch: int, n_seq: int) -> None:
        """The context parameters that both libraries call alike."""
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = ubatch
        params.n_seq_max = n_seq
        params.n_threads = params.n_threads_batch = self.threads
        params.type_k = params.type_v = GGML_TYPES[kv]

    def _context(self, n_ctx: int, kv: str, ubatch: int, n_seq: int) -> Any:
        raise NotImplementedError

    def _clear(self) -> None:
        """Forgets all sequences."""
        raise NotImplementedError

    def _fill(self, ids: Sequence[int], seqs: Sequence[int], wanted: Sequence[bool]) -> Any:
        """A batch that appends each token to its sequence; free it with `_decode`."""
        batch = self.lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for i, (token, seq) in enumerate(zip(ids, seqs, strict=True)):
            batch.token[i] = token
            batch.pos[i] = self._lengths[seq]
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = seq
            batch.logits[i] = wanted[i]
            self._lengths[seq] += 1
        return batch

    def _decode(self, batch: Any) -> None:
        try:
            status = self.lib.llama_decode(self.ctx, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")

    def _feed(self, ids: Sequence[int], all_logits: bool) -> None:
        """Appends ids to sequence 0; logits for all of them or for the last."""
        n = len(ids)
        self._decode(self._fill(ids, [0] * n, [all_logits or i == n - 1 for i in range(n)]))
        self._last = n - 1

    def _row(self, i: int) -> np.ndarray:
        pointer = self.lib.llama_get_logits_ith(self.ctx, i)
        if not pointer:
            raise RuntimeError(f"no logits for position {i}")
        return np.ctypeslib.as_array(pointer, shape=(self.n_vocab,))

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        """float32 (n_tokens, n_vocab) of a fresh sequence, fed as one batch."""
        self._clear()
        self._feed(ids, all_logits=True)
        return np.stack([self._row(i) for i in range(len(ids))])

    def greedy(self, ids: Sequence[int], n: int) -> list[int]:
        """The n most likely tokens after ids, each given the ones before."""
        self.prefill(ids)
        out = [int(self._row(self._last).argmax())]
        while len(out) < n:
            self._feed(out[-1:], all_logits=False)
            out.append(int(self._row(self._last).argmax()))
        return out

    def loaded(self) -> float:
        """Seconds that loading the model took, the library's start included."""
        return self.load_seconds

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds to take in a fresh sequence, logits of its last token included."""
        self._clear()
        n = len(ids)
        batch = self._fill(ids, [0] * n, [i == n - 1 for i in range(n)])
        start = time.perf_counter()
        self._decode(batch)
        self._last = n - 1
        self._row(self._last)
        return time.perf_counter() - start

    def decode(self, ids: Sequence[int]) -> float:
        """Seconds for one step a token: the best next token is found, ids[i] is taken instead.

        Given tokens make all engines read the same experts.
        """
        start = time.perf_counter()
        for token in ids:
            self._feed([token], all_logits=False)
            self._row(self._last).argmax()
        return time.perf_counter() - start

    def begin(self, prompts: Sequence[Sequence[int]]) -> None:
        """Fresh sequences, one a prompt."""
        self._clear()
        for seq, ids in enumerate(prompts):
            n = len(ids)
            self._decode(self._fill(ids, [seq] * n, [i == n - 1 for i in range(n)]))

    def step_all(self, steps: Sequence[Sequence[int]]) -> float:
        """Seconds for steps that append one given token to every sequence, as `decode`."""
        n = len(steps[0])
        start = time.perf_counter()
        for ids in steps:
            self._decode(self._fill(ids, range(n), [True] * n))
            for i in range(n):
                self._row(i).argmax()
        return time.perf_counter() - start

    def tokenize(self, text: str) -> list[int]:
        """Token ids; control tokens in the text are recognised, none are added."""
        data = text.encode()
        room = len(data) + 8
        buffer = (ctypes.c_int32 * room)()
        n = self._tokenize(data, buffer, room)
        if n < 0:
            raise RuntimeError("llama_tokenize failed")
        return list(buffer[:n])

    def _tokenize(self, data: bytes, buffer: Any, room: int) -> int:
        raise NotImplementedError

    def info(self) -> dict[str, Any]:
        """What the library says about itself: its compiled instruction sets."""
        self.lib.llama_print_system_info.restype = ctypes.c_char_p
        return {
            "system": self.lib.llama_print_system_info().decode().strip(),
            "n_vocab": self.n_vocab,
        }


class LlamaCpp(_Engine):
    """llama.cpp at its defaults, repacking among them; flash attention on where KV is quantised.

    library: a libllama.so; that of the wheel `xllamacpp` by default.
    """

    said = "llama.cpp"

    def __init__(
        self,
        path: str,
        n_ctx: int = 2048,
        threads: int = 2,
        ubatch: int = 512,
        library: str | None = None,
    ) -> None:
        super().__init__()
        start = time.perf_counter()
        self.threads = threads
        self.lib = lib = ctypes.CDLL(library or _wheel_library("xllamacpp", "xllamacpp*.so"))
        p, i32 = ctypes.c_void_p, ctypes.c_int32
        for name, result, arguments in (
            ("llama_model_default_params", ModelParams, []),
            ("llama_context_default_params", ContextParams, []),
            ("llama_model_load_from_file", p, [ctypes.c_char_p, ModelParams]),
            ("llama_init_from_model", p, [p, ContextParams]),
            ("llama_free", None, [p]),
            ("llama_model_get_vocab", p, [p]),
            ("llama_vocab_n_tokens", i32, [p]),
            ("llama_get_memory", p, [p]),
            ("llama_memory_clear", None, [p, ctypes.c_bool]),
            ("llama_batch_init", Batch, [i32, i32, i32]),
            ("llama_batch_free", None, [Batch]),
            ("llama_decode", i32, [p, Batch]),
            ("llama_get_logits_ith", ctypes.POINTER(ctypes.c_float), [p, i32]),
            (
                "llama_tokenize",
                i32,
                [p, ctypes.c_char_p, i32, ctypes.POINTER(i32), i32, ctypes.c_bool, ctypes.c_bool],
            ),
        ):
            function = getattr(lib, name)
            function.restype, function.argtypes = result, arguments
        lib.llama_backend_init()
        params = lib.llama_model_default_params()
        check_layout(params, lib.llama_context_default_params())
        self.model = lib.llama_model_load_from_file(path.encode(), params)
        self._begin(lib, path, n_ctx, ubatch)
        self.load_seconds = time.perf_counter() - start

    def _context(self, n_ctx: int, kv: str, ubatch: int, n_seq: int) -> Any:
        params = self.lib.llama_context_default_params()
        self._set(params, n_ctx, kv, ubatch, n_seq)
        if kv == "q8_0":
            params.flash_attn_type = FLASH_ATTENTION_ON
        return self.lib.llama_init_from_model(self.model, params)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.lib.llama_get_memory(self.ctx), True)
        self._lengths[:] = [0] * len(self._lengths)

    def _tokenize(self, data: bytes, buffer: Any, room: int) -> int:
        n: int = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, room, False, True)
        return n


class IkLlama(_Engine):
    """ik_llama.cpp at its defaults: flash attention (for one sequence), fused MoE, graph reuse.

    repack: interleave rows at load (its -rtr), which takes a copy of the model. library: a
    libllama.so; that of the wheel `ik-llama-cpp-python` by default. The wheel has the structs.
    """

    said = "ik_llama.cpp"

    def __init__(
        self,
        path: str,
        n_ctx: int = 2048,
        threads: int = 2,
        ubatch: int = 512,
        repack: bool = False,
        library: str | None = None,
    ) -> None:
        super().__init__()
        start = time.perf_counter()
        if library:
            os.environ["IK_LLAMA_CPP_LIB_PATH"] = library
        from ik_llama_cpp import _ctypes_api as api

        self.api, self.threads = api, threads
        self.lib = api._lib
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_mmap = not repack
        model_params.repack_tensors = repack
        self.model = api.llama_model_load_from_file(path.encode(), model_params)
        self._begin(api, path, n_ctx, ubatch)
        self.load_seconds = time.perf_counter() - start

    def _context(self, n_ctx: int, kv: str, ubatch: int, n_seq: int) -> Any:
        params = self.api.llama_context_default_params()
        self._set(params, n_ctx, kv, ubatch, n_seq)
        params.fused_moe_up_gate = params.fused_up_gate = True
        # with several sequences of a recurrent model its flash attention fails an assertion (0.1.5)
        params.flash_attn = n_seq == 1
        return self.api.llama_init_from_model(self.model, params)

    def _clear(self) -> None:
        self.lib.llama_kv_cache_clear(self.ctx)
        self._lengths[:] = [0] * len(self._lengths)

    def _tokenize(self, data: bytes, buffer: Any, room: int) -> int:
        n: int = self.lib.llama_tokenize(self.model, data, len(data), buffer, room, False, True)
        return n


def _wheel_library(package: str, pattern: str) -> str:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(package)
    return str(next(Path(spec.origin).parent.glob(pattern)))
