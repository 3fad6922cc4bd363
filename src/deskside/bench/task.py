"""What `deskside bench` measures. Flags say so, or a record that is resumed or replayed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from msgspec import structs

from deskside.bench.measure import endpoint
from deskside.bench.record import Record, Target
from deskside.bench.request import SHAPE, WHERE, Request
from deskside.bench.workload import Workload
from deskside.engine.config import EngineConfig, demo_model
from deskside.errors import DesksideError

DEFAULT_WORKLOAD = "article"


@dataclass(frozen=True)
class Side:
    """A target before it is opened: a model file with options, or a server's URL and model."""

    where: str
    options: Mapping[str, Any] = field(default_factory=dict)
    model: str | None = None

    @property
    def is_server(self) -> bool:
        return endpoint.is_url(self.where)


@dataclass(frozen=True)
class Task:
    """What to measure: a workload, the targets by side, and the seed of prompts."""

    workload: Workload
    sides: Mapping[str, Side]
    seed: int


def task_of(request: Request, resumed: Record | None) -> Task:
    """The task that the flags describe, or the record that they resume or replay.

    DesksideError for bad flags, also for those that would fail only after the last run.
    """
    if not 0 < request.timeout < math.inf:
        raise DesksideError(f"--timeout {request.timeout:g}: expected seconds, more than 0")
    task = _task(request, resumed)
    if request.profile and all(side.is_server for side in task.sides.values()):
        raise DesksideError("--profile: a server does not report the time of its steps")
    return task


def _task(request: Request, resumed: Record | None) -> Task:
    described = request.given((*WHERE, "vs", "seed", *SHAPE))
    described |= {**request.options, **request.sampling}
    if resumed is not None and not described:
        return _of_record(resumed, str(request.resume))
    if request.replay is not None:
        other = sorted(described.keys() - set(WHERE))
        if other:
            raise DesksideError(
                f"--replay repeats what {request.replay} says; {_flag(other[0])} "
                "cannot be combined with it"
            )
        task = _of_record(Record.load(request.replay), str(request.replay))
        if request.model is None and request.endpoint is None:
            return task
        place = _first(request, dict(task.sides["A"].options))
        return dataclasses.replace(task, sides={**task.sides, "A": place})
    options = dict(request.options)
    sides = {"A": _first(request, options)}
    if request.vs is not None:
        other_side = Side(request.vs)
        sides["B"] = other_side if other_side.is_server else Side(request.vs, options)
    if options and all(side.is_server for side in sides.values()):
        flag = _flag(next(iter(options)))
        raise DesksideError(f"{flag} does not reach a server; start the server with it")
    seed = request.seed or 0
    if seed < 0:
        raise DesksideError(f"-s {seed}: expected 0 or more, so that the runs can be repeated")
    return Task(_workload(request), sides, seed)


def _flag(name: str) -> str:
    """The flag of a field of the request."""
    short = {"ctx": "-c", "ubatch": "-ub", "ctk": "-ctk", "ctv": "-ctv"}
    short |= {
        "temperature": "--temp",
        "devices": "--device",
        "override_tensor": "-ot",
        "gpu_layers": "-ngl",
    }
    return short.get(name) or f"--{name.replace('_', '-')}"


def _first(request: Request, options: dict[str, Any]) -> Side:
    if request.endpoint is None:
        if request.endpoint_model is not None:
            raise DesksideError("--endpoint-model needs --endpoint")
        return Side(str(request.model or demo_model()), options)
    if request.model is not None:
        raise DesksideError("-m and --endpoint are two targets; compare them with --vs")
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
    if request.sampling:
        changes["sampling"] = dataclasses.replace(workload.sampling, **request.sampling)
    return structs.replace(workload, **changes)


def _of_record(record: Record, source: str) -> Task:
    derived = ("skipped", "text_digest")
    data = {key: value for key, value in record.workload.items() if key not in derived}
    workload = Workload.from_dict(data, f"{source}: workload")
    sides = {side: _side(target, source) for side, target in record.targets.items()}
    if "A" not in sides:
        raise DesksideError(f"{source}: does not say what was measured: targets.A is missing")
    return Task(workload, sides, record.seed)


def _side(target: Target, source: str) -> Side:
    if target.kind == "endpoint":
        return Side(target.url or "", {}, target.name)
    model = target.options.get("model")
    if not isinstance(model, str):
        raise DesksideError(f"{source}: does not say which file was measured; name it with -m")
    known = EngineConfig.__dataclass_fields__.keys()
    return Side(model, {k: v for k, v in target.options.items() if k in known and v is not None})
