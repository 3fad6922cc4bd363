"""`deskside bench`: its flags."""

from __future__ import annotations

from typing import Annotated, Any

from typer import Option

from deskside.bench.request import Request
from deskside.cli.flags import ENGINE, OPTIONS, SAMPLING, Given, flags, spelled, takes
from deskside.cli.model import MODEL, fetched, hub_model, model_flags
from deskside.cli.predict import predict
from deskside.engine.config import PLACING
from deskside.errors import DesksideError

# Flags by the field of Request that they set. The field gives type and default.
TARGETS: dict[str, Any] = {
    "endpoint": Option("--endpoint", metavar="URL", help="measure a server instead"),
    "endpoint_model": Option("--endpoint-model", help="which of the server's models"),
    "api_key": Option(
        "--api-key", envvar="DESKSIDE_API_KEY", help="key of the server; not recorded"
    ),
    "timeout": Option("--timeout", help="seconds a server may be silent, prefill included"),
    "vs": Option("--vs", metavar="URL_OR_FILE", help="measure this as well, by turns: A B, B A, …"),
}
WORKLOAD: dict[str, Any] = {
    "workload": Option("-w", "--workload", metavar="NAME_OR_FILE", show_default="article"),
    "list": Option("--list", help="show the workloads of the package"),
    "runs": Option("--runs", help="times to run the whole workload"),
    "warmup": Option(
        "--warmup",
        metavar="auto|N",
        help="runs that only warm up; auto = none, and the report finds the warm-up",
    ),
    "scale": Option("--scale", help="shrink prompts and answers to this share"),
    "max_prompt": Option("--max-prompt", help="cut prompts to this many tokens"),
    "max_tokens": Option("--max-tokens", help="cut answers to this many tokens"),
    "text": Option("--text", help="folder to cut prompts from", show_default="stdlib"),
}
RUNS: dict[str, Any] = {
    "seed": Option("-s", "--seed", help="seed of prompts and sampling", show_default="0"),
    "ignore_eos": Option(
        "--ignore-eos/--no-ignore-eos",
        help="generate answers in full length",
    ),
    "out": Option("--out", help="JSON file to write", show_default="MODEL-WORKLOAD-DATE.json"),
    "force": Option("--force", help="overwrite the file of --out"),
    "resume": Option("--resume", metavar="JSON", help="continue a record"),
    "replay": Option(
        "--replay", metavar="JSON", help="repeat a record; on another target with -m or --endpoint"
    ),
    "no_hash": Option("--no-hash", help="do not hash the model files"),
    "profile": Option("--profile", help="also time each kind of step of the model"),
    "no_report": Option("--no-report", help="write only the JSON"),
}
REQUEST = Request()


# Engine and sampling flags have no default, because a workload or a record may set these values.
@takes(
    model=model_flags(),
    targets=flags(REQUEST, *TARGETS, options=TARGETS),
    workload=flags(REQUEST, *WORKLOAD, options=WORKLOAD),
    engine=flags(
        ENGINE,
        *("ctx", "threads", "threads_batch", "ubatch", "batch", "ctk", "ctv"),
        *("isa", "numa", "huge_pages"),
        unset=True,
        ctx={"help": None, "show_default": "what the workload needs"},
    ),
    sampling=flags(
        SAMPLING,
        *("temperature", "top_k", "top_p", "min_p", "repeat_penalty"),
        unset=True,
        temperature={"help": "instead of the workload's"},
    ),
    runs=flags(REQUEST, *RUNS, options=RUNS),
    placing=flags(ENGINE, *PLACING, unset=True),
)
def bench(
    *,
    model: Given,
    targets: Given,
    preset: Annotated[
        str | None,
        Option("--preset", help="predict this model's speed from slices, as `deskside predict`"),
    ] = None,
    layers: Annotated[
        str | None,
        Option("--layers", help="layers of the slices of --preset: auto, or such as 4,8,12"),
    ] = None,
    workload: Given,
    engine: Given,
    sampling: Given,
    runs: Given,
    placing: Given,
) -> int:
    """Measure a model or a server on a workload, and write a report.

    Exit code 1 if runs failed, 2 for bad input, 130 after Ctrl-C. Finished runs are always kept.
    """
    request = {**targets, **workload, **runs}
    options = {**engine, **placing}
    if preset is not None:
        return _predict(preset, layers, {**model, **request, **options, **sampling})
    if layers is not None:
        raise DesksideError("--layers belongs to --preset NAME, such as qwen3.5-397b-a17b")
    from deskside.bench import command

    remote = hub_model(model)
    path = model.get("model") if remote is None else remote.path
    asked = Request(path, **request, options=options, sampling=sampling)
    return command.main(asked, lambda: remote and fetched(remote))


def _predict(preset: str, layers: str | None, given: dict[str, Any]) -> int:
    """`bench --preset`. It runs no workload, so it refuses flags that need one."""
    taken: dict[str, Any] = {
        name: given.pop(name) for name in ("threads", "ubatch", "isa", "out") if name in given
    }
    if layers is not None:
        taken["layers"] = layers
    if "runs" in given:
        taken["repeats"] = given.pop("runs")
    caches = list(dict.fromkeys(given.pop(name) for name in ("ctk", "ctv") if name in given))
    if len(caches) > 1:
        raise DesksideError(
            f"--preset takes one type for keys and values, not {' and '.join(caches)}"
        )
    if caches:
        [taken["kv"]] = caches
    if given:
        options = {**MODEL, **OPTIONS, **TARGETS, **WORKLOAD, **RUNS}
        names = spelled(options[next(iter(given))])
        flag = next(name for name in names if name.startswith("--"))
        raise DesksideError(f"{flag} has no meaning with --preset, which runs no workload")
    predict(preset, **taken)
    return 0
