"""`deskside bench`: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from typer import Option

from deskside.cli.flags import ENGINE, SAMPLING, Given, flags, takes
from deskside.cli.model import FLAGS, fetched, hub_model
from deskside.cli.predict import predict
from deskside.engine.config import PLACING
from deskside.errors import DesksideError

TIMEOUT = 600.0
# Flags whose long form is not the field's name.
LONG = {"ctx": "ctx-size", "devices": "device", "temperature": "temp"}


# None has a default: a workload and a record have values of their own.
@takes(
    model=FLAGS,
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
    placing=flags(ENGINE, *PLACING, unset=True),
)
def bench(
    *,
    model: Given,
    endpoint: Annotated[
        str | None, Option("--endpoint", metavar="URL", help="measure a server instead")
    ] = None,
    endpoint_model: Annotated[
        str | None, Option("--endpoint-model", help="which of the server's models")
    ] = None,
    api_key: Annotated[
        str | None,
        Option("--api-key", envvar="DESKSIDE_API_KEY", help="of the server; not recorded"),
    ] = None,
    timeout: Annotated[
        float, Option("--timeout", help="seconds that a server may be silent, prefill included")
    ] = TIMEOUT,
    vs: Annotated[
        str | None,
        Option("--vs", metavar="URL_OR_FILE", help="measure this as well, in turns: A B, B A, …"),
    ] = None,
    preset: Annotated[
        str | None,
        Option(
            "--preset", help="predict this model's speed from slices, as `deskside predict` does"
        ),
    ] = None,
    layers: Annotated[
        str | None, Option("--layers", help="of the slices of --preset: auto, or such as 4,8,12")
    ] = None,
    workload: Annotated[
        str | None,
        Option("-w", "--workload", metavar="NAME_OR_FILE", show_default="article"),
    ] = None,
    list_: Annotated[bool, Option("--list", help="show the workloads that come along")] = False,
    runs: Annotated[
        int | None, Option("--runs", help="times that the whole workload is run")
    ] = None,
    warmup: Annotated[
        str | None,
        Option(
            "--warmup",
            metavar="auto|N",
            help="runs that only warm up; auto = none, the report finds what was warm-up",
        ),
    ] = None,
    scale: Annotated[
        float | None, Option("--scale", help="shrink prompts and answers to this share")
    ] = None,
    max_prompt: Annotated[
        int | None, Option("--max-prompt", help="cut prompts to so many tokens")
    ] = None,
    max_tokens: Annotated[
        int | None, Option("--max-tokens", help="cut answers to so many tokens")
    ] = None,
    text: Annotated[
        Path | None, Option("--text", help="folder to cut prompts from", show_default="stdlib")
    ] = None,
    engine: Given,
    sampling: Given,
    seed: Annotated[
        int | None, Option("-s", "--seed", help="of prompts and sampling", show_default="0")
    ] = None,
    ignore_eos: Annotated[
        bool | None,
        Option("--ignore-eos/--no-ignore-eos", help="whether answers have their full length"),
    ] = None,
    out: Annotated[
        Path | None,
        Option("--out", help="JSON to write", show_default="MODEL-WORKLOAD-DATE.json"),
    ] = None,
    force: Annotated[bool, Option("--force", help="overwrite it")] = False,
    resume: Annotated[
        Path | None, Option("--resume", metavar="JSON", help="go on with a record")
    ] = None,
    replay: Annotated[
        Path | None,
        Option("--replay", metavar="JSON", help="repeat a record; -m or --endpoint: on another"),
    ] = None,
    no_hash: Annotated[
        bool, Option("--no-hash", help="leave out the model files' SHA-256")
    ] = False,
    profile: Annotated[
        bool, Option("--profile", help="also time every sort of step of the model")
    ] = False,
    no_report: Annotated[bool, Option("--no-report", help="write the JSON alone")] = False,
    placing: Given,
) -> int:
    """Measure a model or a server on a workload, and write a report.

    Exit code 1 if runs failed, 2 for bad input, 130 after Ctrl-C; what was measured is kept.
    """
    given = {name.rstrip("_"): value for name, value in locals().items()}
    given["options"] = given.pop("engine") | given.pop("placing")
    if given.pop("preset") is not None or layers is not None:
        return _predict(preset, given)
    del given["layers"]
    from deskside.bench import command
    from deskside.bench.request import Request

    remote = hub_model(model)
    given["model"] = model.get("model") if remote is None else remote.path
    return command.main(Request(**given), lambda: remote and fetched(remote))


def _predict(preset: str | None, given: dict[str, Any]) -> int:
    """`bench --preset`: a workload needs a whole model, so only some flags have a meaning."""
    if preset is None:
        raise DesksideError("--layers belongs to --preset NAME, such as qwen3.5-397b-a17b")
    given |= given.pop("model") | given.pop("options") | given.pop("sampling")
    taken = {name: given.pop(name, None) for name in ("layers", "threads", "ubatch", "isa", "out")}
    repeats, kv, v = given.pop("runs"), given.pop("ctk", None), given.pop("ctv", None)
    if kv != v and None not in (kv, v):
        raise DesksideError(f"--preset takes one type for keys and values, not {kv} and {v}")
    for name, value in given.items():
        if value not in (None, False) and (name, value) != ("timeout", TIMEOUT):
            flag = LONG.get(name, name).replace("_", "-")
            raise DesksideError(f"--{flag} has no meaning with --preset, which runs no workload")
    taken |= {"repeats": repeats, "kv": kv or v}
    predict(preset, **{k: value for k, value in taken.items() if value is not None})
    return 0
