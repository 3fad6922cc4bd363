"""The tables of a record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deskside.bench.predict import slices
from deskside.bench.record import Part
from deskside.bench.report.stats import Ratio, median_ratio
from deskside.tape.cost import Limit, limit
from tools.compare.plan import ENGINES, OURS, PEERS, Engine, Test, amounts, stages

IDLE_LIMIT = 0.02  # share of a core that a waiting engine may use
PYTHON_LIMIT = 0.01
COPY_LIMIT = 1.5
BINDS = {"bandwidth": "bandwidth", "compute": "arithmetic"}  # of `Limit.of`
AMX = (
    "GCC before 12.4 and 13.3 breaks llama.cpp's AMX code, and `make bench-peers NATIVE=1` builds "
    "it with a header of ours that mends that (tools/compare/prepare.py)"
)


def show(record: dict[str, Any], tests: Iterable[Test], console: Console | None = None) -> None:
    """Print a record, with one table per file."""
    # A pipe has no width, and a narrow table would cut figures.
    out = console or Console(highlight=False)
    if console is None and not out.is_terminal:
        out = Console(highlight=False, width=200)
    tests = list(tests)
    machine = record["machine"]
    out.print(
        f"{machine['cpu']}, {record['settings']['threads']} threads, {record['date']}, deskside "
        f"{machine['commit'][:10]}{' (changed)' if machine.get('changed') else ''}"
    )
    for engine, version in record["versions"].items():
        out.print(f"{engine}: {escape(version)}")
    for engine in engines(record):
        out.print(f"{engine.name}: {engine.said}")
    quick = record["settings"]["quick"]
    for name, entry in record["files"].items():
        out.print()
        out.print(speeds(name, entry, tests, quick))
        for line in (*slice_notes(name), *notes(entry, tests)):
            out.print(escape(line))
    out.print(
        "\ntok/s: medians over rounds. A ratio is deskside's rate over the peer's within a round: "
        "its median, its 95 % bootstrap interval and the target. Of ik_llama.cpp without and with "
        "-rtr (marked r) the faster counts. limit: measured bandwidth over the bytes of a token, "
        "or measured int8 arithmetic over its multiply-adds. Beside it is deskside's share, and "
        "which of the two it is."
    )


def engines(record: dict[str, Any]) -> list[Engine]:
    """Those that took part; all where a record names none."""
    named = record["settings"]["engines"]
    return [e for e in ENGINES if not named or e.name in named]


def speeds(name: str, entry: dict[str, Any], tests: Iterable[Test], quick: bool) -> Table:
    loaded = {"all": "engines loaded together", "one": "one engine loaded at a time"}
    table = Table(
        title=f"{name} ({entry['bytes'] / 1e9:.1f} GB), {entry['rounds']} rounds, "
        f"{loaded[entry['loading']]}"
    )
    table.add_column("test")
    headings = ["deskside", *(h for p in PEERS for h in (p, "ratio")), "limit", "share"]
    part = slices.named(Path(name).stem)
    if part is not None:
        headings.append(f"{slices.full(part.preset).layers} layers, computed")
    for heading in headings:
        table.add_column(heading, justify="right")
    for test in tests:
        if any(entry["samples"].get(test.name, {}).values()) or test.name in entry["work"]:
            row = cells(entry, test)
            if part is not None:
                whole = whole_rate(part, entry, test, quick)
                row.append("-" if whole is None else rate(whole))
            table.add_row(test.name, *row)
    return table


def cells(entry: dict[str, Any], test: Test) -> list[str]:
    """The cells of a row after its name."""
    ours = entry["samples"].get(test.name, {}).get(OURS, {})
    row = [rate(median(ours)) if ours else "-"]
    for peer in PEERS:
        best, theirs = fastest(entry, test.name, peer)
        mark = " r" if best.endswith("-rtr") else ""
        row.append(rate(median(theirs)) + mark if theirs else "-")
        ratio = median_ratio(ours, theirs)
        row.append(judged(ratio, test.targets.get(peer)))
    bound = bound_of(entry, test)
    row.append("-" if bound is None else rate(bound.rate))
    if bound is None or not ours:
        return [*row, "-"]
    share = median(ours) / bound.rate
    target = test.targets.get("limit")
    verdict = "" if target is None else f" / {target:.0%} {passed(share >= target)}"
    return [*row, f"{share:.0%} of {BINDS[bound.of]}{verdict}"]


def median(samples: Mapping[str, float]) -> float:
    return statistics.median(samples.values())


def fastest(entry: dict[str, Any], test: str, peer: str) -> tuple[str, dict[str, float]]:
    """The engine of the peer with the highest median, and its samples; empty if none has any."""
    samples = entry["samples"].get(test, {})
    names = [e.name for e in ENGINES if e.peer == peer and samples.get(e.name)]
    if not names:
        return "", {}
    best = max(names, key=lambda name: median(samples[name]))
    return best, samples[best]


def bound_of(
    entry: dict[str, Any], test: Test, work: dict[str, float] | None = None
) -> Limit | None:
    """The machine's limit for a test, from figures of this run.

    work: of a token, if not of the file that was run.
    """
    work = work or entry["work"].get(test.name)
    if work is None:
        return None
    bandwidth, compute = (
        statistics.median(entry[key]) if entry[key] else None for key in ("bandwidth", "compute")
    )
    return limit(work, bandwidth, compute, prefill=test.kind == "prefill")


def whole_rate(part: Part, entry: dict[str, Any], test: Test, quick: bool) -> float | None:
    """deskside's tokens per second with all layers and experts, computed: the slice's share of its
    limit, of the whole model's limit on the same machine."""
    ours = entry["samples"].get(test.name, {}).get(OURS, {})
    own = bound_of(entry, test)
    model = slices.full(part.preset).work
    for stage in stages(quick=quick, rounds=entry["rounds"]):
        if ours and own and test.name in (t.name for t in stage.tests):
            whole = bound_of(entry, test, amounts(model, stage, test, entry["rounds"]))
            return whole and median(ours) / own.rate * whole.rate
    return None


def slice_notes(name: str) -> Iterable[str]:
    """What a file is of a model, if it is a slice."""
    part = slices.named(Path(name).stem)
    if part is not None:
        share = slices.Slice(part.preset, part.layers, part.experts).head_share
        yield (
            f"{slices.label(part)} of {part.preset}, random weights: {share:.0%} of the bytes of a "
            "decoded token are the head, which the whole model has once, so rates do not scale "
            "with layers; for all layers deskside's share of its limit is taken as the slice's"
        )


def amx(entry: dict[str, Any]) -> str:
    """Whether the peers' builds have AMX; "" where no peer tells."""
    told = {e: "AMX" in on(s) for e, s in entry["systems"].items() if e != OURS}
    return ", ".join(f"{e} {'with' if has else 'without'} AMX" for e, has in told.items())


def judged(ratio: Ratio | None, target: float | None) -> str:
    if ratio is None:
        return "-"
    if target is None:
        return str(ratio)
    return f"{ratio} / {target:g} {passed(ratio.median >= target)}"


def passed(ok: bool) -> str:
    return "[green]pass[/green]" if ok else "[red]FAIL[/red]"


def rate(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.3g}"


def notes(entry: dict[str, Any], tests: Iterable[Test]) -> Iterable[str]:
    """Lines for what does not fit the table: other targets, limits, memory, skipped tests."""
    yield from _kv(entry, list(tests))
    shares = {t: median(s) for t, s in entry["python"].items() if s}
    if shares:
        worst = max(shares, key=lambda t: shares[t])
        yield (
            f"Python's share of decode: {shares[worst]:.2%} ({worst}) / {PYTHON_LIMIT:.0%} "
            f"{plain(shares[worst] <= PYTHON_LIMIT)}"
        )
    yield from _loads(entry)
    for key, unit, what in (
        ("bandwidth", "GB/s", "read bandwidth"),
        ("compute", "int8 GMAC/s", "compute limit"),
    ):
        x = [value / 1e9 for value in entry[key]]
        if x:
            middle = statistics.median(x)
            yield f"{what}: {middle:.1f} {unit} ({min(x):.1f}..{max(x):.1f}, {len(x)} samples)"
    for engine, system in entry["systems"].items():
        yield f"{engine} has {on(system)}"
    if "with AMX" in amx(entry):
        yield AMX
    for engine, found in entry["ubatch"].items():
        for context, choice in found.items():
            tried = ", ".join(f"{u}: {rate(x)} tok/s" for u, x in choice["tok/s"].items())
            yield f"{engine}, {context}: ubatch {choice['taken']} of {tried}"
    for engine, reasons in entry["left_out"].items():
        for reason in dict.fromkeys(reasons.values()):
            names = ", ".join(t for t, why in reasons.items() if why == reason)
            yield f"{engine} left out {names}: {reason}"
    for name, share in entry["idle"].items():
        if share > IDLE_LIMIT:
            yield f"{name} used {share:.0%} of a core while another engine was timed"


def on(system: str) -> str:
    """The instruction sets that a library says it was compiled for."""
    parts = [part.strip() for part in system.split("|")]
    if len(parts) < 2:
        return system
    return " ".join(part.split(" = ")[0].split(" : ")[-1] for part in parts if part.endswith("= 1"))


def _kv(entry: dict[str, Any], tests: list[Test]) -> Iterable[str]:
    """q8_0 KV must not be slower than f16."""
    for test in tests:
        other = test.name.replace("q8_0", "f16")
        if other != test.name:
            samples = entry["samples"]
            ratio = median_ratio(
                samples.get(test.name, {}).get(OURS, {}), samples.get(other, {}).get(OURS, {})
            )
            if ratio:
                yield f"{test.name} over f16: {ratio} / 1 {plain(ratio.median >= 1)}"


def _loads(entry: dict[str, Any]) -> Iterable[str]:
    copy = entry["copy"]
    # If memory does not hold the file twice, only a part was copied.
    copied = {
        threads: min(seconds) * entry["bytes"] / copy["bytes"]
        for threads, seconds in copy.get("seconds", {}).items()
    }
    if copied:
        text = ", ".join(f"{s:.2f} s with {n} thread(s)" for n, s in copied.items())
        part = "" if copy["bytes"] >= entry["bytes"] else f" (from {copy['bytes'] / 1e9:.1f} GB)"
        yield f"copying the file into memory: {text}{part}"
    for engine, loads in entry["load"].items():
        held = entry["rss"].get(engine, {})
        memory = ", ".join(f"{b / 1e9:.2f} GB {kind}" for kind, b in held.items())
        verdict = ""
        if engine == OURS and copied:
            ratio = median(loads) / min(copied.values())
            verdict = f", {ratio:.2f} of the copy / {COPY_LIMIT} {plain(ratio <= COPY_LIMIT)}"
        yield f"{engine} loads in {median(loads):.2f} s (n={len(loads)}{verdict}); then {memory}"


def plain(ok: bool) -> str:
    return "pass" if ok else "FAIL"
