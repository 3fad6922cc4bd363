"""The two other engines, each in a process of its own.

Both give `logits(ids)`, float32 (n_tokens, n_vocab), `greedy(ids, n)`, `tokenize(text)`; see
`capi.py`. One thread: their spinning barriers are slow on a shared machine, and these files small.
"""

from __future__ import annotations

from pathlib import Path

from . import need
from .remote import Remote

_CAPI = Path(__file__).with_name("capi.py")


def llama_cpp(gguf: Path, *, n_ctx: int = 2048, ubatch: int = 512) -> Remote:
    """llama.cpp (wheel xllamacpp)."""
    need.packages("xllamacpp")
    return Remote(_CAPI, "LlamaCpp", str(gguf), n_ctx=n_ctx, threads=1, ubatch=ubatch)


def ik_llama(gguf: Path, *, n_ctx: int = 2048, ubatch: int = 512) -> Remote:
    """ik_llama.cpp (wheel ik-llama-cpp-python). Refuses files with MTP tensors."""
    need.packages("ik_llama_cpp")
    return Remote(_CAPI, "IkLlama", str(gguf), n_ctx=n_ctx, threads=1, ubatch=ubatch)
