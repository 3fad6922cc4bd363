"""GGUF files with random weights: the true shapes of large models, and tiny ones for tests.

A preset is a config.json: names, shapes and metadata come from the same layouts that the
converter uses. Big files are written at disk speed from pools of random rows, see `_Pool`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deskside.convert.layout import ARCHITECTURES
from deskside.convert.recipes import FILE_TYPES
from deskside.convert.source import Config, Output, Outputs
from deskside.convert.toy_vocab import toy_vocab
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.encoders import quantize
from deskside.gguf.quants import QuantType, quant_type
from deskside.gguf.writer import GGUFWriter
from deskside.progress import Progress, silent

Floats = NDArray[np.float32]
Rules = Sequence[tuple[str, QuantType]]


def _qwen35moe(**shape: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3_5_moe_text",
        "vocab_size": 248320,
        "max_position_embeddings": 262144,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "rope_parameters": {
            "rope_theta": 1e7,
            "partial_rotary_factor": 0.25,
            "mrope_section": [11, 11, 10],
        },
        "linear_num_key_heads": 16,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        **shape,
    }


_TINY: dict[str, Any] = {
    "vocab_size": 2560,
    "hidden_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 8192,
}
_TINY_QWEN35: dict[str, Any] = {
    **_TINY,
    "num_hidden_layers": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 8,
    "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
    "rope_parameters": {
        "rope_theta": 1e6,
        "partial_rotary_factor": 0.5,
        "mrope_section": [6, 5, 5],
    },
}

PRESETS: dict[str, dict[str, Any]] = {
    "qwen3.5-397b-a17b": _qwen35moe(
        num_hidden_layers=60,
        hidden_size=4096,
        num_attention_heads=32,
        linear_num_value_heads=64,
        num_experts=512,
        num_experts_per_tok=10,
        moe_intermediate_size=1024,
        shared_expert_intermediate_size=1024,
    ),
    "qwen3.5-122b-a10b": _qwen35moe(
        num_hidden_layers=48,
        hidden_size=3072,
        num_attention_heads=32,
        linear_num_value_heads=64,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=1024,
        shared_expert_intermediate_size=1024,
    ),
    "qwen3.5-35b-a3b": _qwen35moe(
        num_hidden_layers=40,
        hidden_size=2048,
        num_attention_heads=16,
        linear_num_value_heads=32,
        num_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=512,
        shared_expert_intermediate_size=512,
    ),
    "tiny-moe": _qwen35moe(
        **_TINY_QWEN35,
        num_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=128,
    ),
    "tiny-dense": {
        "model_type": "qwen3_5_text",
        **_TINY_QWEN35,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4,
        "intermediate_size": 512,
    },
    "tiny-qwen3moe": {
        "model_type": "qwen3_moe",
        **_TINY,
        "num_hidden_layers": 4,
        "rope_theta": 1e6,
        "num_experts": 16,
        "num_experts_per_tok": 4,
        "moe_intermediate_size": 64,
    },
    "tiny-qwen3": {
        "model_type": "qwen3",
        **_TINY,
        "num_hidden_layers": 4,
        "rope_theta": 1e6,
        "intermediate_size": 512,
    },
    "tiny-qwen2": {
        "model_type": "qwen2",
        **_TINY,
        "num_hidden_layers": 4,
        "rope_theta": 1e6,
        "intermediate_size": 512,
    },
    "tiny-llama": {
        "model_type": "llama",
        **_TINY,
        "num_hidden_layers": 4,
        "rope_theta": 1e4,
        "intermediate_size": 512,
    },
}

# Config keys that a preset may leave out.
_OPTIONAL = {"tie_word_embeddings", "rms_norm_eps", "rope_parameters", "layer_types"}
# Sizes far beyond any model, so that a slip of the keyboard fails at once.
_LIMITS = {"num_hidden_layers": 1024, "num_experts": 4096}
_PRE = {
    "qwen35moe": "qwen35", "qwen35": "qwen35", "qwen3moe": "qwen2", "qwen3": "qwen2",
    "qwen2": "qwen2", "llama": "llama-bpe",
}  # fmt: skip
# Experts in 4 bits, the head in 6, all else in Q8_0.
_DEFAULT_RULES: Rules = (
    (r"ffn_(gate|up|down)_exps", quant_type("IQ4_NL")),
    (r"^output\.weight", quant_type("Q6_K")),
    (r"", quant_type("Q8_0")),
)
_POOL_BYTES = 32 << 20
# Models of up to this many weights are random throughout, larger ones repeat pools of rows.
_ALL_RANDOM = 1 << 27


@dataclass(frozen=True)
class Outline:
    """What a file will hold, before anything is written."""

    metadata: dict[str, Any]
    tensors: list[Output]
    types: list[QuantType]

    @property
    def data_bytes(self) -> int:
        """Bytes of all tensors, without padding."""
        return sum(map(_nbytes, self.tensors, self.types))

    @property
    def nbytes(self) -> int:
        """Size of the file but for the padding of tensors and a few KB of header."""
        # A token costs its text, a length and a type.
        return self.data_bytes + sum(len(t) + 12 for t in self.metadata["tokenizer.ggml.tokens"])

    def gguf(self) -> GGUF:
        """The file as it will be, without data: for its tape, and what that costs."""
        path = Path(self.metadata["general.name"])
        named = zip(self.tensors, self.types, strict=True)
        infos = {t.name: TensorInfo(t.name, kind, t.shape, path, 0) for t, kind in named}
        return GGUF(path, [path], dict(self.metadata), {}, infos)


def synth_file(
    preset: str,
    out: Path,
    *,
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    types: Rules = (),
    seed: int = 0,
    mtp: bool = False,
    progress: Progress = silent,
) -> None:
    """Write `preset` with random weights to `out`. Same arguments, same file.

    layers, experts, vocab, overrides: replace values of the preset's config; `overrides` by its
    key. types: (regex, type) rules on tensor names, the first that matches wins, then the default
    recipe; norms, router and convolution stay F32. mtp: add a multi-token-prediction layer.
    Raises DesksideError for values that make no model, and if the disk has too little room.
    """
    made = outline(
        preset,
        layers=layers,
        experts=experts,
        vocab=vocab,
        overrides=overrides,
        types=types,
        mtp=mtp,
    )
    if seed < 0:
        raise DesksideError(f"seed {seed} is negative; use 0 or more")
    tied = all(t.name != "output.weight" for t in made.tensors)
    pools: dict[tuple[QuantType, int, float], _Pool] = {}
    big = sum(math.prod(t.shape) for t in made.tensors) > _ALL_RANDOM
    table = [(t.name, kind, t.shape) for t, kind in zip(made.tensors, made.types, strict=True)]
    total, done = made.data_bytes, 0
    fewer = "use fewer layers or experts"
    with GGUFWriter(out, made.metadata, table, advice=fewer) as writer:
        for tensor, kind in zip(made.tensors, made.types, strict=True):
            rng = np.random.default_rng([seed, zlib.crc32(tensor.name.encode())])
            # Outputs of the order of the inputs: 1 / sqrt(inputs of a dot product). A row of the
            # embedding is picked, not multiplied, unless it is the head as well.
            picked = tensor.name == "token_embd.weight" and not tied
            scale = 1.0 if picked else tensor.shape[0] ** -0.5
            if big and kind.name != "F32":
                key = (kind, tensor.shape[0], scale)
                if key not in pools:
                    pools[key] = _Pool(*key, rng)
                chunks = pools[key].rows(math.prod(tensor.shape[1:]), rng)
            else:
                chunks = (quantize(x, kind) for x in _weights(tensor, scale, rng))
            for chunk in chunks:
                writer.write(tensor.name, chunk)
                done += chunk.nbytes
                progress("synth", done, total)


def estimate(preset: str, **arguments: Any) -> int:
    """Size in bytes of the file that `synth_file` writes for the same arguments."""
    return outline(preset, **arguments).nbytes


def outline(
    preset: str,
    *,
    layers: int | None = None,
    experts: int | None = None,
    vocab: int | None = None,
    overrides: Mapping[str, Any] | None = None,
    types: Rules = (),
    mtp: bool = False,
) -> Outline:
    """Metadata and tensor table of `synth_file`'s output; its arguments, its errors."""
    if preset not in PRESETS:
        raise DesksideError(f"preset {preset!r} is not known; choose from {', '.join(PRESETS)}")
    values = dict(PRESETS[preset])
    changes = {"num_hidden_layers": layers, "num_experts": experts, "vocab_size": vocab}
    changes = {key: value for key, value in changes.items() if value is not None}
    for key, value in {**changes, **(overrides or {})}.items():
        if key not in values.keys() - {"model_type"} | _OPTIONAL:
            raise DesksideError(f"preset {preset} has no {key}; it has {', '.join(values)}")
        if isinstance(value, int) and value > _LIMITS.get(key, 1 << 22):
            raise DesksideError(f"preset {preset}: {key} {value} is more than deskside writes")
        values[key] = value
    arch, layout = ARCHITECTURES[values["model_type"]]
    config = Config(Path(f"preset {preset}"), values)
    if mtp and not arch.startswith("qwen35"):
        raise DesksideError(f"preset {preset}: architecture {arch} has no MTP layer")
    outputs = _Shapes(mtp)
    hyper_parameters = layout(config, outputs)
    kinds = [_type_of(tensor, types) for tensor in outputs.tensors]
    share: Counter[str] = Counter()
    for tensor, kind in zip(outputs.tensors, kinds, strict=True):
        share[kind.name] += _nbytes(tensor, kind)
    metadata: dict[str, Any] = {
        "general.architecture": arch,
        "general.type": "model",
        "general.name": f"{preset} with random weights",
        "general.file_type": FILE_TYPES.get(share.most_common(1)[0][0], 0),
        "general.quantization_version": 2,
        **{f"{arch}.{key}": value for key, value in hyper_parameters.items()},
        **toy_vocab(hyper_parameters["vocab_size"], _PRE[arch]),
    }
    return Outline(metadata, outputs.tensors, kinds)


class _Shapes(Outputs):
    """Stands in for a checkpoint: has every tensor that is asked for, without data."""

    def __init__(self, mtp: bool) -> None:
        self.tensors = []
        self._mtp = mtp

    def has(self, source: str) -> bool:
        return self._mtp or not source.startswith("mtp.")

    def take(self, source: str, *shape: int) -> Floats:
        return np.broadcast_to(np.float32(0), shape)

    def drop(self, source: str) -> None:
        pass


def _nbytes(tensor: Output, kind: QuantType) -> int:
    return kind.row_bytes(tensor.shape[0]) * math.prod(tensor.shape[1:])


def _type_of(tensor: Output, rules: Rules) -> QuantType:
    if not tensor.narrow:
        return quant_type("F32")
    for pattern, kind in rules:
        try:
            matches = re.search(pattern, tensor.name)
        except re.error as error:
            raise DesksideError(f"type rule {pattern!r} is not a regex: {error}") from None
        if matches:
            if tensor.shape[0] % kind.block:
                raise DesksideError(
                    f"type rule {pattern!r}: {kind.name} needs rows of a multiple of {kind.block}, "
                    f"{tensor.name} has {tensor.shape[0]}"
                )
            return kind
    wanted = next(kind for pattern, kind in _DEFAULT_RULES if re.search(pattern, tensor.name))
    fitting = (t for t in (wanted, quant_type("Q8_0")) if tensor.shape[0] % t.block == 0)
    return next(fitting, quant_type("F16"))


class _Pool:
    """Encoded rows of one type, length and scale, put together from the blocks of a random sample.

    Encoding costs up to a second per 4 M weights; picking encoded blocks at random runs at memory
    speed and gives rows as valid and as different.
    """

    def __init__(self, kind: QuantType, n: int, scale: float, rng: np.random.Generator) -> None:
        sample = scale * rng.standard_normal((max(1, (1 << 20) // n), n), np.float32)
        rows = quantize(sample, kind)
        blocks = rows[:, kind.row_header :].reshape(-1, kind.block_bytes)
        n_rows = max(1, _POOL_BYTES // kind.row_bytes(n))
        picked = rng.integers(len(blocks), size=(n_rows, n // kind.block), dtype=np.int32)
        self._rows = np.empty((n_rows, kind.row_bytes(n)), np.uint8)
        self._rows[:, : kind.row_header] = rows[rng.integers(len(rows), size=n_rows)][
            :, : kind.row_header
        ]
        self._rows[:, kind.row_header :] = blocks[picked].reshape(n_rows, -1)

    def rows(self, n_rows: int, rng: np.random.Generator) -> Iterator[NDArray[np.uint8]]:
        """Runs of rows from random places, `n_rows` in all."""
        while n_rows:
            start = int(rng.integers(len(self._rows)))
            run = self._rows[start : start + n_rows]
            n_rows -= len(run)
            yield run


def _weights(tensor: Output, scale: float, rng: np.random.Generator) -> Iterator[Floats]:
    """Random float32 rows of `tensor`, in chunks; matrices are normal with deviation `scale`."""
    n_rows, name = math.prod(tensor.shape[1:]), tensor.name
    step = max(1, (1 << 22) // tensor.shape[0])
    for start in range(0, n_rows, step):
        size = (min(step, n_rows - start), tensor.shape[0])
        if name == "rope_freqs.weight":
            yield tensor.parts[0]  # follows from the config
        elif name.endswith("norm.weight"):
            yield 1 + np.float32(0.1) * rng.standard_normal(size, np.float32)
        elif name.endswith("ssm_a"):
            # -A with A in 0.01 .. 16, as the published model code initialises it
            yield -rng.uniform(0.01, 16, size).astype(np.float32)
        elif name.endswith("ssm_dt.bias"):
            # softplus(bias) = dt, log-uniform in 0.001 .. 0.1
            dt = np.exp(rng.uniform(math.log(1e-3), math.log(0.1), size))
            yield np.log(np.expm1(dt)).astype(np.float32)
        else:
            yield np.float32(scale) * rng.standard_normal(size, np.float32)
