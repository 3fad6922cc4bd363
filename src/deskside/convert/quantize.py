"""`deskside quantize`: a GGUF model to one GGUF file with other quant types."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deskside.convert.recipes import Recipe, pure, writable
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.decoders import Bytes
from deskside.gguf.encoders import quantize
from deskside.gguf.header import show
from deskside.gguf.quants import BY_NAME, QuantType, dequantize
from deskside.gguf.writer import GGUFWriter
from deskside.progress import Progress, silent

Rule = tuple[str, QuantType]

# Weights per unit of work: some 0.1 s of encoding, and 4 MiB of float32 per thread.
_UNIT = 1 << 20
# Matrices that decide much and cost little; they keep their type unless a rule names them.
_PROTECTED = re.compile(r"norm|conv1d|ffn_gate_inp")


class Fallback(NamedTuple):
    """A matrix that got another type than was asked for, and why."""

    name: str
    asked: str
    got: str
    reason: str


def parse_rule(text: str) -> Rule:
    """`REGEX=TYPE` as given to `--tensor-type`; DesksideError if either half is bad."""
    pattern, equals, type_name = text.rpartition("=")
    if not equals or not pattern:
        raise DesksideError(f"rule {text!r} is not of the form REGEX=TYPE")
    _compiled(pattern)
    return pattern, writable(type_name)


def quantize_file(
    src: str | Path,
    dst: str | Path,
    default: QuantType | Recipe,
    rules: Sequence[Rule] = (),
    threads: int = 1,
    progress: Progress = silent,
) -> list[Fallback]:
    """Write the model `src` (a file, or any shard of a split) to the single file `dst`.

    The first rule whose regex is found in a tensor's name decides its type; otherwise matrices
    named *.weight become what `default` says, except norms, convolutions and routers.
    One-dimensional tensors are copied as they are. Sources may be quantised already. Memory stays
    bounded by a few units of work per thread. DesksideError for bad rules, types or values.
    `progress` counts weights.
    """
    if threads < 1:
        raise DesksideError(f"threads is {threads}; at least one is needed")
    recipe = default if isinstance(default, Recipe) else pure(default)
    for _, t in rules:
        writable(t.name)
    model = GGUF.open(src)
    if model.unusable:  # what cannot be read cannot be copied
        raise next(iter(model.unusable.values()))
    if any(os.path.exists(dst) and os.path.samefile(dst, path) for path in model.paths):
        raise DesksideError(f"{dst}: source and destination are the same file")
    types, fallbacks = _choose(model, recipe, rules)
    declared = [(name, types[name], info.shape) for name, info in model.tensors.items()]
    total = sum(info.n_rows * info.row_len for info in model.tensors.values())
    done = 0
    with (
        GGUFWriter(dst, _metadata(model, recipe), declared) as out,
        ThreadPoolExecutor(threads) as pool,
    ):
        for info, rows, data in _encoded(model, types, pool, 2 * threads):
            out.write(info.name, data)
            done += rows * info.row_len
            progress(info.name, done, total)
    return fallbacks


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as e:
        raise DesksideError(f"rule {pattern!r} is not a valid regular expression: {e}") from None


def _choose(
    model: GGUF, recipe: Recipe, rules: Sequence[Rule]
) -> tuple[dict[str, QuantType], list[Fallback]]:
    """The type of every tensor, and which of them are not the ones asked for."""
    patterns = [(_compiled(pattern), t) for pattern, t in rules]
    matrices = [
        info
        for info in model.tensors.values()
        if len(info.shape) > 1 and info.type.name not in ("I8", "I16", "I32", "I64")
    ]
    for pattern, t in patterns:
        if not any(pattern.search(info.name) for info in matrices):
            raise DesksideError(
                f"{model.path}: rule {pattern.pattern!r}={t.name} matches no weight matrix"
            )
    types = {name: info.type for name, info in model.tensors.items()}
    default = recipe.types(model)
    fallbacks = []
    for info in matrices:
        protected = not info.name.endswith(".weight") or bool(_PROTECTED.search(info.name))
        implied = info.type if protected else default(info.name)
        asked = next((t for pattern, t in patterns if pattern.search(info.name)), implied)
        types[info.name] = asked
        if info.row_len % asked.block:
            got = info.type if protected else _fitting(asked, info.row_len)
            types[info.name] = got
            reason = f"rows of {info.row_len} are not a multiple of {asked.block}"
            fallbacks.append(Fallback(info.name, asked.name, got.name, reason))
    return types, fallbacks


# What takes the place of superblocks; what only ik_llama.cpp reads stays in files for it.
_NARROW = {"Q5_K": "Q8_0", "Q6_K": "Q8_0", "IQ5_K": "Q6_0", "IQ5_KS": "Q6_0", "IQ6_K": "Q8_0"}


def _fitting(asked: QuantType, row_len: int) -> QuantType:
    """The nearest type of smaller blocks for a row that `asked` cannot hold."""
    if row_len % 32:
        return BY_NAME["F16"]
    return BY_NAME[_NARROW.get(asked.name, "IQ4_NL")]


def _metadata(model: GGUF, recipe: Recipe) -> dict[str, Any]:
    meta = {k: v for k, v in model.typed_metadata().items() if not k.startswith("split.")}
    meta["general.file_type"] = np.uint32(recipe.file_type)
    meta.setdefault("general.quantization_version", np.uint32(2))
    return meta


def _encoded(
    model: GGUF, types: dict[str, QuantType], pool: ThreadPoolExecutor, ahead: int
) -> Iterator[tuple[TensorInfo, int, Bytes]]:
    """(tensor, number of rows, bytes) of all units in file order, at most `ahead` in the making."""
    waiting: deque[tuple[TensorInfo, int, Future[Bytes]]] = deque()
    try:
        for name, info in model.tensors.items():
            step = max(1, _UNIT // info.row_len)
            for start in range(0, info.n_rows, step):
                rows = min(step, info.n_rows - start)
                future = pool.submit(_encode, model, name, types[name], start, rows)
                waiting.append((info, rows, future))
                if len(waiting) == ahead:
                    done = waiting.popleft()
                    yield done[0], done[1], done[2].result()
        while waiting:
            done = waiting.popleft()
            yield done[0], done[1], done[2].result()
    finally:
        for _, _, future in waiting:
            future.cancel()


def _encode(model: GGUF, name: str, t: QuantType, start: int, rows: int) -> Bytes:
    info = model.tensors[name]
    raw = model.raw(name)[start : start + rows]
    if t == info.type:
        return raw
    try:
        return quantize(dequantize(raw, info.type, info.row_len), t)
    except DesksideError as e:
        raise DesksideError(
            f"{info.path}: tensor {show(name)} to {t.name}, rows from {start}: {e}"
        ) from None
