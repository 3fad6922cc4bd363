"""Measurements that others published: one TOML file each, in data/gallery.

Rates are tokens per second, times seconds. A file's fields are those of `Entry`.
"""

from __future__ import annotations

import functools
from importlib import resources
from pathlib import Path

from msgspec import Struct

from deskside import schema
from deskside.errors import DesksideError
from deskside.machine.devices import Published, PublishedRun
from deskside.schema import Positive


class Spread(Struct, frozen=True, forbid_unknown_fields=True):
    """Of a rate over runs; None where it was not published."""

    min: Positive | None = None
    max: Positive | None = None
    mean: Positive | None = None


class Statistics(Struct, frozen=True, forbid_unknown_fields=True):
    """Over all runs of an entry, of which its table may show only some."""

    runs: int
    prefill: Spread = Spread()
    decode: Spread = Spread()


class Entry(Struct, frozen=True, forbid_unknown_fields=True):
    """What one source published.

    preset     the model, as `synth` and `plan` name it
    experts    quant types of the routed experts that it may have had
    machines   descriptions in data/machines of its machine
    system     what it tells of the machine, by name
    runs       its table
    """

    title: schema.Name
    source: schema.Name
    preset: schema.Name
    engine: schema.Name
    statistics: Statistics
    experts: tuple[str, ...] = ()
    machines: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    sampling: dict[str, float] = {}
    system: dict[str, str] = {}
    runs: tuple[PublishedRun, ...] = ()


@functools.cache
def entries() -> dict[str, Entry]:
    """All entries, by name."""
    folder = Path(str(resources.files("deskside") / "data" / "gallery"))
    paths = sorted(folder.glob("*.toml"))
    return {p.stem: schema.build(schema.parse(p), Entry, str(p)) for p in paths}


def entry(name: str) -> Entry:
    """DesksideError lists the names that there are."""
    found = entries().get(name)
    if found is None:
        raise DesksideError(f"{name}: not in the gallery, which has {', '.join(entries())}")
    return found


def published(machine: str) -> tuple[Published, ...]:
    """What was published of a machine that comes with deskside."""
    return tuple(
        Published(e.preset, e.engine, e.statistics.decode.mean, _spread(e), e.experts, e.runs)
        for e in entries().values()
        if machine in e.machines and e.statistics.decode.mean is not None
    )


def _spread(e: Entry) -> str:
    decode = e.statistics.decode
    return f"{e.source}, mean of {decode.min} to {decode.max} over {e.statistics.runs} runs"
