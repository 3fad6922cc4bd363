"""The tables of a record."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deskside.bench.report.stats import Ratio, median_ratio
from deskside.tape.cost import limit
from tools.compare.plan import ENGINES, OURS, PEERS, Test

IDLE_LIMIT = 0.02  # share of a core that a waiting engine may use
PYTHON_LIMIT = 0.01
COPY_LIMIT = 1.5


def show(record: dict[str, Any], tests: Iterable[Test], console: Console | None = None) -> None:
    """Print a record, with one table per file."""
    # A pipe has no width, and a narrow table would cut figures.
    out = console or Console(highlight=False)
    if console is None and not out.is_terminal:
        out = Console(highlight=False, width=170)
    tests = list(tests)
    machine = record["machine"]
    out.print(
        f"{machine['cpu']}, {record['settings']['threads']} threads, {record['date']}, deskside "
        f"{machine['commit'][:10]}{' (changed)' if machine.get('changed') else ''}"
    )
    for engine, version in record["versions"].items():
        out.print(f"{engine}: {escape(version)}")
    for engine in ENGINES:
        out.print(f"{engine.name}: {engine.said}")
    for name, entry in record["files"].items():
        out.print()
        out.print(speeds(name, entry, tests))
        for line in notes(entry, tests):
            out.print(escape(line))
    out.print(
        "\ntok/s: medians over rounds. A ratio is deskside's rate over the peer's within a round: "
        "its median, its 95 % bootstrap interval and the target. Of ik_llama.cpp without and with "
        "-rtr (marked r) the faster counts. limit: measured bandwidth over the bytes of a token, "
        "or measured int8 compute over its multiply-adds. Beside it is deskside's share."
    )


def speeds(name: str, entry: dict[str, Any], tests: Iterable[Test]) -> Table:
    loaded = {"all": "engines loaded together", "one": "one engine loaded at a time"}
    table = Table(
        title=f"{name} ({entry['bytes'] / 1e9:.1f} GB), {entry['rounds']} rounds, "
        f"{loaded[entry['loading']]}"
    )
    table.add_column("test")
    headings = ("deskside", *(h for p in PEERS for h in (p, "ratio")), "limit", "share")
    for heading in headings:
        table.add_column(heading, justify="right")
    for test in tests:
        if any(entry["samples"].get(test.name, {}).values()) or test.name in entry["work"]:
            table.add_row(test.name, *cells(entry, test))
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
    row.append("-" if bound is None else rate(bound))
    if bound is None or not ours:
        return [*row, "-"]
    share = median(ours) / bound
    target = test.targets.get("limit")
    verdict = "" if target is None else f" / {target:.0%} {passed(share >= target)}"
    return [*row, f"{share:.0%}{verdict}"]


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


def bound_of(entry: dict[str, Any], test: Test) -> float | None:
    """The machine's limit for a test, in tokens per second, from figures of this run."""
    if test.name not in entry["work"]:
        return None
    bandwidth, compute = (
        statistics.median(entry[key]) if entry[key] else None for key in ("bandwidth", "compute")
    )
    return limit(entry["work"][test.name], bandwidth, compute, prefill=test.kind == "prefill")


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
