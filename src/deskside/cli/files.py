"""`deskside synth`, `convert` and `quantize`: commands that write a GGUF file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from deskside.cli.flags import TensorTypes, Threads
from deskside.console import err, note, progress_bar
from deskside.engine.config import EngineConfig


def synth(
    preset: Annotated[str, Argument(help="such as qwen3.5-35b-a3b or tiny-moe")],
    out: Annotated[Path, Argument(help="GGUF file to write")],
    layers: Annotated[int | None, Option("--layers", help="fewer or more layers")] = None,
    experts: Annotated[int | None, Option("--experts", help="fewer experts")] = None,
    type_: Annotated[
        str | None, Option("--type", help="type of every matrix that no rule names")
    ] = None,
    tensor_type: TensorTypes = None,
    seed: Annotated[int, Option("-s", "--seed")] = 0,
    mtp: Annotated[bool, Option("--mtp", help="add multi-token-prediction tensors")] = False,
) -> None:
    """Write a model with random weights at true shapes, to measure before a download."""
    from deskside.convert.quantize import parse_rule
    from deskside.convert.recipes import writable
    from deskside.convert.synth import synth_file

    rules = [parse_rule(entry) for entry in tensor_type or ()]
    if type_ is not None:
        rules.append((r"\.weight$", writable(type_)))
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
    _written(out)


def convert(
    hf_dir: Annotated[Path, Argument(help="folder with config.json and safetensors")],
    out: Annotated[Path, Argument(help="GGUF file to write")],
    outtype: Annotated[
        Literal["auto", "f32", "f16", "bf16"],
        Option("--outtype", help="auto = as in the checkpoint"),
    ] = "auto",
    pre: Annotated[
        str | None, Option("--pre", help="name of the pre-tokenizer, if it is not recognised")
    ] = None,
) -> None:
    """Convert a Hugging Face checkpoint (Qwen2, Qwen3, Qwen3.5, their MoE, Llama) to GGUF."""
    from deskside.convert.huggingface import convert_hf

    with progress_bar() as progress:
        notes = convert_hf(hf_dir, out, outtype=outtype, pre=pre, progress=progress)
    for line in notes:
        note(line)
    _written(out)


def quantize(
    src: Annotated[Path, Argument(metavar="IN", help="GGUF file, or a shard of a split")],
    out: Annotated[Path, Argument(help="GGUF file to write")],
    type_: Annotated[str, Option("--type", help="type or mix of the matrices that no rule names")],
    tensor_type: TensorTypes = None,
    only: Annotated[bool, Option("--pure", help="all matrices as --type: no mix of types")] = False,
    threads: Threads = 0,
) -> None:
    """Change the types of a model's weights: F16 Q8_0 Q4_K_M Q2_K IQ4_NL IQ4_KSS and more."""
    from deskside.convert.quantize import parse_rule, quantize_file
    from deskside.convert.recipes import pure, recipe, writable
    from deskside.gguf import GGUF

    config = EngineConfig(threads=threads)
    chosen = pure(writable(type_)) if only else recipe(type_)
    rules = [parse_rule(entry) for entry in tensor_type or ()]
    with progress_bar() as progress:
        fallbacks = quantize_file(
            src, out, chosen, rules, threads=config.n_threads, progress=progress
        )
    for f in fallbacks[:5]:
        note(f"{f.name}: {f.asked} became {f.got} ({f.reason})")
    if len(fallbacks) > 5:
        note(f"and {len(fallbacks) - 5} more tensors likewise")
    before = sum(p.stat().st_size for p in GGUF.open(src).paths)
    _written(out, f", from {before / 1e9:.3f} GB")


def _written(out: Path, more: str = "") -> None:
    """Tell the size of an output, unless it went into a pipe or a device."""
    if out.is_file():
        err.print(f"{out}: {out.stat().st_size / 1e9:.3f} GB{more}", markup=False)
