"""Architectures: one file each. `build_tape` turns a GGUF file into a tape."""

from __future__ import annotations

import re
from collections.abc import Callable

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.models import llama, qwen2, qwen3, qwen35
from deskside.models.common import Model
from deskside.tape import Tape

ARCHITECTURES: dict[str, Callable[[Model], Tape]] = {
    "qwen35moe": qwen35.build,
    "qwen35": qwen35.build,
    "qwen3moe": qwen3.build,
    "qwen3": qwen3.build,
    "qwen2": qwen2.build,
    "llama": llama.build,
}


def build_tape(file: GGUF) -> Tape:
    """The forward pass of the model in `file`.

    DesksideError for an unknown architecture, and for a tensor that is missing, has the wrong shape
    or would not be read. A model that ignores some weights writes fluent nonsense.
    """
    arch = file.require("general.architecture", str)
    build = ARCHITECTURES.get(arch)
    if build is None:
        known = ", ".join(ARCHITECTURES)
        raise DesksideError(f"{file.path}: general.architecture is {arch!r}; deskside runs {known}")
    _refuse_scaled_rope(file, arch)
    model = Model(file, arch)
    tape = build(model)
    unread = sorted(
        name for name in file.tensors.keys() - model.used if not _is_mtp(name, model.n_layers)
    )
    if unread:
        raise DesksideError(
            f"{file.path}: tensor {unread[0]} (and {len(unread) - 1} more) has no place in "
            f"architecture {arch}; the file needs an engine that knows it"
        )
    return tape


def _refuse_scaled_rope(file: GGUF, arch: str) -> None:
    kind = file.get(f"{arch}.rope.scaling.type", "none")
    if kind != "none":
        raise DesksideError(
            f"{file.path}: metadata key {arch}.rope.scaling.type is {kind!r}; "
            "only unscaled rope is known"
        )


def _is_mtp(name: str, n_layers: int) -> bool:
    """Tensors for multi-token prediction are in the blocks after the main layers."""
    block = re.match(r"blk\.(\d+)\.", name)
    return block is not None and int(block[1]) >= n_layers
