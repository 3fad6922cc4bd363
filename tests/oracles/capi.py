"""llama.cpp and ik_llama.cpp through the C API inside their PyPI wheels.

Both wheels bring a ggml of their own under the same symbol names, so only one may be loaded per
process: use these classes through `remote.Remote`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import struct
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


class _Engine:
    """What the two libraries share. A subclass loads the library, the model and a context."""

    lib: Any
    ctx: Any
    model: Any
    vocab: Any
    n_vocab: int
    n_past: int = 0
    last: int = -1  # row of the newest token's logits in the last batch

    def _clear(self) -> None:
        raise NotImplementedError

    def _feed(self, ids: Sequence[int], all_logits: bool) -> None:
        """Appends ids to the sequence; logits for all of them or for the last."""
        n = len(ids)
        batch = self.lib.llama_batch_init(n, 0, 1)
        try:
            batch.n_tokens = n
            for i, token in enumerate(ids):
                batch.token[i] = token
                batch.pos[i] = self.n_past + i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = all_logits or i == n - 1
            status = self.lib.llama_decode(self.ctx, batch)
        finally:
            self.lib.llama_batch_free(batch)
        if status != 0:
            raise RuntimeError(f"llama_decode returned {status}")
        self.n_past += n
        self.last = n - 1

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
        out = [int(self._row(self.last).argmax())]
        while len(out) < n:
            self._feed(out[-1:], all_logits=False)
            out.append(int(self._row(self.last).argmax()))
        return out

    def prefill(self, ids: Sequence[int]) -> float:
        """Seconds to take in a fresh sequence, logits of its last token included."""
        self._clear()
        start = time.perf_counter()
        self._feed(ids, all_logits=False)
        return time.perf_counter() - start

    def timed(self, ids: Sequence[int], n: int) -> tuple[float, float]:
        """Seconds to take in ids, and for n greedy steps behind them."""
        prefill = self.prefill(ids)
        start = time.perf_counter()
        for _ in range(n):
            self._feed([int(self._row(self.last).argmax())], all_logits=False)
        return prefill, time.perf_counter() - start

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


class _Params(ctypes.Structure):
    """A parameter struct passed by value whose later fields we leave as the library set them.

    Larger than the library's own: a struct of this size travels on the stack, and the callee reads
    only the bytes that it knows.
    """

    _fields_ = [("raw", ctypes.c_uint8 * 512)]

    def ints(self, offset: int, n: int) -> tuple[int, ...]:
        return struct.unpack_from(f"<{n}I", bytes(self.raw), offset)

    def set_int(self, offset: int, value: int) -> None:
        struct.pack_into("<I", self.raw, offset, value)


class _Batch(ctypes.Structure):
    _fields_ = [
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.POINTER(ctypes.c_float)),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.POINTER(ctypes.c_int32)),
        ("seq_id", ctypes.POINTER(ctypes.POINTER(ctypes.c_int32))),
        ("logits", ctypes.POINTER(ctypes.c_int8)),
    ]


class LlamaCpp(_Engine):
    """llama.cpp in the wheel `xllamacpp`, at its defaults: repacking, flash attention on auto."""

    def __init__(self, path: str, n_ctx: int = 2048, threads: int = 2, ubatch: int = 512) -> None:
        spec = importlib.util.find_spec("xllamacpp")
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError("xllamacpp")
        self.lib = lib = ctypes.CDLL(str(next(Path(spec.origin).parent.glob("xllamacpp*.so"))))
        p, i32 = ctypes.c_void_p, ctypes.c_int32
        for name, result, arguments in (
            ("llama_model_default_params", _Params, []),
            ("llama_context_default_params", _Params, []),
            ("llama_model_load_from_file", p, [ctypes.c_char_p, _Params]),
            ("llama_init_from_model", p, [p, _Params]),
            ("llama_model_get_vocab", p, [p]),
            ("llama_vocab_n_tokens", i32, [p]),
            ("llama_set_n_threads", None, [p, i32, i32]),
            ("llama_get_memory", p, [p]),
            ("llama_memory_clear", None, [p, ctypes.c_bool]),
            ("llama_batch_init", _Batch, [i32, i32, i32]),
            ("llama_batch_free", None, [_Batch]),
            ("llama_decode", i32, [p, _Batch]),
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
        self.model = lib.llama_model_load_from_file(path.encode(), lib.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        params = lib.llama_context_default_params()
        # llama_context_params begins with n_ctx, n_batch, n_ubatch, n_seq_max; its defaults tell
        # whether that still holds in the installed version
        if params.ints(0, 4) != (512, 2048, 512, 1):
            raise RuntimeError(f"unknown llama_context_params layout: {params.ints(0, 4)}")
        for offset, value in ((0, n_ctx), (4, n_ctx), (8, ubatch)):
            params.set_int(offset, value)
        self.ctx = lib.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError(f"llama.cpp cannot make a context for {path}")
        lib.llama_set_n_threads(self.ctx, threads, threads)
        self.memory = lib.llama_get_memory(self.ctx)
        self.vocab = lib.llama_model_get_vocab(self.model)
        self.n_vocab = lib.llama_vocab_n_tokens(self.vocab)

    def _clear(self) -> None:
        self.lib.llama_memory_clear(self.memory, True)
        self.n_past = 0

    def _tokenize(self, data: bytes, buffer: Any, room: int) -> int:
        n: int = self.lib.llama_tokenize(self.vocab, data, len(data), buffer, room, False, True)
        return n


class IkLlama(_Engine):
    """ik_llama.cpp in the wheel `ik-llama-cpp-python`, flash attention on.

    repack: interleave rows at load (its -rtr), which takes a copy of the model.
    """

    def __init__(
        self,
        path: str,
        n_ctx: int = 2048,
        threads: int = 2,
        ubatch: int = 512,
        repack: bool = False,
    ) -> None:
        from ik_llama_cpp import _ctypes_api as api

        self.lib = api._lib
        api.llama_backend_init()
        model_params = api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_mmap = not repack
        model_params.repack_tensors = repack
        self.model = api.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise RuntimeError(f"ik_llama.cpp cannot load {path}")
        params = api.llama_context_default_params()
        params.n_ctx = params.n_batch = n_ctx
        params.n_ubatch = ubatch
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn = True
        self.ctx = api.llama_init_from_model(self.model, params)
        if not self.ctx:
            raise RuntimeError(f"ik_llama.cpp cannot make a context for {path}")
        self.vocab = api.llama_model_get_vocab(self.model)
        self.n_vocab = api.llama_vocab_n_tokens(self.vocab)

    def _clear(self) -> None:
        self.lib.llama_kv_cache_clear(self.ctx)
        self.n_past = 0

    def _tokenize(self, data: bytes, buffer: Any, room: int) -> int:
        n: int = self.lib.llama_tokenize(self.model, data, len(data), buffer, room, False, True)
        return n
