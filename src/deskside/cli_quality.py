"""`deskside perplexity` and `deskside predict`."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from deskside.cli_flags import CacheK, CacheV, Isa, Model, Threads, Ubatch, placeable
from deskside.engine.config import EngineConfig
from deskside.errors import DesksideError

if TYPE_CHECKING:
    from deskside.bench.quality.perplexity import Divergence, Perplexity

DEFAULTS = EngineConfig()
WINDOW = 512  # tokens, as in llama.cpp's tool


@placeable
def perplexity(
    file: Annotated[Path, Argument(help="text in UTF-8; - reads stdin")],
    model: Model = None,
    ctx: Annotated[
        int, Option("-c", "--ctx-size", help="tokens of a window; 0 = the model's context")
    ] = WINDOW,
    chunks: Annotated[int | None, Option("--chunks", help="score only so many windows")] = None,
    save: Annotated[
        Path | None,
        Option("--save-logits", metavar="REF", help="write the log-probabilities as a reference"),
    ] = None,
    kl: Annotated[
        Path | None,
        Option("--kl", metavar="REF", help="compare with a reference that --save-logits wrote"),
    ] = None,
    threads: Threads = DEFAULTS.threads,
    ubatch: Ubatch = DEFAULTS.ubatch,
    ctk: CacheK = DEFAULTS.ctk,
    ctv: CacheV = DEFAULTS.ctv,
    isa: Isa = DEFAULTS.isa,
    as_json: Annotated[bool, Option("--json", help="print the result as JSON")] = False,
    placing: Mapping[str, Any] = {},
) -> None:
    """How well a model predicts a text; with --kl, how far it is from a reference run."""
    from deskside import __version__
    from deskside.bench.quality import perplexity as quality
    from deskside.bench.quality.logprobs import LogProbs, LogProbWriter
    from deskside.console import note, progress_bar
    from deskside.engine import LLM
    from deskside.engine.config import demo_model

    if save is not None and kl is not None:
        raise DesksideError("--save-logits and --kl are for two runs: first write, then compare")
    piped = str(file) == "-"
    text, name = quality.read_text(
        None if piped else file, sys.stdin.buffer.read() if piped and sys.stdin else b""
    )
    reference = None if kl is None else LogProbs.open(kl)
    with progress_bar() as progress, ExitStack() as stack:
        llm = LLM(
            model or demo_model(), progress=progress, ctx=ctx, threads=threads, ubatch=ubatch,
            ctk=ctk, ctv=ctv, isa=isa, **placing,
        )  # fmt: skip
        for line in llm.notes:
            note(line)
        windows = quality.cut(llm, text, name, chunks)
        writer = None
        if save is not None:
            header = quality.header(llm, windows, name, __version__, progress)
            writer = LogProbWriter(save, header, windows)
            note(f"{save} will have {header.nbytes / 1e9:.3f} GB")
            stack.enter_context(writer)
        result = quality.perplexity(
            llm, windows, name, writer=writer, reference=reference, progress=progress
        )
    if as_json:
        print(json.dumps(dataclasses.asdict(result), indent=1))
    else:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a locale that lacks ± shows "?"
        print("\n".join(_lines(result)))


def _lines(r: Perplexity) -> list[str]:
    """The result as text."""
    return [
        f"PPL = {r.ppl:.4f} ± {r.error:.4f}",
        f"{r.scored} tokens scored in {r.windows} windows of {r.ctx}, {r.seconds:.1f} s, "
        f"{r.rate:.1f} tok/s",
        *(_divergence(r.divergence) if r.divergence else ()),
    ]


def _divergence(d: Divergence) -> list[str]:
    return [
        f"against {d.reference}, PPL = {d.ppl_reference:.4f}:",
        f"  PPL ratio       {d.ppl_ratio:.6f} ± {d.ppl_ratio_error:.6f}",
        f"  KL, mean        {d.mean:.3e} ± {d.mean_error:.1e} nats",
        f"  KL, median      {d.median:.3e}",
        f"  KL, p95         {d.p95:.3e}",
        f"  KL, p99         {d.p99:.3e}",
        f"  KL, max         {d.maximum:.3e}",
        f"  same top token  {100 * d.top1:.3f} ± {100 * d.top1_error:.3f} %",
        f"  Δp, mean        {100 * d.dp_mean:+.4f} ± {100 * d.dp_mean_error:.4f} %",
        f"  Δp, RMS         {100 * d.dp_rms:.4f} %",
    ]


def predict(
    preset: Annotated[str, Argument(help="such as qwen3.5-397b-a17b")],
    layers: Annotated[
        str, Option("--layers", help="of the slices that are measured: auto, or such as 4,8,12")
    ] = "auto",
    experts: Annotated[
        int | None, Option("--experts", help="fewer experts a layer", show_default="as fit")
    ] = None,
    check: Annotated[
        int | None,
        Option("--check", metavar="LAYERS", help="predict and measure one more slice"),
    ] = None,
    depths: Annotated[
        str, Option("--depths", help="context at which decoding is timed, such as 512,4096")
    ] = "512",
    generate: Annotated[int, Option("--generate", help="tokens decoded in a sample")] = 32,
    repeats: Annotated[int, Option("--repeats", help="rounds")] = 5,
    keep: Annotated[
        bool, Option("--keep/--no-keep", help="leave the slices in the cache folder")
    ] = True,
    threads: Threads = DEFAULTS.threads,
    ubatch: Ubatch = DEFAULTS.ubatch,
    kv: Annotated[str, Option("--kv", help="type of the cache: f16, q8_0, f32")] = DEFAULTS.ctk,
    isa: Isa = DEFAULTS.isa,
    out: Annotated[Path | None, Option("--out", help="write the result as JSON here")] = None,
) -> None:
    """The speed of a large model on this machine, before its download: from slices of it."""
    from deskside.bench.predict.measure import Options, predict
    from deskside.bench.predict.table import show
    from deskside.console import note, progress_bar

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise DesksideError(f"--out {out}: expected a file in a folder that exists")
    wanted = "auto" if layers == "auto" else _numbers("--layers", layers)
    options = Options(
        depths=_numbers("--depths", depths), generate=generate, repeats=repeats,
        threads=threads, kv=kv, ubatch=ubatch, isa=isa,
    )  # fmt: skip
    with progress_bar() as progress:
        result = predict(
            preset, wanted, experts=experts, check=check, options=options, keep=keep, say=note,
            progress=progress,
        )  # fmt: skip
    show(result)
    if out is not None:
        result.save(out)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise DesksideError(f"{flag} {text}: expected numbers such as 4,8,12") from None
