"""Makes the table of docs/QUANTS.md: held-out loss of a model in several quant types.

    python -m tools.quants_table MODEL-F32.gguf tools/train_demo/heldout.txt --out docs/QUANTS.md

deskside's encoders quantize the float model into a temporary folder. Every variant reads the same
windows of text, and differences are paired by window.
"""

from __future__ import annotations

import argparse
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deskside import LLM
from deskside.convert.quantize import quantize_file
from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type

EXPERTS = r"_exps\.weight$"


@dataclass
class Variant:
    """One row: a model file and a cache type. Loss, divergence and agreement are per window."""

    name: str
    path: Path
    kv: str = "f16"
    loss: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    top1: list[float] = field(default_factory=list)


def log_softmax(x: NDArray[np.float32]) -> NDArray[np.float64]:
    x = x.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def variants(model: Path, folder: Path, threads: int) -> Iterator[Variant]:
    yield Variant("F32", model)
    for name in ("F16", "Q8_0", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ4_KSS"):
        path = folder / f"{name}.gguf"
        fallbacks = quantize_file(model, path, quant_type(name), threads=threads)
        yield Variant(name + (" *" if fallbacks else ""), path)
    mixed = folder / "bundled.gguf"
    rules = [(EXPERTS, quant_type("IQ4_NL"))]
    quantize_file(model, mixed, quant_type("Q8_0"), rules, threads=threads)
    yield Variant("experts IQ4_NL, rest Q8_0 (bundled)", mixed)
    yield Variant("the same, q8_0 KV", mixed, kv="q8_0")


def measure(rows: list[Variant], text: str, window: int, limit: int) -> int:
    """Fill the rows. Returns the number of predicted tokens."""
    models = [LLM(v.path, ctx=window, ctk=v.kv, ctv=v.kv) for v in rows]
    ids = models[0].tokenize(text, special=False)[: limit * window]
    windows = [ids[i : i + window] for i in range(0, len(ids) - window + 1, window)]
    for n, part in enumerate(windows):
        target = np.array(part[1:])
        at = np.arange(len(target))
        reference: NDArray[np.float64] | None = None
        for variant, model in zip(rows, models, strict=True):
            logp = log_softmax(model.logits(part)[:-1])
            if reference is None:
                reference = logp
            variant.loss.append(float(-logp[at, target].mean()))
            kl = (np.exp(reference) * (reference - logp)).sum(-1)
            variant.kl.append(float(kl.mean()))
            variant.top1.append(float((logp.argmax(-1) == reference.argmax(-1)).mean()))
        print(f"\rwindow {n + 1} of {len(windows)}", end="", flush=True)
    print()
    return len(windows) * (window - 1)


def table(rows: list[Variant]) -> Iterator[str]:
    yield "| weights | MB | bits/weight | loss | change | perplexity | KL from F32 | top-1 |"
    yield "|---|---|---|---|---|---|---|---|"
    base = np.array(rows[0].loss)
    for v in rows:
        loss = np.array(v.loss)
        change = loss - base
        error = change.std(ddof=1) / len(change) ** 0.5
        tensors = GGUF.open(v.path).tensors.values()
        n_bytes = sum(t.nbytes for t in tensors)
        weights = sum(int(np.prod(t.shape)) for t in tensors)
        yield (
            f"| {v.name} | {n_bytes / 1e6:.1f} | {8 * n_bytes / weights:.2f} | {loss.mean():.4f} | "
            f"{change.mean():+.4f} ± {error:.4f} | {np.exp(loss.mean()):.3f} | "
            f"{np.mean(v.kl):.2e} | {100 * np.mean(v.top1):.2f} % |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="float32 GGUF")
    parser.add_argument("text", type=Path, help="held-out text")
    parser.add_argument("--out", type=Path, help="write Markdown here; default: print")
    parser.add_argument("--window", type=int, default=1024, help="tokens of context")
    parser.add_argument("--windows", type=int, default=40, help="most windows to read")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = list(variants(args.model, Path(folder), args.threads))
        n = measure(rows, args.text.read_text(encoding="utf-8"), args.window, args.windows)
        lines = list(table(rows))
    page = f"""# Quant types, measured

Held-out loss, in nats per token, of the bundled model's float32 checkpoint, of its quantised forms
and of two types of KV cache. Measured on {n} predicted tokens of `{args.text}`, in
windows of {args.window} tokens, with AVX2 or scalar kernels of deskside on
{platform.machine()}. The change against F32
is paired by window, ± its standard error.

{chr(10).join(lines)}

`*`: matrices whose rows are no multiple of 256 fall back to IQ4_NL (4-bit types) or Q8_0;
`deskside quantize` reports it. `token_embd` and `output` have the row's type as well. KV is f16
unless the row says otherwise. KL and top-1 agreement compare with F32 token by token.

To make this page:

    deskside convert CHECKPOINT demo-f32.gguf --outtype f32
    python -m tools.quants_table demo-f32.gguf tools/train_demo/heldout.txt --out docs/QUANTS.md

CHECKPOINT is that of `tools/train_demo`. The changes are those of this small model; large models
usually lose less.
"""
    if args.out:
        args.out.write_text(page, encoding="utf-8")
    else:
        print(page)


if __name__ == "__main__":
    main()
