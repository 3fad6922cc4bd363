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

# By the fields of Request that they set, which give type and default.
TARGETS: dict[str, Any] = {
    "endpoint": Option("--endpoint", metavar="URL", help="measure a server instead"),
    "endpoint_model": Option("--endpoint-model", help="which of the server's models"),
    "api_key": Option("--api-key", envvar="DESKSIDE_API_KEY", help="of the server; not recorded"),
    "timeout": Option("--timeout", help="seconds that a server may be silent, prefill included"),
    "vs": Option("--vs", metavar="URL_OR_FILE", help="measure this as well, in turns: A B, B A, …"),
}
WORKLOAD: dict[str, Any] = {
    "workload": Option("-w", "--workload", metavar="NAME_OR_FILE", show_default="article"),
    "list": Option("--list", help="show the workloads that come along"),
    "runs": Option("--runs", help="times that the whole workload is run"),
    "warmup": Option(
        "--warmup",
        metavar="auto|N",
        help="runs that only warm up; auto = none, the report finds what was warm-up",
    ),
    "scale": Option("--scale", help="shrink prompts and answers to this share"),
    "max_prompt": Option("--max-prompt", help="cut prompts to so many tokens"),
    "max_tokens": Option("--max-tokens", help="cut answers to so many tokens"),
    "text": Option("--text", help="folder to cut prompts from", show_default="stdlib"),
}
RUNS: dict[str, Any] = {
    "seed": Option("-s", "--seed", help="of prompts and sampling", show_default="0"),
    "ignore_eos": Option(
        "--ignore-eos/--no-ignore-eos", help="whether answers have their full length"
    ),
    "out": Option("--out", help="JSON to write", show_default="MODEL-WORKLOAD-DATE.json"),
    "force": Option("--force", help="overwrite it"),
    "resume": Option("--resume", metavar="JSON", help="go on with a record"),
    "replay": Option(
        "--replay", metavar="JSON", help="repeat a record; -m or --endpoint: on another"
    ),
    "no_hash": Option("--no-hash", help="leave out the model files' SHA-256"),
    "profile": Option("--profile", help="also time every sort of step of the model"),
    "no_report": Option("--no-report", help="write the JSON alone"),
}
REQUEST = Request()


# None has a default: a workload and a record have values of their own.
@takes(
    model=model_flags(),
    targets=flags(REQUEST, *TARGETS, options=TARGETS),
    workload=flags(REQUEST, *WORKLOAD, options=WORKLOAD),
    engine=flags(
        ENGINE,
        *("ctx", "threads", "ubatch", "ctk", "ctv", "isa", "numa", "huge_pages"),
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
        Option(
            "--preset", help="predict this model's speed from slices, as `deskside predict` does"
        ),
    ] = None,
    layers: Annotated[
        str | None, Option("--layers", help="of the slices of --preset: auto, or such as 4,8,12")
    ] = None,
    workload: Given,
    engine: Given,
    sampling: Given,
    runs: Given,
    placing: Given,
) -> int:
    """Measure a model or a server on a workload, and write a report.

    Exit code 1 if runs failed, 2 for bad input, 130 after Ctrl-C; what was measured is kept.
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
    """`bench --preset`: a workload needs a whole model, so only some flags have a meaning."""
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
