"""A slice of a model: what it is of the whole, and what its speed says of the whole.

The whole model's rates are computed, not measured: at every run's depth and prompt the slice's
share of its ceiling, times the ceiling of the whole model under the same limits. The head, which a
slice has as a whole, thus counts once. `deskside predict` measures several slices instead.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path

from deskside.bench.measure.ceiling import Roof
from deskside.bench.predict.slices import RANDOM, Slice, full, label, named
from deskside.bench.record import Ceiling, Part, Target
from deskside.bench.report.facts import Row, Side

ALIKE = 0.02  # of the size of the file that a slice has by its name
UBATCH = 512  # where a target does not tell


@dataclass(frozen=True)
class Whole:
    """layers: of the whole model; label: what was measured of it; rates computed, None where no
    run has a ceiling."""

    label: str
    layers: int
    head_share: float
    tg: float | None
    pp: float | None


def part_of(target: Target) -> Part | None:
    """As recorded; for records of before by the name of the file."""
    if target.part is not None or not target.files:
        return target.part
    return named(Path(target.files[0].name).stem)


def is_random(target: Target) -> bool:
    """Whether the weights are random, so that answers mean nothing."""
    return target.random or target.name.endswith(RANDOM) or part_of(target) is not None


def whole(target: Target, side: Side) -> Whole | None:
    """None of what is no slice, or one of other types than `synth` gives it."""
    part = part_of(target)
    if part is None:
        return None
    slice_, model = Slice(part.preset, part.layers, part.experts), full(part.preset)
    size = sum(f.nbytes for f in target.files)
    if abs(size / slice_.nbytes - 1) > ALIKE:
        return None
    ubatch, ctk, ctv = (target.options.get(key) for key in ("ubatch", "ctk", "ctv"))
    roof = Roof(
        model.work,
        threads=1,
        ubatch=ubatch if isinstance(ubatch, int) else UBATCH,
        ctk=str(ctk or "f16"),
        ctv=str(ctv or "f16"),
    )
    pairs = [(row, _ceiling(row, roof)) for row in side.basis]
    tg = [
        row.tg_share * ceiling.decode_rate
        for row, ceiling in pairs
        if ceiling and row.tg_share and ceiling.decode_rate
    ]
    pp = [
        row.pp_share * ceiling.prefill_rate
        for row, ceiling in pairs
        if ceiling and row.pp_share and ceiling.prefill_rate
    ]
    return Whole(
        label(part),
        model.layers,
        slice_.head_share,
        statistics.median(tg) if tg else None,
        statistics.median(pp) if pp else None,
    )


def _ceiling(row: Row, roof: Roof) -> Ceiling | None:
    """Of the whole model, under the limits that were sampled beside the run."""
    limits = row.run.ceiling
    if not limits.bandwidth or not limits.compute:
        return None
    return roof.over(row.run, limits.bandwidth, limits.compute)
