"""Chooses slices of a model that fit memory and disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from deskside.bench.predict.slices import Slice, cache_folder, disk_needed, full, period
from deskside.convert.synth import PRESETS
from deskside.errors import DesksideError
from deskside.files import disk_free
from deskside.machine.system import available_memory
from deskside.machine.watch import WORK_BYTES

# Bytes of memory to leave free.
RESERVE = 2_000_000_000
# Most bytes of files that `auto` writes to get deeper slices.
AUTO_BYTES = 64_000_000_000


@dataclass(frozen=True)
class Choice:
    """The slices to measure. `groups`: indices into `every` of slices that fit memory together."""

    slices: tuple[Slice, ...]
    check: Slice | None
    groups: tuple[tuple[int, ...], ...]

    @property
    def every(self) -> tuple[Slice, ...]:
        return (*self.slices, *((self.check,) if self.check else ()))

    @property
    def together(self) -> bool:
        """Whether memory holds all slices of the fit at once, so that their rounds are paired."""
        return set(range(len(self.slices))) <= set(self.groups[0])

    @property
    def order(self) -> str:
        if len(self.groups) == 1:
            return "interleaved: all in memory, round by round"
        names = " | ".join(",".join(str(self.every[i].layers) for i in g) for g in self.groups)
        return f"in turn, forwards and backwards, for want of memory: layers {names}"


def choose(
    preset: str,
    layers: Sequence[int] | str = "auto",
    *,
    experts: int | None = None,
    check: int | None = None,
    folder: Path | None = None,
    memory: int | None = None,
    disk: int | None = None,
) -> Choice:
    """Choose slices that fit. memory, disk: in bytes; None = what is free.

    auto takes three slices of 1, 2 and 3 periods, or a multiple of these that memory holds at once.
    It takes two slices if three never fit. If the deepest slice does not fit with all experts, it
    tries half of them, a quarter, and so on.

    DesksideError if nothing fits, and for layers that make no slice.
    """
    whole = full(preset)
    room = (available_memory() if memory is None else memory) - RESERVE
    folder = folder or cache_folder()
    disk = disk_free(folder) if disk is None else disk
    if layers == "auto":
        slices = _auto(whole, experts, check, room, disk, folder)
    elif isinstance(layers, str):
        raise DesksideError(f"--layers {layers}: expected auto, or numbers such as 4,8,12")
    else:
        slices = tuple(Slice(preset, n, experts) for n in sorted(set(layers)))
        if len(slices) < 2:
            raise DesksideError(
                f"--layers {','.join(map(str, layers))}: give two or more different numbers, for "
                "one slice cannot tell the head from the layers"
            )
    last = None if check is None else Slice(preset, check, slices[0].experts)
    for s in (*slices, *((last,) if last else ())):
        flag = "--check" if s is last else "--layers"
        if s.layers < 1 or s.layers % period(preset) or s.layers > whole.layers:
            raise DesksideError(
                f"{flag} {s.layers}: {preset} has {whole.layers} layers in periods of "
                f"{period(preset)}; use whole periods"
            )
    every = [*slices, *((last,) if last else ())]
    largest = max(every, key=_memory)
    if _memory(largest) > room:
        raise DesksideError(
            f"{largest.name} needs {_memory(largest) / 1e9:.1f} GB of memory, "
            f"{max(room, 0) / 1e9:.1f} GB can be had; use fewer layers or --experts"
        )
    needed = disk_needed(every, folder)
    if needed > disk:
        raise DesksideError(
            f"{folder}: the slices need {needed / 1e9:.1f} GB of disk, {disk / 1e9:.1f} GB are "
            "free; use fewer layers or --experts"
        )
    return Choice(slices, last, _groups([_memory(s) for s in every], room))


def _memory(s: Slice) -> int:
    """Bytes that an engine takes, without mapped pages, which the kernel can drop."""
    return s.weights + WORK_BYTES


def _groups(sizes: Sequence[int], room: int) -> tuple[tuple[int, ...], ...]:
    """Group neighbouring slices, as many as fit `room` bytes."""
    groups: list[list[int]] = []
    for i, size in enumerate(sizes):
        if groups and sum(sizes[j] for j in groups[-1]) + size <= room:
            groups[-1].append(i)
        else:
            groups.append([i])
    return tuple(map(tuple, groups))


def _auto(
    whole: Slice, experts: int | None, check: int | None, room: int, disk: int, folder: Path
) -> tuple[Slice, ...]:
    step = period(whole.preset)
    config = PRESETS[whole.preset]
    total, used = config.get("num_experts", 0), config.get("num_experts_per_tok", 0)
    counts: list[int | None] = [experts]
    n = total // 2
    while experts is None and n >= 2 * used > 0:
        counts.append(n)
        n //= 2

    def made(periods: Sequence[int], count: int | None) -> tuple[Slice, ...]:
        return tuple(Slice(whole.preset, p * step, count) for p in periods)

    def fits(slices: Sequence[Slice]) -> bool:
        last = [Slice(whole.preset, check, slices[0].experts)] if check else []
        every = [*slices, *last]
        return (
            slices[-1].layers <= whole.layers
            and max(map(_memory, every)) <= room
            and disk_needed(every, folder) <= disk
        )

    for periods in ((1, 2, 3), (1, 2)):
        for count in counts:
            if not fits(made(periods, count)):
                continue
            times = 1
            while True:  # deeper slices, as long as they only cost time to write
                deeper = made([p * (times + 1) for p in periods], count)
                written = disk_needed(list(deeper), folder)
                enough = sum(map(_memory, deeper)) <= room and written <= AUTO_BYTES
                if not (fits(deeper) and enough):
                    return made([p * times for p in periods], count)
                times += 1
    smallest = made((1, 2), counts[-1])
    raise DesksideError(
        f"{whole.preset}: even {smallest[1].name} does not fit: {_memory(smallest[1]) / 1e9:.1f} "
        f"GB of memory and {disk_needed(list(smallest), folder) / 1e9:.1f} GB of disk in {folder} "
        f"are needed, {max(room, 0) / 1e9:.1f} and {disk / 1e9:.1f} GB can be had"
    )
