"""The tables of `deskside bench` on the terminal."""

from __future__ import annotations

from rich.markup import escape
from rich.table import Table

from deskside.bench.record import Record, Run
from deskside.bench.report.facts import share
from deskside.bench.report.tables import number, percent
from deskside.bench.workload import Workload, shipped
from deskside.console import printable, wide


def show_workloads() -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("workload", "what it is", "runs", "most tokens"):
        table.add_column(title)
    for name in shipped():
        w = Workload.read(name)
        runs = "the tree's" if any(i.tree for i in w.items) else str(len(w.items))
        max_depth = max(depth for _, depth in w.depths())
        table.add_row(name, w.description, runs, f"{max_depth:,}")
    wide().print(table)


def show(record: Record) -> None:
    """Print the runs, and the profile if there is one."""
    console = wide()
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="fold")
    for title in ("prompt", "cached", "made", "TTFT s", "PP tok/s", "TG tok/s", "of ceiling"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    sides = len(record.targets) > 1
    for run in record.runs:
        name = f"{run.side} {run.name}" if sides else run.name
        name += " (warm-up)" if run.warmup else " (cold)" if run.cold else ""
        table.add_row(escape(printable(name)), *_cells(run))
    console.print(table)
    lines = [f"{run.name} failed: {run.error}" for run in record.runs if run.error is not None]
    for entry in record.workload.get("skipped", []):
        lines.append(f"{entry['name']} was left out: it {entry['reason']}")
    for line in lines:
        console.print(printable(line), markup=False, soft_wrap=True)
    if record.profile:
        console.print(_profile_table(record))


def _cells(run: Run) -> list[str]:
    if not run.ok:
        return ["failed"]
    return [
        f"{run.prompt_tokens:,}",
        f"{run.cached_tokens:,}" if run.cached_tokens else "",
        f"{run.generated_tokens:,}",
        number(run.first_seconds),
        number(run.prefill_rate),
        number(run.decode_rate),
        percent(share(run.decode_rate, run.ceiling.decode_rate)),
    ]


def _profile_table(record: Record) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("step of the model")
    for title in ("phase", "µs/token", "share", "MB/token", "M products/token"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    for row in record.profile:
        total = sum(r.seconds for r in record.profile if r.phase == row.phase)
        table.add_row(
            escape(printable(row.name)),
            row.phase,
            number(row.seconds * 1e6),
            percent(share(row.seconds, total)),
            number((row.nbytes or 0) / 1e6),
            number((row.macs or 0) / 1e6),
        )
    return table
