"""Architectures: one file each. `build_tape` turns a GGUF file into a tape."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.models import llama, qwen2, qwen3, qwen35
from deskside.models.common import Model
from deskside.models.writers import check_metadata, left_out
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
    or would not be read although it may matter. The tape's notes tell what was left out.
    """
    arch = file.require("general.architecture", str)
    build = ARCHITECTURES.get(arch)
    if build is None:
        known = ", ".join(ARCHITECTURES)
        raise DesksideError(f"{file.path}: general.architecture is {arch!r}; deskside runs {known}")
    check_metadata(file, arch)
    model = Model(file, arch)
    tape = build(model)
    return replace(tape, notes=left_out(file, arch, model.used, model.n_layers))
