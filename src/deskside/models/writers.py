"""What other writers of GGUF files do differently: names, and tensors that text does not need.

The rule: strict about what is computed, lenient about the rest.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator

import numpy as np

from deskside.errors import DesksideError
from deskside.gguf import GGUF

# How the end of a name is spelled elsewhere: by llama.cpp of another time, or by Ollama.
_SPELLINGS = {
    "ssm_dt.bias": ("ssm_dt", "ssm_dt.weight"),
    "ssm_a": ("ssm_a.weight",),
    "ssm_conv1d.weight": ("ssm_conv1d",),
    "post_attention_norm.weight": ("attn_post_norm.weight", "ffn_norm.weight"),
    "attn_output.weight": ("attn_out.weight",),
}

# Tensors of parts that are not run, by what a file's name begins with or ends in.
_PARTS = (
    ("vision", r"(v|mm|visual|vision\w*|model\.visual)\."),
    ("audio", r"(a|audio\w*)\."),
    ("multi-token prediction", r"mtp\.|nextn\.|blk\.\d+\.nextn\."),
    ("scales of activations", r".*\.input_scale$"),
)
_SCALE = re.compile(r".*[._]scale$")

# Metadata that would change what is computed, and the values that change nothing.
_PLAIN: dict[str, tuple[object, ...]] = {
    "expert_gating_func": (1,),  # softmax
    "norm_top_k_prob": (True,),
    "expert_weights_norm": (True,),
    "expert_weights_scale": (0.0, 1.0),
    "expert_group_count": (0, 1),
    "ssm.v_head_reordered": (True,),  # Ollama's: value heads are tiled
    "attention.causal": (True,),
    "attn_logit_softcapping": (0.0,),
    "final_logit_softcapping": (0.0,),
    "logit_scale": (0.0, 1.0),
    "residual_scale": (0.0, 1.0),
    "embedding_scale": (0.0, 1.0),
    "rope.scale_linear": (1.0,),
    "rope.scaling.attn_factor": (1.0,),
}


def spellings(name: str) -> Iterator[str]:
    """A tensor's name, and others that it goes by."""
    yield name
    block = re.match(r"blk\.\d+\.", name)
    start = block[0] if block else ""
    for other in _SPELLINGS.get(name.removeprefix(start), ()):
        yield start + other


def check_metadata(file: GGUF, arch: str) -> None:
    """DesksideError for metadata that asks for another computation than deskside's."""
    for key, allowed in _PLAIN.items():
        value = file.get(f"{arch}.{key}")
        if value is not None and value not in allowed:
            raise DesksideError(
                f"{file.path}: metadata key {arch}.{key} is {value!r:.40}; "
                f"deskside runs such models with {allowed[-1]!r} only"
            )
    kind = file.get(f"{arch}.rope.scaling.type", "none")
    factor = file.get(f"{arch}.rope.scaling.factor", 1.0)
    if kind != "none" and not (kind in ("linear", "yarn") and factor in (0.0, 1.0)):
        raise DesksideError(
            f"{file.path}: metadata key {arch}.rope.scaling.type is {kind!r:.40} with factor "
            f"{factor!r:.20}; only unscaled rope is known"
        )


def left_out(file: GGUF, arch: str, used: Iterable[str], n_layers: int) -> tuple[str, ...]:
    """A note that counts the tensors of parts that are not run, if there are any.

    DesksideError for a tensor that is neither used nor known to be of such a part: a model that
    ignores some weights writes fluent nonsense.
    """
    unread = sorted((file.tensors.keys() | file.unusable.keys()) - set(used))
    parts = {name: _part(file, name, n_layers) for name in unread}
    strange = [name for name, part in parts.items() if part is None]
    if strange:
        raise DesksideError(
            f"{file.path}: tensor {strange[0]} (and {len(strange) - 1} more) has no place in "
            f"architecture {arch}; the file needs an engine that knows it"
        )
    if not parts:
        return ()
    counted = Counter(map(str, parts.values()))
    listed = ", ".join(f"{part} ({n})" for part, n in counted.items())
    return (f"left out tensors that text does not need: {listed}",)


def _part(file: GGUF, name: str, n_layers: int) -> str | None:
    """The part that a tensor belongs to; None if it may be part of what is computed."""
    block = re.match(r"blk\.(\d+)\.", name)
    if block and int(block[1]) >= n_layers:
        return "multi-token prediction"
    for part, pattern in _PARTS:
        if re.match(pattern, name):
            return part
    return "scales of 1" if _SCALE.fullmatch(name) and _is_one(file, name) else None


def _is_one(file: GGUF, name: str) -> bool:
    """Whether a tensor holds ones alone, so that it scales nothing."""
    info = file.tensors.get(name)
    return info is not None and info.nbytes < 1 << 20 and bool(np.all(file.dequantized(info) == 1))
