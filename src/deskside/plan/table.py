"""Shows a plan: groups of tensors, tables, JSON (docs/PLANNER.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from deskside.gguf.roles import Role, role
from deskside.machine.devices import Published, show_size
from deskside.plan.plan import Plan, Usage
from deskside.plan.remedies import Remedy
from deskside.plan.rules import layer_of
from deskside.plan.speed import Rate, Replayed, sources
from deskside.plan.units import KINDS

VERSION = 1


@dataclass(frozen=True)
class Group:
    """Tensors of one kind, on one device, for one reason. nbytes: of all `count` tensors."""

    pattern: str
    device: str
    reason: str
    kind: str
    count: int
    nbytes: int


def groups(plan: Plan) -> list[Group]:
    """All tensors in groups, in the order of KINDS."""
    infos = plan.tape.weights()
    by: dict[tuple[int, str, str, str], list[str]] = {}
    of_kind: dict[tuple[str, str], set[int | None]] = {}
    for name, device in plan.placement.items():
        kind = plan.kinds[name]
        key = (KINDS.index(kind), kind, device, plan.reasons[name])
        by.setdefault(key, []).append(name)
        of_kind.setdefault((kind, _suffix(name)), set()).add(layer_of(name))
    found = []
    for (_, kind, device, reason), names in sorted(by.items()):
        found.append(
            Group(
                _pattern(names, kind, of_kind),
                device,
                reason,
                kind,
                len(names),
                sum(infos[n].nbytes for n in names),
            )
        )
    return found


def _suffix(name: str) -> str:
    return name.split(".", 2)[2] if layer_of(name) is not None else name


def _pattern(
    names: Sequence[str], kind: str, of_kind: Mapping[tuple[str, str], set[int | None]]
) -> str:
    """Names as `blk.0-22.{ffn_gate_exps,…}`. `*` stands for all layers that have the tensor."""
    layers = {layer for n in names if (layer := layer_of(n)) is not None}
    globals_ = [n.removesuffix(".weight") for n in names if layer_of(n) is None]
    suffixes = list(dict.fromkeys(_suffix(n) for n in names if layer_of(n) is not None))
    parts = list(globals_)
    if suffixes:
        every = set().union(*(of_kind[kind, s] for s in suffixes))
        where = "*" if layers == every else ranges(sorted(layers))
        parts.insert(0, f"blk.{where}.{_braces([s.removesuffix('.weight') for s in suffixes])}")
    return " ".join(parts)


def _braces(suffixes: Sequence[str]) -> str:
    short = {Role.EXPERTS: "ffn_*_exps", Role.SHARED: "ffn_*_shexp"}
    if all(role(s) in short for s in suffixes):
        return short[role(suffixes[0])]
    return suffixes[0] if len(suffixes) == 1 else "{" + ",".join(sorted(suffixes)) + "}"


def ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers as 0-3,7."""
    parts: list[list[int]] = []
    for n in numbers:
        if parts and n == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], n]
        else:
            parts.append([n])
    return ",".join("-".join(map(str, p)) for p in parts)


def rate_label(rate: Rate) -> str:
    if rate.prompt:
        return f"prefill of {rate.prompt:,}"
    label = f"decode at {rate.depth:,}"
    return f"{label}, {rate.n_seq} sequences" if rate.n_seq > 1 else label


def published(plan: Plan, preset: str | None) -> list[tuple[Published, float]]:
    """Speeds that others measured of this model with these types of experts, each with its share (0
    to 1) of the roofline at depth 0."""
    decode = [r for r in plan.rates if not r.prompt and r.n_seq == 1]
    if not decode:
        return []
    roof = decode[0].roofline
    types = {w.type.name for n, w in plan.tape.weights().items() if role(n) is Role.EXPERTS}
    return [
        (p, p.decode / roof)
        for p in plan.machine.published
        if p.preset == preset and (not p.experts or types <= {*p.experts})
    ]


def show(plan: Plan, title: str, preset: str | None, console: Console | None = None) -> None:
    """Print the plan: memory by device, groups, rates and their sources. preset: as `published`."""
    out = console or Console(highlight=False)
    o = plan.options
    out.print(
        f"{title} on {plan.machine.name}: -c {o.ctx} --parallel {o.parallel} -ub {o.ubatch} "
        f"-ctk {o.ctk} -ctv {o.ctv}",
        markup=False,
        soft_wrap=True,
    )
    out.print()
    out.print(_memory_table(plan.usage))
    if mapped := sum(u.mapped for u in plan.usage):
        out.print(
            f"The embedding ({show_size(mapped)}) stays in the mapped file and is not counted.",
            style="dim",
        )
    out.print()
    for g in groups(plan):
        out.print(
            f"{g.pattern} -> {g.device}: {g.reason} ({g.count} tensors, {show_size(g.nbytes)})",
            markup=False,
            soft_wrap=True,
        )
    out.print()
    out.print(_rate_table(plan.rates))
    for p, share in published(plan, preset):
        out.print(
            f"{p.engine}: {p.decode} tok/s published ({p.source}), {100 * share:.0f} % of this "
            "plan's roofline at depth 0",
            markup=False,
            soft_wrap=True,
        )
        if beside := [r for r in plan.replayed if r.run in p.runs]:
            out.print()
            out.print(
                f"Published: measured by others with {p.engine}. Computed: for this plan.",
                markup=False,
                soft_wrap=True,
            )
            out.print(_beside(beside))
    out.print()
    for line in sources(plan.machine, plan.used):
        out.print(line, style="dim", markup=False, soft_wrap=True)
    if any(u.device.name != "cpu" for u in plan.usage):
        out.print(
            "GPU speed is computed from data sheets; deskside has measured none.", style="dim"
        )


def _memory_table(usage: Iterable[Usage]) -> Table:
    usage = list(usage)
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("memory")
    for u in usage:
        table.add_column(u.device.name, justify="right")
    for kind in KINDS:
        if any(kind in u.weights for u in usage):
            table.add_row(kind, *(_cell(u.weights.get(kind, 0)) for u in usage))
    for label, name in (
        ("keys and values", "kv"),
        ("recurrent state", "recurrent"),
        ("compute buffers", "buffers"),
        ("offloaded experts", "reserved"),
    ):
        if name != "reserved" or any(u.reserved for u in usage):
            table.add_row(label, *(_cell(getattr(u, name)) for u in usage))
    table.add_row("margin", *(_cell(u.device.margin) for u in usage))
    table.add_row("total", *(show_size(u.total) for u in usage), style="bold")
    table.add_row("free", *(show_size(u.free) for u in usage))
    table.add_row("of", *(show_size(u.device.memory) for u in usage))
    return table


def _cell(n: int) -> str:
    return show_size(n) if n else "-"


def _rate_table(rates: Iterable[Rate]) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0))
    for i, name in enumerate(("predicted", "tok/s", "roofline", "of it", "limit, of the time")):
        table.add_column(name, justify="right" if 0 < i < 4 else "left", no_wrap=True)
    for r in rates:
        table.add_row(
            rate_label(r),
            f"{r.rate:.1f}",
            f"{r.roofline:.1f}",
            f"{100 * r.share:.0f} %",
            f"{r.limit} ({100 * r.limit_share:.0f} %)",
        )
    return table


def _beside(replayed: Iterable[Replayed]) -> Table:
    """Published runs, with what is computed for them."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    table.add_column("\nprompt + answer", no_wrap=True)
    for what in ("PP tok/s", "TG tok/s", "total s"):
        table.add_column(f"{what}\npublished", justify="right", no_wrap=True)
        table.add_column(f"{what}\ncomputed", justify="right", no_wrap=True)
    for r in replayed:
        table.add_row(
            f"{r.run.prompt:,} + {r.run.generated:,}",
            f"{r.run.prefill:g}",
            f"{r.prefill.rate:.1f}",
            f"{r.run.decode:g}",
            f"{r.decode.rate:.1f}",
            f"{r.run.total:g}",
            f"{r.total:.1f}",
        )
    return table


def remedy_line(remedy: Remedy) -> str:
    decode = next(r for r in remedy.plan.rates if not r.prompt)
    return f"{remedy.flags}  ({decode.rate:.1f} tok/s predicted at depth 0)"


def _replayed(r: Replayed) -> dict[str, Any]:
    computed = {"prefill": r.prefill.rate, "decode": r.decode.rate, "total": r.total}
    return {**vars(r.run), "computed": computed}


def to_dict(plan: Plan, title: str, preset: str | None) -> dict[str, Any]:
    """The JSON of `--json`; docs/PLANNER.md has its schema."""
    return {
        "version": VERSION,
        "fits": True,
        "model": title,
        "machine": plan.machine.name,
        "options": asdict(plan.options),
        "devices": [
            {
                "name": u.device.name,
                "memory": u.device.memory,
                "weights": dict(u.weights),
                "mapped": u.mapped,
                "kv": u.kv,
                "recurrent": u.recurrent,
                "buffers": u.buffers,
                "offloaded_experts": u.reserved,
                "margin": u.device.margin,
                "total": u.total,
                "free": u.free,
                "rates": {
                    name: {"value": f.value, "source": f.source}
                    for name, f in u.device.figures().items()
                },
            }
            for u in plan.usage
        ],
        "groups": [vars(g) for g in groups(plan)],
        "placement": dict(plan.placement),
        "states": list(plan.state_devices),
        "rates": [{**vars(r), "seconds": dict(r.seconds), "share": r.share} for r in plan.rates],
        "published": [
            {
                **vars(p),
                "share_of_roofline": share,
                "runs": [_replayed(r) for r in plan.replayed if r.run in p.runs],
            }
            for p, share in published(plan, preset)
        ],
        "sources": sources(plan.machine, plan.used),
    }
