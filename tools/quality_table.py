"""Makes docs/QUALITY.md: what cache types and quant types of a model cost.

    python -m tools.quality_table tools/train_demo/heldout.txt --out docs/QUALITY.md

Every row is compared with a run of the model's own file with float32 KV. It calls the functions of
`deskside perplexity --save-logits`, `--kl` and `deskside quantize`.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deskside import LLM, __version__
from deskside.bench.quality import perplexity as quality
from deskside.bench.quality.logprobs import LogProbs, LogProbWriter
from deskside.bench.quality.perplexity import WINDOW, Perplexity
from deskside.convert.quantize import quantize_file
from deskside.engine.config import demo_model
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type

TYPES = ("F16", "Q8_0", "Q6_K", "Q4_K", "IQ4_NL", "IQ4_XS", "IQ4_KS", "IQ4_KSS")
F32_KV: dict[str, Any] = {"ctk": "f32", "ctv": "f32"}


@dataclass
class Row:
    name: str
    path: Path
    options: dict[str, Any] = field(default_factory=dict)


def numeric(model: Path) -> Iterator[Row]:
    """Rows of the model's own file with other options."""
    yield Row("f32 KV, `-ub 64`", model, {**F32_KV, "ubatch": 64})
    yield Row("f32 KV, `--isa scalar`", model, {**F32_KV, "isa": "scalar"})
    yield Row("f16 KV", model)
    yield Row("q8_0 KV", model, {"ctk": "q8_0", "ctv": "q8_0"})
    yield Row("q8_0 keys, f16 values", model, {"ctk": "q8_0"})
    yield Row("f16 keys, q8_0 values", model, {"ctv": "q8_0"})


def quantised(model: Path, folder: Path) -> Iterator[Row]:
    """Rows of the model in other types, with the default f16 KV."""
    for name in TYPES:
        path = folder / f"{name}.gguf"
        fallbacks = quantize_file(model, path, quant_type(name))
        yield Row(name + (" *" if fallbacks else ""), path)


def table(rows: Iterator[Row], text: str, name: str, ctx: int, ref: LogProbs) -> Iterator[str]:
    yield (
        "| | bits/weight | PPL | PPL ratio | KL mean | median | p99 | max | same top | Δp RMS |\n"
        "|---|---|---|---|---|---|---|---|---|---|"
    )
    for row in rows:
        llm = LLM(row.path, ctx=ctx, **row.options)
        r = quality.perplexity(llm, quality.windows(llm, text, name), name, reference=ref)
        d = r.divergence
        assert d is not None
        yield (
            f"| {row.name} | {bits(row.path):.2f} | {r.ppl:.3f} | "
            f"{d.ppl_ratio:.5f} ± {d.ppl_ratio_error:.5f} | {d.mean:.2e} ± {d.mean_error:.0e} | "
            f"{d.median:.1e} | {d.p99:.1e} | {d.maximum:.1e} | "
            f"{100 * d.top1:.2f} ± {100 * d.top1_error:.2f} % | {100 * d.dp_rms:.2f} % |"
        )
        print(row.name, f"KL {d.mean:.2e}", flush=True)


def bits(path: Path) -> float:
    tensors = GGUF.open(path).tensors.values()
    return 8 * sum(t.nbytes for t in tensors) / sum(t.row_len * t.n_rows for t in tensors)


def page(base: Perplexity, kv: list[str], types: list[str]) -> str:
    return f"""# Quality, measured

`deskside perplexity FILE -m MODEL` scores a text as llama.cpp's tool does. It cuts the text into
windows of `-c` tokens (512). Each window is a fresh sequence, with bos first if the file asks for
it. The second half of each window is scored.

One run writes its log-probabilities (`--save-logits REF`). Another run is compared with them
(`--kl REF`): how far their predictions diverge, token by token.

    deskside perplexity TEXT -m model.gguf -ctk f32 -ctv f32 --save-logits ref.logits
    deskside perplexity TEXT -m model.gguf -ctk q8_0 -ctv q8_0 --kl ref.logits
    deskside quantize model.gguf small.gguf --type IQ4_NL
    deskside perplexity TEXT -m small.gguf --kl ref.logits

| figure | what it says |
|---|---|
| PPL ± | exp of the mean of -log p; standard error by the delta method |
| PPL ratio ± | this PPL over the reference's; the error is of pairs, much smaller than either's |
| KL | from the reference's distribution to this run's, in nats, over the whole vocabulary |
| same top | how often both find the same token most likely: what greedy decoding sees |
| Δp | change of the probability of the text's token |

`REF` holds 16-bit log-probabilities, each within 0.001 nats. They take 2 bytes a token of the
vocabulary and position: 127 MB a window of 512 with a vocabulary of 248,320.
`src/deskside/bench/quality/logprobs.py` has layout and bound. A run against itself shows a KL of
about 1e-9.

## The bundled model
All rows: {base.scored} predictions in {base.windows} windows of {base.ctx} tokens of
`{base.text}`. Training held this text out: Python's standard library and its
documentation. The reference is the bundled file (experts IQ4_NL, the rest Q8_0) with f32 KV:
PPL = {base.ppl:.3f} ± {base.error:.3f}, kernels {base.settings["isa"]}.

### Its own file, run in other ways
{chr(10).join(kv)}

The first two rows show what rounding alone does. Other steps and another order of sums move some
activation to the next 8-bit step, and with it a near tie of the router. If a cache type's row
looks like them, it costs nothing that can be seen.

### Its file, quantised once more
With f16 KV. The experts were IQ4_NL before, so types with more bits keep them nearly as they are.
The 4-bit rows lose mostly in what was Q8_0. F16 weights meet float32 activations, the reference's
weights 8-bit ones. So the F16 row shows what rounding activations does.

{chr(10).join(types)}

`*`: rows that are no multiple of 256 fall back to IQ4_NL (4-bit types) or Q8_0; `deskside
quantize` reports it. docs/QUANTS.md has the same types made from the float32 checkpoint. This model
is small; large ones usually lose less.

To make this page:

    python -m tools.quality_table {base.text} --out docs/QUALITY.md
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path, help="held-out text")
    parser.add_argument("--model", type=Path, default=None, help="default: the bundled model")
    parser.add_argument("--out", type=Path, help="write Markdown here; default: print")
    parser.add_argument("--window", type=int, default=WINDOW, help="tokens")
    args = parser.parse_args()
    model = args.model or demo_model()
    text, name = quality.read_text(args.text)
    with tempfile.TemporaryDirectory() as folder:
        llm = LLM(model, ctx=args.window, **F32_KV)
        windows = quality.windows(llm, text, name)
        path = Path(folder) / "reference"
        with LogProbWriter(
            path, quality.header(llm, windows, name, __version__), windows
        ) as writer:
            base = quality.perplexity(llm, windows, name, writer=writer)
        ref = LogProbs.open(path)
        kv = list(table(numeric(model), text, name, args.window, ref))
        types = list(table(quantised(model, Path(folder)), text, name, args.window, ref))
    if args.out:
        args.out.write_text(page(base, kv, types), encoding="utf-8")
    else:
        print(page(base, kv, types))


if __name__ == "__main__":
    main()
