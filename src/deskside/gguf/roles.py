"""The role of a tensor, from its name. No other file reads roles from names.

The names are those of GGUF (`MODEL_TENSOR` in llama.cpp's gguf-py/gguf/constants.py).
"""

from __future__ import annotations

import re
from enum import StrEnum
from functools import cache


class Role(StrEnum):
    """What a tensor is for. The values are shown to users."""

    EMBEDDING = "embedding"
    HEAD = "head"
    NORM = "norm"  # or factors of rope
    FFN_NORM = "norm before the feed-forward block"
    ROUTER = "router"
    EXPERTS = "routed experts"
    SHARED = "shared expert"
    FFN = "feed-forward"
    DELTA = "delta net"
    ATTENTION = "attention"
    OTHER = "other"


# The first pattern that matches a name without its layer decides.
_NAMES = (
    (r"token_embd\b", Role.EMBEDDING),
    (r"output\b", Role.HEAD),
    (r"(ffn|post_attention)_norm\b", Role.FFN_NORM),
    (r"(output|attn|attn_q|attn_k)_norm\b|rope_freqs\b", Role.NORM),
    (r"ffn_(gate|up|down|gate_up)_(ch)?exps\b", Role.EXPERTS),
    (r"ffn_(gate|up|down|gate_inp)_shexp\b", Role.SHARED),
    (r"ffn_gate_inp\b", Role.ROUTER),
    (r"ffn_(gate|up|down)\b", Role.FFN),
    (r"ssm_|attn_(qkv|gate)\b", Role.DELTA),
    (r"attn_", Role.ATTENTION),
)


_LAYER = re.compile(r"^blk\.(\d+)\.")


def bare_name(name: str) -> str:
    """The name without its layer."""
    return _LAYER.sub("", name)


def layer(name: str) -> int | None:
    """The number of the tensor's layer, if it has one."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


@cache
def role(name: str) -> Role:
    """The role of a tensor, named with or without its layer. OTHER for an unknown name."""
    bare = bare_name(name)
    return next((found for pattern, found in _NAMES if re.match(pattern, bare)), Role.OTHER)
