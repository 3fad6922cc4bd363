"""`deskside bench`: opens the targets, measures them, writes record and report."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path

from msgspec import structs

from deskside.bench.measure import endpoint, targets
from deskside.bench.measure import loop as measure
from deskside.bench.measure.hashes import hashed
from deskside.bench.measure.profile import profile
from deskside.bench.record import Record
from deskside.bench.request import Request
from deskside.bench.shown import show, show_workloads
from deskside.bench.task import Task, task_of
from deskside.console import err, note, printable, progress_bar
from deskside.engine.config import EngineConfig, demo_model
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.models import build_tape
from deskside.progress import Progress

DRAWN_PER_SECOND = 1.0
FAILED, INTERRUPTED = 1, 130  # exit codes


def main(request: Request, fetch: Callable[[], object] = lambda: None) -> int:
    """Run `deskside bench`. Returns the exit code. DesksideError for bad input.

    fetch: brings the model's file, once the flags make sense.
    """
    if request.list:
        show_workloads()
        return 0
    if request.resume is not None and request.replay is not None:
        raise DesksideError("--resume continues a record, --replay repeats one: use one of them")
    record = None if request.resume is None else Record.load(request.resume)
    task = task_of(request, record)
    out = _out(request, request.out)
    fetch()
    files = {name: GGUF.open(side.where) for name, side in task.sides.items() if not side.is_server}
    task = _fitted(task, request, files)
    with ExitStack() as stack:
        with progress_bar() as progress:
            opened = _open(task, request, files, progress, stack)
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
            note(f"stopped; {measure.kept(out)}")
            return INTERRUPTED
    show(record)
    written = [out]
    if not request.no_report:
        from deskside.bench.report import write as report

        err.print(printable(report.write(record, out).headline), markup=False)
        written += report.paths(out)
    err.print(f"wrote {', '.join(map(str, written))}", markup=False)
    failed = sum(not run.ok for run in record.runs)
    if failed:
        note(f"{failed} of {len(record.runs)} runs failed; --resume {out} tries them again")
    return FAILED if failed else 0


def _fitted(task: Task, request: Request, files: Mapping[str, GGUF]) -> Task:
    """Shrink the workload to the context of the bundled model.

    Does nothing if the user named a model or a size: then `fit_context` refuses or skips items that
    are too long.
    """
    side = task.sides["A"]
    asked = request.given(("model", "endpoint", "replay", "scale", "max_prompt"))
    if asked or side.where != str(demo_model()) or task.workload.too_long == "skip":
        return task
    room, limit = targets.context_room(build_tape(files["A"]), EngineConfig(**side.options))
    workload = task.workload.within(room)
    if workload.scale != task.workload.scale:
        note(
            f"{limit}: workload {workload.name} runs at --scale {workload.scale:g}; "
            "-m names a model that holds more"
        )
    return dataclasses.replace(task, workload=workload)


def _open(
    task: Task,
    request: Request,
    files: Mapping[str, GGUF],
    progress: Progress,
    stack: ExitStack,
) -> dict[str, targets.TargetRunner]:
    """Open the targets. For a replay, compare the model files first.

    files: by side, the model files of targets in this process.
    """
    if request.replay is not None:
        _expect_files(task, request, files, progress)
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
            # While the first one loads, leave room for the second.
            others = [file for other, file in files.items() if other != name]
            target = loaded = targets.load(
                files[name],
                task.workload,
                beside=others[0] if others and not opened else None,
                sha=not request.no_hash,
                progress=progress,
                **side.options,
            )
            for line in loaded.llm.notes:
                note(line)
        stack.callback(target.close)
        opened[name] = target
    return opened


def _expect_files(
    task: Task, request: Request, files: Mapping[str, GGUF], progress: Progress
) -> None:
    assert request.replay is not None
    record = Record.load(request.replay)
    for name, side in task.sides.items():
        named = name == "A" and (request.model or request.endpoint)
        old = record.targets[name]
        if side.is_server or named or not old.files:
            continue
        found = hashed(files[name].paths, not request.no_hash, progress)
        measure.check_files(old, structs.replace(old, files=found), str(request.replay))


def _out(request: Request, out: Path | None) -> Path | None:
    """The path of the record: the resumed file or `out`; None if neither was given."""
    if request.resume is not None:
        if request.out is not None and request.out != request.resume:
            raise DesksideError("--resume continues in its own file; leave out --out")
        return request.resume
    if out is None:
        return None
    if out.suffix != ".json" or out.is_dir() or not out.parent.is_dir():
        raise DesksideError(f"--out {out}: expected NAME.json in a folder that exists")
    if out.exists() and not request.force:
        raise DesksideError(f"{out}: exists; --force overwrites it, --resume {out} continues it")
    return out


def _name(task: Task, opened: Mapping[str, targets.TargetRunner]) -> Path:
    names = []
    for name, side in task.sides.items():
        label = opened[name].describe().name if side.is_server else Path(side.where).stem
        names.append("".join(c if c.isalnum() or c in "-._" else "-" for c in label)[:60])
    stamp = datetime.now().strftime("%Y-%m-%d-%H%M%S")
    return Path(f"{'-vs-'.join(names)}-{task.workload.name}-{stamp}.json".lstrip("."))


def _command(arguments: Sequence[str]) -> list[str]:
    """The command line without the API key."""
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
    """Profile the first target in this process, at the median depth of the runs."""
    target = next(t for t in opened.values() if isinstance(t, targets.InProcess))
    depths = sorted(run.depth for run in record.runs if run.ok) or [1]
    depth = min(depths[len(depths) // 2], target.llm.ctx - 1)
    record.profile = profile(target.llm, depth, progress)
    record.save(out)
