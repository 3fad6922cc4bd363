"""`deskside bench`: from flags or a record to targets, the runs, and a table of them."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from deskside.bench import endpoint, measure, targets
from deskside.bench.hashes import hashed
from deskside.bench.profile import profile
from deskside.bench.record import Record, Run, Target
from deskside.bench.workload import Workload, shipped
from deskside.config import EngineConfig, demo_model
from deskside.console import err, note, progress_bar
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.progress import Progress

DEFAULT_WORKLOAD = "article"
# Of the request, by what they decide; the rest is how to go about it.
ENGINE = ("ctx", "threads", "ubatch", "ctk", "ctv", "isa")
SAMPLING = {
    "temp": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repeat_penalty": "repeat_penalty",
}
SHAPE = ("workload", "runs", "warmup", "scale", "max_prompt", "max_tokens", "text", "ignore_eos")
WHERE = ("model", "endpoint", "endpoint_model")
DRAWN_PER_SECOND = 1.0


@dataclass(frozen=True)
class Request:
    """The flags of `deskside bench`; None where one was not given."""

    model: Path | None = None
    endpoint: str | None = None
    endpoint_model: str | None = None
    api_key: str | None = None
    timeout: float = 600.0
    vs: str | None = None
    workload: str | None = None
    list: bool = False
    runs: int | None = None
    warmup: str | None = None
    scale: float | None = None
    max_prompt: int | None = None
    max_tokens: int | None = None
    text: Path | None = None
    ctx: int | None = None
    threads: int | None = None
    ubatch: int | None = None
    ctk: str | None = None
    ctv: str | None = None
    isa: str | None = None
    temp: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repeat_penalty: float | None = None
    seed: int | None = None
    ignore_eos: bool | None = None
    out: Path | None = None
    force: bool = False
    resume: Path | None = None
    replay: Path | None = None
    no_hash: bool = False
    profile: bool = False
    no_report: bool = False

    def given(self, names: Sequence[str]) -> dict[str, Any]:
        """Those of the flags that the command line had."""
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Side:
    """A target to be: a model file with engine options, or a server's URL and model."""

    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    @property
    def is_server(self) -> bool:
        return endpoint.is_url(self.where)


@dataclass(frozen=True)
class Task:
    """What to measure, whether flags or a record said so."""

    workload: Workload
    sides: Mapping[str, Side]
    seed: int


def main(request: Request) -> None:
    if request.list:
        _list()
        return
    if request.resume is not None and request.replay is not None:
        raise DesksideError("--resume goes on with a record, --replay repeats one: use one of them")
    record = None if request.resume is None else Record.load(request.resume)
    task = _task(request, record)
    out = _out(request, request.out)
    with ExitStack() as stack:
        with progress_bar() as progress:
            opened = _open(task, request, progress, stack)
        out = out or _out(request, _name(task, opened))
        assert out is not None
        try:
            with progress_bar(DRAWN_PER_SECOND) as progress:
                record = measure.characterise(
                    task.workload,
                    opened,
                    out,
                    seed=task.seed,
                    resume=record,
                    command=_command(sys.argv[1:]),
                    progress=progress,
                )
                if request.profile:
                    _profile(record, opened, out, progress)
        except KeyboardInterrupt:
            n = len(Record.load(out).runs) if out.exists() else 0
            note(f"stopped; {n} runs are in {out}; deskside bench --resume {out} goes on")
            raise typer.Exit(130) from None
    show(record)
    err.print(f"wrote {out}", markup=False)
    if not request.no_report:
        from deskside.bench import report

        report.write(record, out)


# what to measure


def _task(request: Request, resumed: Record | None) -> Task:
    """From the flags, or from the record that is resumed without further flags or replayed."""
    described = request.given((*WHERE, "vs", "seed", *ENGINE, *SAMPLING, *SHAPE))
    if resumed is not None and not described:
        return _of_record(resumed, str(request.resume))
    if request.replay is not None:
        other = sorted(described.keys() - set(WHERE))
        if other:
            raise DesksideError(
                f"--replay repeats what {request.replay} says; --{other[0].replace('_', '-')} "
                "has no place beside it"
            )
        task = _of_record(Record.load(request.replay), str(request.replay))
        if request.model is None and request.endpoint is None:
            return task
        place = _first(request, dict(task.sides["A"].options))
        return dataclasses.replace(task, sides={**task.sides, "A": place})
    options = request.given(ENGINE)
    sides = {"A": _first(request, options)}
    if request.vs is not None:
        other_side = Side(request.vs)
        sides["B"] = other_side if other_side.is_server else Side(request.vs, options)
    if options and all(side.is_server for side in sides.values()):
        flag = next(iter(options)).replace("ctx", "ctx-size")
        raise DesksideError(f"--{flag}: a server's own affair; start the server with it")
    return Task(_workload(request), sides, request.seed or 0)


def _first(request: Request, options: dict[str, Any]) -> Side:
    if request.endpoint is None:
        if request.endpoint_model is not None:
            raise DesksideError("--endpoint-model needs --endpoint")
        return Side(str(request.model or demo_model()), options)
    if request.model is not None:
        raise DesksideError("-m and --endpoint are two things to measure; compare them with --vs")
    if not endpoint.is_url(request.endpoint):
        raise DesksideError(f"--endpoint {request.endpoint}: expected http://HOST:PORT")
    return Side(request.endpoint, {}, request.endpoint_model)


def _workload(request: Request) -> Workload:
    workload = Workload.read(request.workload or DEFAULT_WORKLOAD)
    workload = workload.shrunk(request.scale, request.max_prompt, request.max_tokens)
    changes: dict[str, Any] = {}
    if request.runs is not None:
        if request.runs < 1:
            raise DesksideError(f"--runs {request.runs}: expected at least 1")
        changes["repeats"] = request.runs
    if request.warmup is not None:
        if request.warmup != "auto" and not request.warmup.isdecimal():
            raise DesksideError(f"--warmup {request.warmup}: expected auto or a number of runs")
        changes["warmup"] = 0 if request.warmup == "auto" else int(request.warmup)
    if request.text is not None:
        changes["text"] = str(request.text)
    if request.ignore_eos is not None:
        changes["ignore_eos"] = request.ignore_eos
    sampling = {SAMPLING[name]: value for name, value in request.given(list(SAMPLING)).items()}
    if sampling:
        changes["sampling"] = dataclasses.replace(workload.sampling, **sampling)
    return dataclasses.replace(workload, **changes)


def _of_record(record: Record, source: str) -> Task:
    derived = ("skipped", "text_digest")
    data = {key: value for key, value in record.workload.items() if key not in derived}
    workload = Workload.from_dict(data, f"{source}: workload")
    sides = {side: _side(target, source) for side, target in record.targets.items()}
    return Task(workload, sides, record.seed)


def _side(target: Target, source: str) -> Side:
    if target.kind == "endpoint":
        return Side(target.url or "", {}, target.name)
    model = target.options.get("model")
    if not isinstance(model, str):
        raise DesksideError(f"{source}: does not say which file was measured; name it with -m")
    known = EngineConfig.__dataclass_fields__.keys()
    return Side(model, {k: v for k, v in target.options.items() if k in known and v is not None})


# targets


def _open(
    task: Task, request: Request, progress: Progress, stack: ExitStack
) -> dict[str, targets.TargetRunner]:
    """The targets, ready to run. The files of a replay are compared before any is loaded."""
    if request.replay is not None:
        _expect_files(task, request, progress)
    local = {name: side for name, side in task.sides.items() if not side.is_server}
    opened: dict[str, targets.TargetRunner] = {}
    for name, side in task.sides.items():
        target: targets.TargetRunner
        if side.is_server:
            target = endpoint.connect(
                side.where,
                model=side.model,
                api_key=request.api_key,
                seconds=request.timeout,
                sha=not request.no_hash,
                progress=progress,
            )
        else:
            # The second one is loaded when the first one already has its share of the memory.
            others = [s.where for s in local.values() if s is not side]
            target = targets.load(
                side.where,
                task.workload,
                beside=others[0] if others and not opened else None,
                sha=not request.no_hash,
                progress=progress,
                **side.options,
            )
        stack.callback(target.close)
        opened[name] = target
    return opened


def _expect_files(task: Task, request: Request, progress: Progress) -> None:
    assert request.replay is not None
    record = Record.load(request.replay)
    for name, side in task.sides.items():
        named = name == "A" and (request.model or request.endpoint)
        old = record.targets[name]
        if side.is_server or named or not old.files:
            continue
        files = hashed(GGUF.open(side.where).paths, not request.no_hash, progress)
        measure.check_files(old, dataclasses.replace(old, files=files), str(request.replay))


def _out(request: Request, out: Path | None) -> Path | None:
    """Where the record goes, if that is known: the record that is resumed, or a new file."""
    if request.resume is not None:
        if request.out is not None and request.out != request.resume:
            raise DesksideError("--resume goes on in its own file; leave out --out")
        return request.resume
    if out is None:
        return None
    if out.exists() and not request.force:
        raise DesksideError(f"{out}: exists; --force overwrites it, --resume {out} goes on with it")
    if out.is_dir() or not out.parent.is_dir():
        raise DesksideError(f"--out {out}: expected a file in a folder that exists")
    return out


def _name(task: Task, opened: Mapping[str, targets.TargetRunner]) -> Path:
    names = []
    for name, side in task.sides.items():
        label = opened[name].describe().name if side.is_server else Path(side.where).stem
        names.append("".join(c if c.isalnum() or c in "-._" else "-" for c in label)[:60])
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return Path(f"{'-vs-'.join(names)}-{task.workload.name}-{stamp}.json".lstrip("."))


def _command(arguments: Sequence[str]) -> list[str]:
    """The command line without what must not be recorded."""
    kept: list[str] = []
    for argument in arguments:
        flag, equals, _ = argument.partition("=")
        if kept and kept[-1] == "--api-key":
            argument = "…"
        elif flag == "--api-key" and equals:
            argument = "--api-key=…"
        kept.append(argument)
    return kept


def _profile(
    record: Record, opened: Mapping[str, targets.TargetRunner], out: Path, progress: Progress
) -> None:
    """At the middle of the depths that were run, of side A or of the one that is in process."""
    target = next((t for t in opened.values() if isinstance(t, targets.InProcess)), None)
    if target is None:
        raise DesksideError("--profile: a server does not tell the time of its steps")
    depths = sorted(run.depth for run in record.runs if run.ok) or [1]
    depth = min(depths[len(depths) // 2], target.llm.ctx - 1)
    record.profile = profile(target.llm, depth, progress)
    record.save(out)


# what is shown


def _list() -> None:
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
