"""README's tables of speeds, computed from the records in docs/benchmarks.

    python -m tools.compare.readme

`tests/test_readme.py` holds README to what this prints.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deskside.bench.predict import slices
from deskside.bench.report.stats import Ratio, median_ratio
from tools.compare import record, report
from tools.compare.plan import ENGINES, IK, LLAMA, OURS, PEERS, ROOT, Test, stages

RECORDS = ROOT / "docs" / "benchmarks"
# Records by table: of deskside and its peers; a peer's from another one where it has a record of
# its own.
TABLES: tuple[dict[str, str], ...] = (
    {OURS: "35b-a3b-8l-xeon-3rounds"},
    {OURS: "397b-a17b-4l-xeon-ik", LLAMA: "397b-a17b-4l-xeon"},
    {OURS: "35b-a3b-4l-128e-xeon-avx2-quick"},
)
# Of one slice on one machine: their spread is what a single one does not show.
SPREAD = ("35b-a3b-8l-xeon", "35b-a3b-8l-xeon-3rounds", "35b-a3b-8l-xeon-quick")
DECODE = "decode, depth 0"


def load(name: str) -> tuple[dict[str, Any], str, dict[str, Any]]:
    """A record, and the name and entry of its only file."""
    kept = record.load(RECORDS / f"{name}.json")
    ((file, entry),) = kept["files"].items()
    return kept, file, entry


def table(names: dict[str, str]) -> str:
    """One table in Markdown and what it rests on."""
    kept, file, entry = load(names[OURS])
    peers = {peer: load(names.get(peer, names[OURS]))[2] for peer in PEERS}
    part = slices.named(Path(file).stem)
    assert part is not None
    layers = slices.full(part.preset).layers
    lines = [
        f"| | deskside, tok/s | / llama.cpp | / ik_llama.cpp | of the limit | all {layers} layers, "
        "computed |",
        "|---|---|---|---|---|---|",
    ]
    quick = kept["settings"]["quick"]
    for test in (t for s in stages(quick=quick, rounds=entry["rounds"]) for t in s.tests):
        ours = entry["samples"].get(test.name, {}).get(OURS, {})
        bound = report.bound_of(entry, test)
        whole = report.whole_rate(part, entry, test, quick)
        if not ours or bound is None or whole is None:
            continue
        share = report.median(ours) / bound.rate
        lines.append(
            f"| {test.name} | {report.rate(report.median(ours))} "
            f"| {_ratio(peers[LLAMA], test, LLAMA)} | {_ratio(peers[IK], test, IK)} "
            f"| {share:.0%} of {report.BINDS[bound.of]} | {report.rate(whole)} |".replace("%", " %")
        )
    said = _facts(file, entry, peers, names)
    return "\n".join(lines) + "\n\n" + " ".join(f"{sentence}." for sentence in said)


def _ratio(entry: dict[str, Any], test: Test, peer: str) -> str:
    """Of the peer's best engine; why there is none."""
    _, theirs = report.fastest(entry, test.name, peer)
    found = median_ratio(entry["samples"].get(test.name, {}).get(OURS, {}), theirs)
    if found is None:
        died = any(
            test.name in reasons and "died" in reasons[test.name]
            for engine, reasons in entry["left_out"].items()
            if engine.startswith(peer)
        )
        return "crashed" if died else "-"
    return ratio(found)


def ratio(x: Ratio) -> str:
    if x.low is None or x.high is None:
        return f"{x.median:.2f}"
    return f"{x.median:.2f} ({x.low:.2f} to {x.high:.2f})"


def _facts(
    file: str, entry: dict[str, Any], peers: dict[str, dict[str, Any]], names: dict[str, str]
) -> Iterator[str]:
    part = slices.named(Path(file).stem)
    assert part is not None
    share = slices.Slice(part.preset, part.layers, part.experts).head_share
    yield (
        f"{slices.label(part)} of {part.preset}, random weights, {entry['bytes'] / 1e9:.1f} GB; "
        f"{share:.0%} of the bytes of a decoded token are the head, which the whole model has "
        "once".replace("%", " %")
    )
    bandwidth, compute = (statistics.median(entry[k]) / 1e9 for k in ("bandwidth", "compute"))
    rounds = {OURS: entry["rounds"], **{p: e["rounds"] for p, e in peers.items()}}
    counted = ", ".join(
        f"{p} {n} round{'s' * (n > 1)}" for p, n in rounds.items() if n != entry["rounds"]
    )
    yield (
        f"Limits in the run: {bandwidth:.1f} GB/s and {compute:.0f} G products/s, medians; "
        f"{entry['rounds']} rounds{f' ({counted})' if counted else ''}"
    )
    loads = {OURS: report.median(entry["load"][OURS])}
    for peer, theirs in peers.items():
        loads |= {e: report.median(s) for e, s in theirs["load"].items() if e.startswith(peer)}
    yield "Loading took " + ", ".join(f"{e} {s:.1f} s" for e, s in loads.items())
    systems = {e: s for theirs in peers.values() for e, s in theirs["systems"].items()}
    builds = report.amx({"systems": systems})
    yield f"Builds: {builds}" + (f"; {report.AMX}" if "with AMX" in builds else "")
    yield "Options: " + "; ".join(f"{e.name}: {e.said}" for e in ENGINES if e.name in systems)
    yield "Records: " + ", ".join(map(_link, dict.fromkeys(names.values())))


def spread() -> str:
    """Decode over ik_llama.cpp in every record of one slice."""
    found = []
    for name in SPREAD:
        entry = load(name)[2]
        _, theirs = report.fastest(entry, DECODE, IK)
        one = median_ratio(entry["samples"][DECODE][OURS], theirs)
        assert one is not None
        found.append((one.median, name))
    return ", ".join(f"{x:.2f} ({_link(name)})" for x, name in sorted(found))


def _link(name: str) -> str:
    return f"[{name}](docs/benchmarks/{name}.json)"


def texts() -> list[str]:
    """Everything that README must hold."""
    return [*map(table, TABLES), spread()]


if __name__ == "__main__":
    print("\n\n".join(texts()))
