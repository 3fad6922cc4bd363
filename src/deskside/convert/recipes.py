"""What `quantize --type` names: a type for every matrix, or a recipe that mixes types.

Recipes with an underscore and a size at the end (`Q4_K_M`), and `Q2_K`, are llama.cpp's: its
`src/llama-quant.cpp` chooses the same types. `IQ4_KSS` is the mix in which files for ik_llama.cpp
are published.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.encoders import encodable
from deskside.gguf.quants import BY_NAME, QuantType
from deskside.gguf.roles import Role, bare_name, layer, role


@dataclass(frozen=True)
class Recipe:
    """A name and, by llama.cpp's numbers or ik_llama.cpp's, its `general.file_type`.

    choose: the type's name for a matrix of a model, by the matrix's name.
    """

    name: str
    file_type: int
    choose: Callable[[_Facts, str], str]

    def types(self, model: GGUF) -> Callable[[str], QuantType]:
        """What tells the type of each matrix of `model`."""
        facts = _Facts.of(model)
        return lambda name: BY_NAME[self.choose(facts, name)]


@dataclass(frozen=True)
class _Facts:
    """What recipes ask about a model."""

    layers: int
    experts: int
    gqa: float  # query heads per KV head
    is_70b: bool
    tied: bool  # the embedding is the head
    value_layers: tuple[int, ...]  # layers with attn_v or attn_qkv

    @classmethod
    def of(cls, model: GGUF) -> _Facts:
        arch = model.get("general.architecture", "")
        layers, experts, heads = (
            _number(model, f"{arch}.{key}")
            for key in ("block_count", "expert_count", "attention.head_count")
        )
        kv_heads = _number(model, f"{arch}.attention.head_count_kv") or heads
        found = {layer(name) for name in model.tensors if _is_value(name)}
        return cls(
            layers,
            experts,
            heads / kv_heads if kv_heads else 1,
            arch in ("llama", "qwen2") and layers == 80 and heads != kv_heads,
            "output.weight" not in model.tensors,
            tuple(sorted(i for i in found if i is not None)),
        )


def _number(model: GGUF, key: str) -> int:
    """A whole number of the metadata, the largest of a list of them; 0 where there is none."""
    value = model.get(key, 0)
    try:
        return int(value) if isinstance(value, int) else max(map(int, value))
    except (TypeError, ValueError):
        return 0


def _is_value(name: str) -> bool:
    return bare_name(name) in ("attn_v.weight", "attn_qkv.weight")


def _more_bits(i: int, n: int) -> bool:
    """The first and last eighth of n layers, and every third between them."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


@dataclass(frozen=True)
class _KMix:
    """A recipe of llama.cpp: what differs from `base`, by layer i of n."""

    base: str
    value: Callable[[int, int, float], str]  # also by query heads per KV head
    down: Callable[[int, int], str]
    out: str
    out_of_8_experts: str = "Q5_K"

    def __call__(self, facts: _Facts, name: str) -> str:
        i, bare = layer(name), bare_name(name)
        what = role(name)
        if what is Role.HEAD or (what is Role.EMBEDDING and facts.tied):
            return "Q6_K"
        if i is None:
            return self.base
        if _is_value(name):
            if facts.experts == 8:
                return "Q8_0"
            rank = facts.value_layers.index(i)
            got = self.value(rank, len(facts.value_layers), facts.gqa)
            return "Q5_K" if facts.is_70b and got in ("Q3_K", "Q4_K") else got
        if bare == "attn_k.weight" and facts.experts == 8:
            return "Q8_0"
        if bare == "attn_output.weight":
            return self.out_of_8_experts if facts.experts == 8 else self.out
        if bare.startswith("ffn_down"):
            return self.down(i, facts.layers)
        return self.base


def _either(some: str, rest: str) -> Callable[..., str]:
    return lambda i, n, *_: some if _more_bits(i, n) else rest


def _published_kss(facts: _Facts, name: str) -> str:
    """Experts by IQ4_KSS, their down matrices by IQ4_KS, all else finer. In a model without experts
    the feed-forward matrices take their place."""
    what = role(name)
    if what is Role.HEAD or (what is Role.EMBEDDING and facts.tied):
        return "IQ6_K"
    if what is Role.EMBEDDING:
        return "IQ4_K"
    if what is (Role.EXPERTS if facts.experts else Role.FFN):
        return "IQ4_KS" if "ffn_down" in name else "IQ4_KSS"
    return "IQ5_KS"


def _same(name: str) -> Callable[[_Facts, str], str]:
    return lambda facts, tensor: name


# `general.file_type` of files whose matrices have one type, and of recipes.
FILE_TYPES = {
    "F32": 0, "F16": 1, "Q8_0": 7, "Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18,
    "IQ4_NL": 25, "IQ4_XS": 30, "BF16": 32, "MXFP4": 38, "Q6_0": 135, "IQ4_K": 140, "IQ5_K": 141,
    "IQ6_K": 142, "IQ4_KS": 145, "IQ4_KSS": 148, "IQ5_KS": 150,
}  # fmt: skip
RECIPES = {
    r.name: r
    for r in (
        Recipe(
            "Q2_K",
            10,
            _KMix(
                "Q2_K",
                lambda i, n, gqa: "Q4_K" if gqa >= 4 else "Q3_K",
                lambda i, n: "Q3_K",
                "Q3_K",
            ),
        ),
        Recipe(
            "Q3_K_M",
            12,
            _KMix(
                "Q3_K",
                lambda i, n, gqa: "Q5_K" if i < 2 else "Q4_K",
                lambda i, n: "Q5_K" if i < n // 16 else "Q4_K",
                "Q4_K",
            ),
        ),
        Recipe(
            "Q4_K_S",
            14,
            _KMix(
                "Q4_K",
                lambda i, n, gqa: "Q5_K" if i < 4 else "Q4_K",
                lambda i, n: "Q5_K" if i < n // 8 else "Q4_K",
                "Q4_K",
            ),
        ),
        Recipe(
            "Q4_K_M", 15, _KMix("Q4_K", _either("Q6_K", "Q4_K"), _either("Q6_K", "Q4_K"), "Q4_K")
        ),
        Recipe(
            "Q5_K_M", 17, _KMix("Q5_K", _either("Q6_K", "Q5_K"), _either("Q6_K", "Q5_K"), "Q5_K")
        ),
        Recipe("IQ4_KSS", 148, _published_kss),
    )
}
# As llama.cpp names its mixes for short.
_ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def pure(t: QuantType) -> Recipe:
    """Every matrix as `t`. DesksideError if `t` cannot be written."""
    if t.name not in encodable():
        raise DesksideError(f"{t.name} cannot be written; choose from {', '.join(encodable())}")
    return Recipe(t.name, FILE_TYPES[t.name], _same(t.name))


def writable(name: str) -> QuantType:
    """The type called `name`, upper or lower case. DesksideError lists what can be written."""
    found = BY_NAME.get(name.strip().upper())
    if found is None or found.name not in encodable():
        raise DesksideError(f"{name!r} cannot be written; choose from {', '.join(encodable())}")
    return found


def recipe(name: str) -> Recipe:
    """The recipe called `name`, else the type of that name for every matrix.

    DesksideError lists all that can be written.
    """
    key = name.strip().upper()
    key = _ALIASES.get(key, key)
    if key in RECIPES:
        return RECIPES[key]
    if key in encodable():
        return pure(BY_NAME[key])
    known = dict.fromkeys((*RECIPES, *encodable()))
    raise DesksideError(f"{name!r} cannot be written; choose from {', '.join(known)}")
