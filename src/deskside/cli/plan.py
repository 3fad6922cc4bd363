"""`deskside plan`: shows where every tensor would go and how fast the model would be."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from deskside.cli.flags import ENGINE, Given, flags, takes
from deskside.cli.model import hub_model, model_flags, with_source
from deskside.engine.config import DEFAULT_CTX, PLACING, EngineConfig
from deskside.errors import DesksideError
from deskside.files import write_all

if TYPE_CHECKING:
    from deskside.convert.hub import HubModel

Text = str | None


@takes(
    model=model_flags(
        model="GGUF file; a header is enough, as of a file being downloaded",
        hf_repo="a model of the hub: its headers alone are fetched",
    ),
    engine=flags(
        ENGINE,
        *("ctx", "parallel", "ubatch", "batch", "threads", "threads_batch", "ctk", "ctv"),
        ctx={"help": "context of one sequence; 0 = the model's own"},
        threads={"help": "0 = one per core of the machine"},
    ),
    placing=flags(ENGINE, *PLACING),
)
def plan(
    *,
    source: Annotated[
        Text,
        Argument(metavar="MODEL.gguf|PRESET", help="as -m or as --preset", show_default=False),
    ] = None,
    model: Given,
    preset: Annotated[
        Text, Option("--preset", help="a model by name instead, such as qwen3.5-397b-a17b")
    ] = None,
    tensor_type: Annotated[
        list[str] | None,
        Option("--tensor-type", metavar="REGEX=TYPE", help="types of a preset's tensors"),
    ] = None,
    engine: Given,
    machine: Annotated[
        Text, Option("--machine", metavar="FILE.toml", help="plan for another machine")
    ] = None,
    emit: Annotated[
        Text,
        Option(
            "--emit",
            metavar="llama-server|ik-llama-server|podman|systemd",
            help="print the plan as this, and nothing else",
        ),
    ] = None,
    out: Annotated[
        Path | None, Option("--out", metavar="FOLDER", help="write what --emit makes here")
    ] = None,
    svg: Annotated[Path | None, Option("--svg", help="write a picture of the plan")] = None,
    as_json: Annotated[bool, Option("--json", help="print the plan as JSON")] = False,
    placing: Given,
) -> int:
    """Show where every tensor goes and why, its memory, and the speed. Loads nothing."""
    from deskside import console
    from deskside.engine.placing import lines, plan_for, planned
    from deskside.machine.descriptions import load_machine, this_machine
    from deskside.models import build_tape
    from deskside.plan import DoesNotFit
    from deskside.plan import emit as plan_emit
    from deskside.plan import table as plan_table
    from deskside.plan.picture import picture

    if emit is not None and emit not in plan_emit.KINDS:
        raise DesksideError(f"--emit {emit}: choose from {', '.join(plan_emit.KINDS)}")
    if out is not None and emit is None:
        raise DesksideError("--out is the folder for --emit: give --emit as well")
    if source is not None:
        model, preset = _named(source, model, preset)
    file, name = _model(model, preset, tensor_type)
    tape = build_tape(file)
    ctx, parallel = engine.pop("ctx", None), engine.pop("parallel", ENGINE.parallel)
    if ctx and parallel > 1:
        console.note(f"-c {ctx} is the context of one sequence; llama.cpp divides it by -np")
    config = EngineConfig(**engine, **placing)
    ours, wishes, options = planned(
        config,
        load_machine(machine) if machine else this_machine(config.n_threads),
        ctx=min(DEFAULT_CTX, tape.n_ctx_train) if ctx is None else ctx or tape.n_ctx_train,
        ubatch=config.ubatch,
        parallel=parallel,
    )
    try:
        placed = plan_for(tape, config, ours, wishes, options)
    except DoesNotFit as refusal:
        return _refuse(refusal, tape, ours, wishes, options, name, as_json)
    made = placed.plan
    assert made is not None
    for line in (*tape.notes, *placed.notes):
        console.note(line)
    known = preset or _preset_of(file)
    if svg is not None:
        write_all({svg: picture(made, name)})
    if emit is not None:
        _emit(
            plan_emit.emit(
                made, emit, str(Path(f"{preset}.gguf" if preset else file.path).absolute())
            ),
            out,
        )
    elif as_json:
        values = plan_table.to_dict(made, name, known)
        offload = dataclasses.asdict(placed.offload) if placed.offload else None
        print(json.dumps({**values, "offload": offload}, indent=1))
    else:
        plan_table.show(made, name, known)
        for line in lines(placed):
            print(line)
    return 0


def _named(source: str, model: Given, preset: str | None) -> tuple[Given, str | None]:
    """Of a word without a flag: the file, or the preset if it is the name of one."""
    from deskside.convert.synth import PRESETS

    given = with_source(Path(source), model if preset is None else {"preset": preset})
    if source in PRESETS:
        return {}, source
    if not Path(source).exists():
        known = ", ".join(PRESETS)
        raise DesksideError(f"{source}: no such file, and no preset; the presets are {known}")
    return given, None


def _model(model: Given, preset: str | None, types: list[str] | None) -> tuple[Any, str]:
    from deskside.convert.quantize import parse_rule
    from deskside.convert.synth import outline
    from deskside.engine.config import demo_model
    from deskside.gguf import GGUF

    if model and preset is not None:
        raise DesksideError("-m, -hf and --preset are two models: give one of them")
    if preset is not None:
        rules = [parse_rule(entry) for entry in types or ()]
        return outline(preset, types=rules).gguf(), preset
    if types:
        raise DesksideError("--tensor-type is for --preset only: a file already has its types")
    remote = hub_model(model)
    if remote is not None:
        return _remote(remote), remote.path.name
    path = model.get("model") or demo_model()
    return GGUF.open(path, complete=False), path.name


def _remote(model: HubModel) -> Any:
    """The headers of a model of the hub; says what is still to be fetched."""
    from deskside.console import note
    from deskside.files import size_text

    file, missing = model.header(note), sum(f.size for f in model.missing)
    note(f"{model}; {size_text(missing)} to fetch" if missing else f"{model}; is in the cache")
    return file


def _preset_of(file: Any) -> str | None:
    """The preset with the shapes of this file, if any. Its published facts hold for the file."""
    from deskside.convert.synth import PRESETS

    arch = file.get("general.architecture")
    keys = {
        "num_hidden_layers": "block_count",
        "hidden_size": "embedding_length",
        "num_experts": "expert_count",
    }
    extra = file.get(f"{arch}.nextn_predict_layers", 0)
    for name, values in PRESETS.items():
        found = {k: file.get(f"{arch}.{key}") for k, key in keys.items()}
        if isinstance(found["num_hidden_layers"], int) and isinstance(extra, int):
            found["num_hidden_layers"] -= extra
        if all(values.get(k) == v for k, v in found.items()):
            return name
    return None


def _refuse(
    refusal: Any, tape: Any, machine: Any, wishes: Any, options: Any, name: str, as_json: bool
) -> int:
    """Say what memory is missing and what would fit. Returns exit code 2."""
    from deskside import console
    from deskside.plan.remedies import remedies
    from deskside.plan.table import VERSION, remedy_line

    found = remedies(tape, machine, wishes, options)
    if as_json:
        print(
            json.dumps(
                {
                    "version": VERSION,
                    "fits": False,
                    "model": name,
                    "reason": str(refusal),
                    "shortfall": refusal.shortfall,
                    "ways_out": [{"flags": w.flags, "price": w.price} for w in found],
                },
                indent=1,
            )
        )
    console.error(str(refusal))
    for remedy in found:
        console.err.print(f"enough would be: {remedy_line(remedy)}", markup=False)
    if not found:
        console.err.print(
            "no smaller context or cache is enough: use more memory, or a file of fewer bits",
            markup=False,
        )
    return 2


def _emit(files: dict[str, str], folder: Path | None) -> None:
    if folder is None:
        for i, (name, text) in enumerate(files.items()):
            if len(files) > 1:
                print(f"{'' if i == 0 else chr(10)}# --- {name}")
            print(text, end="")
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_all({folder / (name or "command.sh"): text for name, text in files.items()})
