"""The command line: one function a command, and what they share.

Modules that load slowly are imported by the command that needs them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from deskside import cli_plan, cli_quality
from deskside.config import EngineConfig
from deskside.errors import DesksideError
from deskside.sampler import SamplingParams

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Runs mixture-of-experts language models on one workstation, and proves it.",
)

# The class of all wrong command lines; typer exports only this child of it, and bundles its own
# click in some versions.
USAGE_ERROR: Any = typer.BadParameter.__base__

DEFAULTS = EngineConfig()
SAMPLING = SamplingParams()
# llama.cpp's flags that have no meaning here (yet): accepted, so that a command line for
# llama-cli starts deskside unchanged, with a note that they did nothing.
_NO_GPU = "deskside runs on the CPU; nothing to place"
IGNORED = {
    "-ngl/--n-gpu-layers": _NO_GPU,
    "-ot/--override-tensor": _NO_GPU,
    "-cmoe/--cpu-moe": _NO_GPU,
    "-ncmoe/--n-cpu-moe": _NO_GPU,
    "-dev/--device": _NO_GPU,
    "-ts/--tensor-split": _NO_GPU,
    "-fa/--flash-attn": "attention is always computed in tiles",
    "--jinja": "the file's template is always used",
    "--no-mmap": "weights are always mapped",
    "-b/--batch-size": "-ub decides how many tokens are computed at once",
    "-tb/--threads-batch": "prefill uses -t as well",
}
ON_OFF = ("on", "off", "auto", "1", "0")
_TAKES_VALUE = {"-ngl", "-ot", "-ncmoe", "-dev", "-ts", "-fa", "-b", "-tb"}


def _strip_ignored(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments without the flags of IGNORED, and a note for each of those."""
    notes, kept = [], []
    spelled = {s: names for names in IGNORED for s in names.split("/")}
    takes_value = {s for s, names in spelled.items() if names.split("/")[0] in _TAKES_VALUE}
    i = 0
    while i < len(arguments):
        flag, equals, _ = arguments[i].partition("=")
        i += 1
        if arguments[i - 1] == "--":
            kept += arguments[i - 1 :]
            break
        if flag not in spelled:
            kept.append(arguments[i - 1])
            continue
        notes.append(f"{flag} is accepted and does nothing: {IGNORED[spelled[flag]]}")
        if flag in takes_value and not equals and i < len(arguments):
            # -fa may stand alone.
            if flag in ("-fa", "--flash-attn") and arguments[i] not in ON_OFF:
                continue
            i += 1
    return kept, notes


Option = typer.Option


@app.command()
def run(
    model: Annotated[
        Path | None, Option("-m", "--model", help="GGUF file; without it the bundled demo model")
    ] = None,
    prompt: Annotated[
        str | None, Option("-p", "--prompt", help="answer this and exit; without it: chat")
    ] = None,
    file: Annotated[Path | None, Option("-f", "--file", help="read the prompt from a file")] = None,
    system: Annotated[
        str | None, Option("-sys", "--system-prompt", help="system message of the chat")
    ] = None,
    no_chat: Annotated[
        bool, Option("-no-cnv", "--no-chat", help="complete the prompt as plain text")
    ] = False,
    think: Annotated[
        bool | None, Option("--think/--no-think", help="enable_thinking of the chat template")
    ] = None,
    n_predict: Annotated[
        int, Option("-n", "--predict", "--n-predict", help="most tokens to answer; -1 = no limit")
    ] = -1,
    ctx: Annotated[
        int | None,
        Option(
            "-c",
            "--ctx-size",
            help="context in tokens; 0 = the model's own",
            show_default="4096, or the model's own if less",
        ),
    ] = DEFAULTS.ctx,
    threads: Annotated[
        int, Option("-t", "--threads", help="threads; 0 = one per usable core")
    ] = DEFAULTS.threads,
    ubatch: Annotated[
        int, Option("-ub", "--ubatch-size", help="most tokens computed at once in prefill")
    ] = DEFAULTS.ubatch,
    ctk: Annotated[
        str, Option("-ctk", "--cache-type-k", help="type of cached keys: f16, q8_0, f32")
    ] = DEFAULTS.ctk,
    ctv: Annotated[
        str, Option("-ctv", "--cache-type-v", help="type of cached values: f16, q8_0, f32")
    ] = DEFAULTS.ctv,
    temp: Annotated[float, Option("--temp", help="temperature; 0 = greedy")] = SAMPLING.temperature,
    top_k: Annotated[int, Option("--top-k", help="0 = off")] = SAMPLING.top_k,
    top_p: Annotated[float, Option("--top-p", help="1 = off")] = SAMPLING.top_p,
    min_p: Annotated[float, Option("--min-p", help="0 = off")] = SAMPLING.min_p,
    repeat_penalty: Annotated[
        float, Option("--repeat-penalty", help="1 = off")
    ] = SAMPLING.repeat_penalty,
    repeat_last_n: Annotated[
        int, Option("--repeat-last-n", help="tokens that penalties look back on; -1 = all")
    ] = SAMPLING.repeat_last_n,
    presence_penalty: Annotated[
        float, Option("--presence-penalty", help="0 = off")
    ] = SAMPLING.presence_penalty,
    frequency_penalty: Annotated[
        float, Option("--frequency-penalty", help="0 = off")
    ] = SAMPLING.frequency_penalty,
    seed: Annotated[int, Option("-s", "--seed", help="-1 = random")] = -1,
    logit_bias: Annotated[
        list[str] | None,
        Option("-l", "--logit-bias", metavar="ID(+/-)BIAS", help="e.g. 15043+1 or 29905-inf"),
    ] = None,
    ignore_eos: Annotated[bool, Option("--ignore-eos", help="never end of itself")] = False,
    stop: Annotated[
        list[str] | None, Option("-r", "--stop", "--reverse-prompt", help="end at this text")
    ] = None,
    isa: Annotated[str | None, Option("--isa", help="force an instruction set")] = DEFAULTS.isa,
    backend: Annotated[
        str, Option("--backend", help="cpu, or reference (NumPy, slow)")
    ] = DEFAULTS.backend,
) -> None:
    """Chat with a model, or complete one prompt (-p, -f or piped text)."""
    from deskside import cli_run

    params = SamplingParams(
        max_tokens=n_predict,
        temperature=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        seed=seed,
        logit_bias=dict(_logit_bias(entry) for entry in logit_bias or ()),
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
    )
    options: dict[str, Any] = {
        "ctx": ctx,
        "threads": threads,
        "ubatch": ubatch,
        "ctk": ctk,
        "ctv": ctv,
        "isa": isa,
        "backend": backend,
    }
    cli_run.main(model, prompt, file, system, not no_chat, think, params, options)


def _logit_bias(entry: str) -> tuple[int, float]:
    """llama.cpp's form: TOKEN_ID, then + or -, then the bias."""
    for sign in "+-":
        token, found, bias = entry.partition(sign)
        if found:
            try:
                return int(token), float(sign + bias)
            except ValueError:
                break
    raise DesksideError(f"--logit-bias {entry}: expected ID+BIAS or ID-BIAS, such as 15043+1")


@app.command()
def bench(
    model: Annotated[
        Path | None, Option("-m", "--model", help="GGUF file; without it the bundled demo model")
    ] = None,
    endpoint: Annotated[
        str | None, Option("--endpoint", metavar="URL", help="measure a server instead")
    ] = None,
    endpoint_model: Annotated[
        str | None, Option("--endpoint-model", help="which of the server's models")
    ] = None,
    api_key: Annotated[str | None, Option("--api-key", help="of the server; not recorded")] = None,
    timeout: Annotated[
        float, Option("--timeout", help="seconds that a server may be silent, prefill included")
    ] = 600.0,
    vs: Annotated[
        str | None,
        Option("--vs", metavar="URL_OR_FILE", help="measure this as well, in turns: A B, B A, …"),
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
    ctx: Annotated[
        int | None,
        Option("-c", "--ctx-size", show_default="what the workload needs"),
    ] = None,
    threads: Annotated[
        int | None, Option("-t", "--threads", help="threads; 0 = one per usable core")
    ] = None,
    ubatch: Annotated[
        int | None, Option("-ub", "--ubatch-size", help="most tokens computed at once in prefill")
    ] = None,
    ctk: Annotated[str | None, Option("-ctk", "--cache-type-k", help="f16, q8_0 or f32")] = None,
    ctv: Annotated[str | None, Option("-ctv", "--cache-type-v", help="f16, q8_0 or f32")] = None,
    isa: Annotated[str | None, Option("--isa", help="force an instruction set")] = None,
    temp: Annotated[float | None, Option("--temp", help="instead of the workload's")] = None,
    top_k: Annotated[int | None, Option("--top-k")] = None,
    top_p: Annotated[float | None, Option("--top-p")] = None,
    min_p: Annotated[float | None, Option("--min-p")] = None,
    repeat_penalty: Annotated[float | None, Option("--repeat-penalty")] = None,
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
) -> None:
    """Measure a model or a server on a workload, and write a report."""
    given = {name.rstrip("_"): value for name, value in locals().items()}
    from deskside import cli_bench

    cli_bench.main(cli_bench.Request(**given))


@app.command()
def synth(
    preset: Annotated[str, typer.Argument(help="such as qwen3.5-35b-a3b or tiny-moe")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write")],
    layers: Annotated[int | None, Option("--layers", help="fewer or more layers")] = None,
    experts: Annotated[int | None, Option("--experts", help="fewer experts")] = None,
    type_: Annotated[
        str | None, Option("--type", help="type of every matrix that no rule names")
    ] = None,
    tensor_type: Annotated[
        list[str] | None, Option("--tensor-type", metavar="REGEX=TYPE", help="may be repeated")
    ] = None,
    seed: Annotated[int, Option("-s", "--seed")] = 0,
    mtp: Annotated[bool, Option("--mtp", help="add multi-token-prediction tensors")] = False,
) -> None:
    """Write a model with random weights at true shapes: for measuring, before any download."""
    from deskside.console import err, progress_bar
    from deskside.quantize import parse_rule
    from deskside.quants import quant_type
    from deskside.synth import synth_file

    rules = [parse_rule(entry) for entry in tensor_type or ()]
    if type_ is not None:
        rules.append((r"\.weight$", quant_type(type_)))
    with progress_bar() as progress:
        synth_file(
            preset,
            out,
            layers=layers,
            experts=experts,
            types=rules,
            seed=seed,
            mtp=mtp,
            progress=progress,
        )
    err.print(f"{out}: {out.stat().st_size / 1e9:.2f} GB", markup=False)


@app.command()
def convert(
    hf_dir: Annotated[Path, typer.Argument(help="folder with config.json and safetensors")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write")],
    outtype: Annotated[
        Literal["auto", "f32", "f16", "bf16"],
        Option("--outtype", help="auto = as in the checkpoint"),
    ] = "auto",
    pre: Annotated[
        str | None, Option("--pre", help="name of the pre-tokenizer, if it is not recognised")
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint (qwen3_5_moe, qwen3_5, qwen3_moe, llama) to GGUF."""
    from deskside.console import err, progress_bar
    from deskside.convert import convert_hf

    with progress_bar() as progress:
        convert_hf(hf_dir, out, outtype=outtype, pre=pre, progress=progress)
    err.print(f"{out}: {out.stat().st_size / 1e9:.2f} GB", markup=False)


@app.command()
def quantize(
    src: Annotated[Path, typer.Argument(metavar="IN", help="GGUF file, or a shard of a split")],
    out: Annotated[Path, typer.Argument(help="GGUF file to write")],
    type_: Annotated[str, Option("--type", help="type of every matrix that no rule names")],
    tensor_type: Annotated[
        list[str] | None, Option("--tensor-type", metavar="REGEX=TYPE", help="may be repeated")
    ] = None,
    threads: Annotated[int, Option("-t", "--threads", help="0 = one per usable core")] = 0,
) -> None:
    """Change the types of a model's weights: F16 BF16 Q8_0 Q6_K IQ4_NL IQ4_XS IQ4_KSS and more."""
    from deskside.console import err, note, progress_bar
    from deskside.quantize import parse_rule, quantize_file
    from deskside.quants import quant_type

    config = EngineConfig(threads=threads)
    rules = [parse_rule(entry) for entry in tensor_type or ()]
    with progress_bar() as progress:
        fallbacks = quantize_file(
            src, out, quant_type(type_), rules, threads=config.n_threads, progress=progress
        )
    for f in fallbacks[:5]:
        note(f"{f.name}: {f.asked} became {f.got} ({f.reason})")
    if len(fallbacks) > 5:
        note(f"and {len(fallbacks) - 5} more tensors likewise")
    before, after = (_size(p) for p in (src, out))
    err.print(f"{out}: {after / 1e9:.3f} GB, from {before / 1e9:.3f} GB", markup=False)


def _size(path: Path) -> int:
    from deskside.gguf import GGUF

    return sum(p.stat().st_size for p in GGUF.open(path).paths)


app.command()(cli_plan.plan)
app.command()(cli_quality.perplexity)
app.command()(cli_quality.predict)


@app.command()
def compare(
    a: Annotated[
        Path, typer.Argument(metavar="A.json", help="baseline; or one record with both sides")
    ],
    b: Annotated[Path | None, typer.Argument(metavar="B.json", help="candidate")] = None,
    threshold: Annotated[
        float, Option("--threshold", metavar="PCT", help="slower by more is a regression")
    ] = 5.0,
    as_json: Annotated[bool, Option("--json", help="print the comparison as JSON")] = False,
) -> int:
    """Compare two records of `bench`, or both sides of one made with --vs (there A is the
    candidate). Exit code 1 if the candidate is slower beyond the threshold, 2 for bad input."""
    from deskside.cli_report import compare_records

    return compare_records(a, b, threshold, as_json=as_json)


@app.command()
def report(
    record: Annotated[Path, typer.Argument(metavar="RECORD.json", help="made by bench")],
    criteria: Annotated[
        Path | None,
        Option("--criteria", metavar="FILE.toml", help="other limits for the daily-use verdict"),
    ] = None,
) -> None:
    """Write RECORD.md and RECORD.html again from a record; nothing is measured."""
    from deskside.cli_report import rerender

    rerender(record, criteria)


@app.command()
def doctor(
    threads: Annotated[int, Option("-t", "--threads", help="0 = one per usable core")] = 0,
) -> None:
    """Show what this machine has and how fast it reads memory: the ceiling of decode speed."""
    from deskside.doctor import report

    report(EngineConfig(threads=threads).n_threads)


def _version(show: bool) -> None:
    if show:
        from deskside import __version__

        typer.echo(f"deskside {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, Option("--version", help="show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: bad input is one line and exit code 2, an interruption exit code 130."""
    from deskside import console

    if sys.stdout is None or sys.stderr is None:
        sys.exit(2)  # closed: nobody could read a result or a reason
    arguments = sys.argv[1:]
    notes: list[str] = []
    if arguments[:1] in (["run"], ["bench"]):
        arguments, notes = _strip_ignored(arguments)
    for line in notes:
        console.note(line)
    code = 0
    try:
        result = app(args=arguments, prog_name="deskside", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except DesksideError as failure:
        console.error(str(failure))
        code = 2
    except USAGE_ERROR as failure:
        # Without arguments the help has been shown and there is nothing to add.
        if message := failure.format_message().strip():
            console.error(message)
        console.err.print("see deskside --help, or deskside COMMAND --help", style="dim")
        code = 2
    except (KeyboardInterrupt, EOFError, typer.Abort):
        console.err.print("interrupted")
        code = 130
    except OSError as failure:
        name = f"{failure.filename}: " if failure.filename else ""
        console.error(f"{name}{failure.strerror or failure}")
        code = 2
    sys.exit(code)
