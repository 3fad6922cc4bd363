"""Slices of large models: random weights, true shapes, fewer layers. A cache folder keeps them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from deskside.bench.record import Part
from deskside.convert.synth import PRESETS, outline, synth_file
from deskside.errors import DesksideError
from deskside.files import disk_free
from deskside.gguf import GGUF
from deskside.models import build_tape
from deskside.progress import Progress, silent
from deskside.tape.cost import Work

# Bytes for padding of tensors, the header, and the file system's own use.
DISK_MARGIN = 1.02
RANDOM = " with random weights"  # what `synth` calls a file behind the preset's name
NAME = re.compile(r"(?P<preset>.+)-(?P<layers>\d+)l(-(?P<experts>\d+)e)?")


@dataclass(frozen=True)
class Slice:
    """Some layers of a preset, at their true shapes. experts: per layer, None = all."""

    preset: str
    layers: int
    experts: int | None = None

    @property
    def shape(self) -> dict[str, Any]:
        return {"layers": self.layers} | ({"experts": self.experts} if self.experts else {})

    @property
    def name(self) -> str:
        return f"{self.preset}-" + "-".join(f"{n}{key[0]}" for key, n in self.shape.items())

    @property
    def nbytes(self) -> int:
        """Size of the file."""
        return _measures(self)[0]

    @property
    def work(self) -> Work:
        """Bytes and multiply-adds of its steps; needs no file."""
        return _measures(self)[1]

    @property
    def weights(self) -> int:
        """Bytes of weights that an engine holds in memory: all except the embedding."""
        return self.work.dense_bytes + sum(layer.nbytes for layer in self.work.experts)

    @property
    def head_share(self) -> float:
        """Of the bytes that a token reads at depth 0."""
        return self.work.head_bytes / self.work.decode(0, "f16")["bytes"]

    def file(self, folder: Path) -> Path:
        return folder / f"{self.name}.gguf"


@cache
def _measures(slice_: Slice) -> tuple[int, Work]:
    made = outline(slice_.preset, **slice_.shape)
    return made.nbytes, Work.of(build_tape(made.gguf()))


def full(preset: str) -> Slice:
    """The whole model as a slice. DesksideError if the preset is not known."""
    if preset not in PRESETS:
        raise DesksideError(f"preset {preset!r} is not known; choose from {', '.join(PRESETS)}")
    return Slice(preset, PRESETS[preset]["num_hidden_layers"])


def is_random(file: GGUF) -> bool:
    """Whether `deskside synth` wrote it."""
    return str(file.get("general.name", "")).endswith(RANDOM)


def part(file: GGUF) -> Part | None:
    """What a synthetic file is of a preset; None for all of one, and for any other file."""
    preset = str(file.get("general.name", "")).removesuffix(RANDOM)
    shape, arch = PRESETS.get(preset), file.get("general.architecture")
    layers, experts = (file.get(f"{arch}.{key}") for key in ("block_count", "expert_count"))
    if not is_random(file) or shape is None or not isinstance(layers, int):
        return None
    layers -= int(file.get(f"{arch}.nextn_predict_layers", 0) or 0)
    return _less(preset, layers, experts if isinstance(experts, int) else None)


def named(name: str) -> Part | None:
    """What a file is of a preset, by the name that `Slice` gives it: old records tell no more."""
    found = NAME.fullmatch(name)
    if found is None or found["preset"] not in PRESETS:
        return None
    return _less(found["preset"], int(found["layers"]), int(found["experts"] or 0) or None)


def _less(preset: str, layers: int, experts: int | None) -> Part | None:
    shape = PRESETS[preset]
    fewer = None if experts in (None, shape.get("num_experts")) else experts
    if (layers, fewer) == (shape["num_hidden_layers"], None):
        return None
    return Part(preset, layers, fewer)


def label(part: Part) -> str:
    """ "8 of 40 layers", and of the experts where not all are there."""
    shape = PRESETS[part.preset]
    text = f"{part.layers} of {shape['num_hidden_layers']} layers"
    if part.experts:
        text += f", {part.experts} of {shape['num_experts']} experts"
    return text


def period(preset: str) -> int:
    """Number of layers after which the kinds of layers repeat."""
    return int(PRESETS[preset].get("full_attention_interval", 1))


def cache_folder() -> Path:
    """The folder for slices: $DESKSIDE_BENCH_DIR, or ~/.cache/deskside-bench."""
    return Path(os.environ.get("DESKSIDE_BENCH_DIR") or Path.home() / ".cache" / "deskside-bench")


def disk_needed(slices: list[Slice], folder: Path) -> float:
    """Bytes that the missing files of `slices` will take."""
    return DISK_MARGIN * sum(s.nbytes for s in slices if not s.file(folder).exists())


def write(slice_: Slice, folder: Path, progress: Progress = silent) -> Path:
    """The path of the slice's file, written if missing. DesksideError if the disk is too full."""
    path = slice_.file(folder)
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    free = disk_free(folder)
    if slice_.nbytes * DISK_MARGIN > free:
        raise DesksideError(
            f"{slice_.nbytes / 1e9:.1f} GB of disk are needed in {folder}, "
            f"{free / 1e9:.1f} GB are free"
        )
    synth_file(slice_.preset, path, **slice_.shape, progress=progress)
    return path
