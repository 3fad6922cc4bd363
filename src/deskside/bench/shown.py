"""The tables of `deskside bench` on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deskside.bench.record import Record, Run
from deskside.bench.workload import Workload, shipped


def show_workloads() -> None:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("workload", "what it is", "runs", "most tokens"):
        table.add_column(title)
    for name in shipped():
        w = Workload.read(name)
        runs = "the tree's" if any(i.tree for i in w.items) else str(len(w.items))
        most = max(depth for _, depth in w.depths())
        table.add_row(name, w.description, runs, f"{most:,}")
    Console(highlight=False).print(table)


def show(record: Record) -> None:
    """The runs, and the profile where there is one."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("run", no_wrap=True)
    for title in ("prompt", "cached", "made", "TTFT s", "PP tok/s", "TG tok/s", "% of limit"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    sides = len(record.targets) > 1
    for run in record.runs:
        name = f"{run.side} {run.name}" if sides else run.name
        name += " (warm-up)" if run.warmup else " (cold)" if run.cold else ""
        table.add_row(escape(name), *_cells(run))
    console.print(table)
    for run in record.runs:
        if run.error is not None:
            console.print(f"{run.name} failed: {run.error}", markup=False)
    for entry in record.workload.get("skipped", []):
        console.print(f"{entry['name']} was left out: it {entry['reason']}", markup=False)
    if record.profile:
        console.print(_profile_table(record))


def _cells(run: Run) -> list[str]:
    if not run.ok:
        return ["failed"]
    limit = run.ceiling.decode_rate
    share = 100 * run.decode_rate / limit if run.decode_rate and limit else None
    return [
        str(run.prompt_tokens),
        str(run.cached_tokens or ""),
        str(run.generated_tokens),
        _figure(run.first_seconds, 2),
        _figure(run.prefill_rate, 1),
        _figure(run.decode_rate, 2),
        _figure(share, 0),
    ]


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _profile_table(record: Record) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("step of the model")
    for title in ("phase", "µs/token", "%", "MB/token", "M products/token"):
        table.add_column(title, justify="right", no_wrap=True, min_width=len(title))
    for row in record.profile:
        total = sum(r.seconds for r in record.profile if r.phase == row.phase)
        table.add_row(
            row.name,
            row.phase,
            f"{row.seconds * 1e6:.1f}",
            _figure(100 * row.seconds / total if total else None, 1),
            _figure((row.nbytes or 0) / 1e6, 3),
            _figure((row.macs or 0) / 1e6, 3),
        )
    return table
