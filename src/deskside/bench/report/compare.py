"""Compares two sides by paired runs: two records, or one record of `bench --vs`.

Runs are paired by the name of their workload item, and by order if it ran several times. Within one
record the pairs were interleaved, so the machine disturbed both sides alike. Two records lack this,
and the comparison says so.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

from deskside.bench.predict.slices import label
from deskside.bench.record import Record, Target
from deskside.bench.report.analysis import summarise
from deskside.bench.report.facts import Row, Side
from deskside.bench.report.part import part_of
from deskside.bench.report.stats import FEWEST, Ratio, median_ratio
from deskside.errors import DesksideError

THRESHOLD = 0.05  # relative; two equal sessions on one machine differ by some per cent
FASTER, SLOWER, SAME = "faster", "slower", "no difference shown"
TOO_FEW = f"too few pairs (fewer than {FEWEST})"

QUANTITIES: dict[str, tuple[str, bool, Callable[[Row], float | None]]] = {
    # name, whether more is faster, value
    "pp": ("PP, tok/s", True, lambda row: row.pp),
    "tg": ("TG, tok/s", True, lambda row: row.tg),
    "ttft": ("TTFT, s", False, lambda row: row.ttft),
}


@dataclass(frozen=True)
class Quantity:
    """The comparison of one quantity.

    ratio: median over pairs of the candidate's value divided by the baseline's.
    items: the same, by workload item.
    regression: whether all of the interval is slower by more than the threshold.
    """

    key: str
    name: str
    more_is_faster: bool
    ratio: Ratio | None
    items: dict[str, Ratio]
    verdict: str
    regression: bool


@dataclass(frozen=True)
class Comparison:
    baseline: str
    candidate: str
    paired_in_time: bool
    threshold: float
    quantities: list[Quantity]
    warnings: list[str] = field(default_factory=list)

    @property
    def regression(self) -> bool:
        return any(q.regression for q in self.quantities)

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "regression": self.regression}, indent=1)


def compare(a: Record, b: Record | None = None, threshold: float = THRESHOLD) -> Comparison:
    """Compare records. threshold: relative slow-down that is a regression.

    With two records, side A of `a` is the baseline and side A of `b` the candidate. With one
    record, side B is the baseline and side A the candidate. DesksideError without two sides or
    without pairs.
    """
    if b is None:
        if "A" not in a.targets or "B" not in a.targets:
            raise DesksideError("the record has only one side; name a second record")
        sides = summarise(a).sides
        baseline, candidate = sides["B"], sides["A"]
        targets = (a.targets["B"], a.targets["A"])
        warnings = []
    else:
        for record in (a, b):
            if "A" not in record.targets:
                raise DesksideError("a record has no side A")
        baseline, candidate = summarise(a).sides["A"], summarise(b).sides["A"]
        targets = (a.targets["A"], b.targets["A"])
        warnings = _differences(a, b)
        warnings.append(
            "two sessions: the intervals do not cover what changed between them; "
            "bench --vs interleaves the runs"
        )
    warnings += _target_differences(*targets)
    for role, side in (("baseline", baseline), ("candidate", candidate)):
        warnings += [f"{role}: {line}" for line in side.warnings]
    chosen = [_phases(side, paired=b is None) for side in (baseline, candidate)]
    quantities = [_quantity(key, baseline, candidate, chosen, threshold) for key in QUANTITIES]
    if all(q.ratio is None for q in quantities):
        raise DesksideError("the two sides have no runs of the same name")
    return Comparison(
        baseline=_label(targets[0]),
        candidate=_label(targets[1]),
        paired_in_time=b is None,
        threshold=threshold,
        quantities=quantities,
        warnings=warnings,
    )


def _label(target: Target) -> str:
    part = part_of(target)
    slice_ = label(part) if part is not None else ""
    return ", ".join(text for text in (target.name, slice_, target.engine) if text) or "unnamed"


def _phases(side: Side, *, paired: bool) -> set[str]:
    """The phases of runs that count.

    Interleaved pairs count from the start, because warm-up affects both runs of a pair. To cut it
    off would leave to chance which pairs remain.
    """
    warm = {"warm-up", "steady"}
    if paired and any(row.phase in warm for row in side.rows):
        return warm
    return {row.phase for row in side.basis}


def _quantity(
    key: str, baseline: Side, candidate: Side, phases: Sequence[set[str]], threshold: float
) -> Quantity:
    name, more, get = QUANTITIES[key]
    theirs, ours = (
        _values(side, counted, get)
        for side, counted in zip((baseline, candidate), phases, strict=True)
    )
    ratio = median_ratio(_flat(ours), _flat(theirs))
    items = {}
    for item in dict.fromkeys(item for item, _ in theirs):
        found = median_ratio(*(_flat(v, item) for v in (ours, theirs)))
        if found is not None:
            items[item] = found
    verdict, regression = _verdict(ratio, more, threshold)
    return Quantity(key, name, more, ratio, items, verdict, regression)


def _values(
    side: Side, phases: set[str], get: Callable[[Row], float | None]
) -> dict[tuple[str, int], float]:
    """Values by item, and by the number of its earlier runs.

    Failed runs count as earlier runs, too, so that a failure on one side does not shift the pairs.
    """
    seen: Counter[str] = Counter()
    found = {}
    for row in side.rows:
        if row.phase == "extra":
            continue
        value = get(row)
        if value is not None and row.phase in phases:
            found[row.run.name, seen[row.run.name]] = value
        seen[row.run.name] += 1
    return found


def _flat(values: Mapping[tuple[str, int], float], item: str | None = None) -> dict[str, float]:
    return {f"{n}#{k}": v for (n, k), v in values.items() if item is None or n == item}


def _verdict(ratio: Ratio | None, more_is_faster: bool, threshold: float) -> tuple[str, bool]:
    if ratio is None:
        return "not measured on both", False
    if ratio.low is None or ratio.high is None or ratio.n < FEWEST:
        return TOO_FEW, False
    # As a ratio of speeds. For times, the ends of the interval swap.
    low, high = (ratio.low, ratio.high) if more_is_faster else (1 / ratio.high, 1 / ratio.low)
    if low > 1:
        return FASTER, False
    if high < 1:
        return SLOWER, high < 1 - threshold
    return SAME, False


def _differences(a: Record, b: Record) -> list[str]:
    """Lines that say what differs in two records but should be equal."""
    said = []
    for what in ("cpu", "cores", "memory", "kernel", "governor"):
        was, now = getattr(a.machine, what), getattr(b.machine, what)
        if was != now:
            said.append(f"{what} of the machine differs: {was} and {now}")
    for key in sorted(a.workload.keys() | b.workload.keys()):
        if a.workload.get(key) != b.workload.get(key):
            said.append(f"{key} of the workload differs")
    if a.seed != b.seed:
        said.append(f"the seed differs: {a.seed} and {b.seed}")
    return said


def _target_differences(a: Target, b: Target) -> list[str]:
    said = []
    hashes = [[f.sha256 for f in t.files if f.sha256] for t in (a, b)]
    if all(hashes) and hashes[0] != hashes[1]:
        said.append("the model files differ")
    elif not all(hashes):
        said.append("the model files cannot be compared: a hash is missing")
    if a.kind == b.kind == "deskside":
        for key in sorted(
            (a.options.keys() | b.options.keys()) - {"model"}
        ):  # hashes cover the model
            was, now = a.options.get(key), b.options.get(key)
            if was != now:
                said.append(f"option {key} differs: {was} and {now}")
    return said
