"""`deskside perplexity`: its flags, and its result as text."""

from __future__ import annotations

import dataclasses
import io
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from deskside.cli.flags import ENGINE, Given, flags, takes
from deskside.cli.model import model_file, model_flags
from deskside.engine.config import PLACING
from deskside.errors import DesksideError

if TYPE_CHECKING:
    from deskside.bench.quality.perplexity import Divergence, Perplexity


@takes(
    model=model_flags(),
    window=flags(
        ENGINE,
        "ctx",
        ctx={"help": "tokens of a window; 0 = the model's context", "show_default": "512"},
    ),
    engine=flags(ENGINE, "threads", "threads_batch", "ubatch", "batch", "ctk", "ctv", "isa"),
    placing=flags(ENGINE, *PLACING),
)
def perplexity(
    *,
    file: Annotated[
        Path | None, Argument(help="text in UTF-8; - reads stdin", show_default=False)
    ] = None,
    text_file: Annotated[Path | None, Option("-f", "--file", help="the same by a flag")] = None,
    model: Given,
    window: Given,
    chunks: Annotated[int | None, Option("--chunks", help="score only this many windows")] = None,
    save: Annotated[
        Path | None,
        Option("--save-logits", metavar="REF", help="write the log-probabilities as a reference"),
    ] = None,
    kl: Annotated[
        Path | None,
        Option("--kl", metavar="REF", help="compare with a reference that --save-logits wrote"),
    ] = None,
    engine: Given,
    as_json: Annotated[bool, Option("--json", help="print the result as JSON")] = False,
    placing: Given,
) -> None:
    """Measure how well a model predicts a text; with --kl, how far it is from a reference run."""
    from deskside import __version__
    from deskside.bench.quality import perplexity as quality
    from deskside.bench.quality.logprobs import LogProbs, LogProbWriter
    from deskside.console import note, progress_bar
    from deskside.engine import LLM
    from deskside.engine.config import demo_model

    if save is not None and kl is not None:
        raise DesksideError("use --save-logits in a first run, and --kl in a second one")
    if (file is None) == (text_file is None):
        raise DesksideError("give one text: perplexity FILE, or -f FILE")
    file = file or text_file
    piped = str(file) == "-"
    text, name = quality.read_text(
        None if piped else file, sys.stdin.buffer.read() if piped and sys.stdin else b""
    )
    reference = None if kl is None else LogProbs.open(kl)
    path = model_file(model) or demo_model()
    with progress_bar() as progress, ExitStack() as stack:
        llm = LLM(
            path,
            progress=progress,
            **{"ctx": quality.WINDOW, **window, **engine, **placing},
        )
        for line in llm.notes:
            note(line)
        windows = quality.windows(llm, text, name, chunks)
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
