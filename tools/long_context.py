"""A context of 262,144 tokens, measured: `python -m tools.long_context --out docs/CONTEXT.md`.

Three parts.
decode   a slice at true shapes with one attention layer. Its keys and values are filled with random
         ones up to each depth, for what a step costs does not depend on where they came from. f16
         and q8_0 take turns, the bandwidth is measured before each.
error    the same steps with float32 keys and values: what f16 and q8_0 change in the logits.
whole    a tiny model computes 262,144 tokens in one prompt. The last token is then computed once
         more by the reference backend on the same cache.

Run it on a quiet machine.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from deskside import LLM, __version__
from deskside.backends.reference import ReferenceBackend
from deskside.bench.predict.slices import Slice, cache_folder
from deskside.console import note, progress_bar
from deskside.convert.synth import synth_file
from deskside.files import write_whole
from deskside.gguf import GGUF
from deskside.gguf.encoders import quantize
from deskside.gguf.quants import quant_type
from deskside.machine import rates
from deskside.machine.system import cpu_name, usable_cores
from deskside.tape.cache import Batch, Cache, Segment
from deskside.tape.cost import Work
from deskside.tape.tape import KVState

DEPTHS = (512, 16_384, 65_536, 131_072, 262_144)
TYPES = ("f16", "q8_0")
PIECE = 4096  # positions that are filled at a time
Logits = NDArray[np.float32]


def fill(cache: Cache, seed: int) -> None:
    """Random keys and values at every position; the same ones for every type of the same `seed`.

    Keys are normal, as after their norm. Each head's values are normal as well.
    """
    for state, arrays in zip(cache.states, cache.arrays, strict=True):
        if not isinstance(state, KVState):
            continue
        rng = np.random.default_rng((seed, state.layer))
        for start in range(0, cache.n_ctx, PIECE):
            n = min(PIECE, cache.n_ctx - start)
            for array, t in zip(arrays, (cache.k_type, cache.v_type), strict=True):
                x = rng.standard_normal((state.kv_heads * n, state.head_dim), np.float32)
                rows = quantize(x, t).reshape(state.kv_heads, n, -1)
                array[0, :, start : start + n] = rows


class Run:
    """A model and a filled cache of one type."""

    def __init__(self, llm: LLM, kind: str, n_ctx: int) -> None:
        t = quant_type(kind)
        self.llm, self.kind = llm, kind
        self.cache = Cache(llm.tape.states, n_slots=1, n_ctx=n_ctx, k_type=t, v_type=t)
        fill(self.cache, 7)

    def step(self, token: int, pos: int) -> Logits:
        batch = Batch(np.array([token], np.int32), (Segment(0, pos, 1),), np.array([0], np.int32))
        return np.array(self.llm.backend.run(batch, self.cache)[0])


def read_bytes(llm: LLM, kind: str, depth: int) -> int:
    """Bytes that a decode step reads: weights, keys and values."""
    return int(Work.of(llm.tape).decode(depth, kind)["bytes"])


def decode(runs: Sequence[Run], depths: Sequence[int], tokens: int) -> Iterator[str]:
    """Rows of the table of speeds. The runs take turns, token by token."""
    threads = usable_cores()
    yield (
        "| depth | "
        + " | ".join(f"{r.kind}, tok/s | KV read a token | of the bandwidth" for r in runs)
        + " | bandwidth |"
    )
    yield "|" + "---|" * (2 + 3 * len(runs))
    for depth in depths:
        bandwidth = rates.bandwidth(threads)
        seconds: dict[str, list[float]] = {r.kind: [] for r in runs}
        for i in range(tokens + 4):
            for run in runs:
                began = time.perf_counter()
                run.step(100 + i, depth - tokens - 4 + i)
                seconds[run.kind].append(time.perf_counter() - began)
        cells = [f"{depth:,}"]
        for run in runs:
            median = statistics.median(seconds[run.kind][4:])
            read = read_bytes(run.llm, run.kind, depth)
            kv = read - read_bytes(run.llm, run.kind, 0)
            cells += [f"{1 / median:.1f}", f"{kv / 1e6:.1f} MB"]
            cells += [f"{100 * read / median / bandwidth:.0f} %"]
        yield f"| {' | '.join(cells)} | {bandwidth / 1e9:.1f} GB/s |"


def divergence(p: Logits, q: Logits) -> float:
    """KL(softmax(p) || softmax(q)) in nats."""
    a, b = (x.astype(np.float64) - x.max() for x in (p, q))
    a, b = a - np.log(np.exp(a).sum()), b - np.log(np.exp(b).sum())
    return float((np.exp(a) * (a - b)).sum())


def error(exact: Run, runs: Sequence[Run], depths: Sequence[int], tokens: int) -> Iterator[str]:
    """Rows of the table of errors, against float32 keys and values."""
    yield "| depth | " + " | ".join(f"{r.kind}, logits | {r.kind}, KL" for r in runs) + " |"
    yield "|" + "---|" * (1 + 2 * len(runs))
    for depth in depths:
        errors: dict[str, list[tuple[float, float]]] = {r.kind: [] for r in runs}
        for i in range(tokens):
            token, pos = 100 + i, depth - tokens + i
            for run in (exact, *runs):
                for state, arrays in zip(run.cache.states, run.cache.arrays, strict=True):
                    if not isinstance(state, KVState):  # every step begins alike
                        for array in arrays:
                            array[...] = 0
            wanted = exact.step(token, pos)
            for run in runs:
                got = run.step(token, pos)
                relative = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
                errors[run.kind].append((float(relative), divergence(wanted, got)))
        cells = [f"{depth:,}"]
        for run in runs:
            cells += [f"{statistics.median(x):.1e}" for x in zip(*errors[run.kind], strict=True)]
        yield f"| {' | '.join(cells)} |"


def whole(n_ctx: int, kind: str, folder: Path) -> str:
    """A tiny model computes a prompt of `n_ctx` tokens; the reference checks its last token."""
    path = folder / "tiny.gguf"
    f32 = quant_type("F32")  # no rounding of activations: the two backends differ by order of sums
    changes = {"max_position_embeddings": n_ctx}
    synth_file("tiny-moe", path, layers=4, types=((".", f32),), overrides=changes)
    file, t = GGUF.open(path), quant_type(kind)
    llm = LLM(file, ctx=64)
    ids = np.random.default_rng(1).integers(0, 250, n_ctx).astype(np.int32)
    cache = Cache(llm.tape.states, n_slots=1, n_ctx=n_ctx, k_type=t, v_type=t)
    began = time.perf_counter()
    with progress_bar() as report:
        for start in range(0, n_ctx - 1, llm.ubatch):
            piece = ids[start : min(start + llm.ubatch, n_ctx - 1)]
            last = np.array([len(piece) - 1], np.int32)
            llm.backend.run(Batch(piece, (Segment(0, start, len(piece)),), last), cache)
            report("prefill", start + len(piece), n_ctx)
    seconds = time.perf_counter() - began
    own = Cache(llm.tape.states, n_slots=1, n_ctx=n_ctx, k_type=t, v_type=t)
    for ours, theirs in zip(own.arrays, cache.arrays, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            a[...] = b
    batch = Batch(ids[-1:], (Segment(0, n_ctx - 1, 1),), np.array([0], np.int32))
    got = np.array(llm.backend.run(batch, cache)[0])
    wanted = ReferenceBackend(file, llm.tape).run(batch, own)[0]
    relative = float(np.linalg.norm(got - wanted) / np.linalg.norm(wanted))
    return (
        f"4 layers of `tiny-moe`, random float32 weights, {kind} KV: {n_ctx:,} tokens in "
        f"{seconds:.0f} s. The last token's logits are {relative:.1e} (relative L2) from those of "
        "the reference backend on the same cache."
    )


def page(a: argparse.Namespace) -> Iterator[str]:
    """The lines of docs/CONTEXT.md."""
    depths = [d for d in DEPTHS if d <= a.ctx]
    slice_ = Slice(a.preset, a.layers, a.experts)
    path = slice_.file(cache_folder())
    if not path.exists():
        with progress_bar() as report:
            synth_file(a.preset, path, progress=report, **slice_.shape)
    llm = LLM(path, ctx=64)
    runs = [Run(llm, kind, a.ctx) for kind in TYPES]
    yield "# A context of 262,144 tokens, measured\n"
    yield (
        f"{cpu_name()}, {usable_cores()} cores, {datetime.date.today()}, deskside {__version__}. "
        f"Made by\n\n    python -m tools.long_context --out docs/CONTEXT.md\n"
    )
    yield (
        f"## Decode\n`{path.stem}` at true shapes, random weights, one attention layer of "
        f"{a.layers}. Keys and values are random; what a step costs does not depend on where they "
        f"came from. Median of {a.tokens} tokens; the two types take turns.\n"
    )
    for line in decode(runs, depths, a.tokens):
        note(line)
        yield line
    yield (
        "\n## What the type of the cache changes\nOne step of the same slice, the same keys and "
        "values in float32, f16 and q8_0: relative L2 error of the logits and KL divergence, "
        "medians of 16 tokens. Random keys make attention flat, which averages the errors of many "
        "positions; a model that looks at few of them has those of a short context.\n"
    )
    exact = Run(llm, "f32", a.ctx)
    for line in error(exact, runs, depths, 16):
        note(line)
        yield line
    del exact, runs, llm
    yield "\n## One prompt of 262,144 tokens"
    with tempfile.TemporaryDirectory() as folder:
        for kind in TYPES:
            line = whole(a.ctx, kind, Path(folder))
            note(line)
            yield "- " + line


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--preset", default="qwen3.5-35b-a3b")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--experts", type=int, default=128)
    parser.add_argument("--ctx", type=int, default=DEPTHS[-1])
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args(arguments)
    write_whole(a.out, "\n".join(page(a)) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
