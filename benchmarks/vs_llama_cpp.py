"""deskside against llama.cpp and ik_llama.cpp on one GGUF file, paired in one run.

    python benchmarks/vs_llama_cpp.py model.gguf --threads 2 --prompt 512 --gen 64 --rounds 5

Every engine lives in a process of its own that has the model loaded and sleeps while another one is
timed. A round times each engine once on the same fresh random prompt (token ids: no tokenizer, no
prompt cache), prefill and then greedy decode; the order turns by one each round. A shared machine
drifts, so the figure to quote is the median over rounds of the ratio within a round.

Settings are each engine's best for one CPU socket: llama.cpp (wheel xllamacpp) with repacking,
flash attention on auto, f16 KV; ik_llama.cpp with flash attention and its fused MoE, `--ik-repack`
for its -rtr; the same threads, ubatch and context for all. The instruction sets that a wheel was
compiled for are in the output: a wheel built for AVX2 is not what a native build would reach.

The ceiling of decode is the measured read bandwidth over the bytes of weights that a token needs.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from deskside import LLM, SamplingParams, _native
from deskside.gguf import GGUF

ORACLES = Path(__file__).resolve().parent.parent / "tests" / "oracles"
sys.path.insert(0, str(ORACLES.parent))

from oracles.remote import Remote, RemoteError  # noqa: E402

BANDWIDTH_BYTES = 1 << 29  # far beyond any cache
NORMAL_TOKEN = 1  # tokenizer.ggml.token_type
IDLE_LIMIT = 0.02  # share of a core that a waiting engine may use


class Deskside:
    """deskside behind the interface of `oracles.capi`; made in a worker process."""

    def __init__(self, path: str, n_ctx: int, threads: int, ubatch: int) -> None:
        self.llm = LLM(path, ctx=n_ctx, threads=threads, ubatch=ubatch)

    def timed(self, ids: Sequence[int], n: int) -> tuple[float, float]:
        """Seconds to take in ids, and for n greedy steps behind them, sampler included."""
        self.llm.reset()
        params = SamplingParams(max_tokens=n + 1, temperature=0, ignore_eos=True)
        t = self.llm.generate(ids, params).timings
        if (t.prompt_tokens, t.generated_tokens) != (len(ids), n + 1):
            raise RuntimeError(f"{t.prompt_tokens} + {t.generated_tokens} tokens were computed")
        return t.prompt_seconds, t.decode_seconds

    def info(self) -> dict[str, Any]:
        """The instruction set in use."""
        return {"system": getattr(self.llm.backend, "isa", "?")}


def bytes_per_token(file: GGUF) -> int:
    """Bytes of weights that decoding one token reads.

    Every tensor but the embedding table, of which one row is read (a tied head reads all of it);
    of routed experts the share that is used; no multi-token-prediction layers.
    """
    arch = file.metadata["general.architecture"]
    blocks = file.metadata[f"{arch}.block_count"]
    main = blocks - file.metadata.get(f"{arch}.nextn_predict_layers", 0)
    used = file.metadata.get(f"{arch}.expert_used_count", 0)
    total = file.metadata.get(f"{arch}.expert_count", 1)
    tied = "output.weight" not in file.tensors
    read = 0.0
    for name, tensor in file.tensors.items():
        block = re.match(r"blk\.(\d+)\.", name)
        if (block and int(block[1]) >= main) or (name == "token_embd.weight" and not tied):
            continue
        read += tensor.nbytes * (used / total if "_exps." in name else 1)
    return round(read)


def cpu_seconds(worker: Remote) -> float:
    """CPU time that the worker's process has used, in steps of 10 ms (Linux)."""
    fields = Path(f"/proc/{worker.pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / 100


def start(args: argparse.Namespace) -> dict[str, Remote]:
    """A worker per engine; one that cannot run this file is named and left out."""
    shape = {
        "n_ctx": args.prompt + args.gen + 1,
        "threads": args.threads,
        "ubatch": args.ubatch,
    }
    sources: dict[str, tuple[Path, str, dict[str, Any]]] = {
        "deskside": (Path(__file__).resolve(), "Deskside", {}),
        "llama.cpp": (ORACLES / "capi.py", "LlamaCpp", {}),
        "ik_llama.cpp": (ORACLES / "capi.py", "IkLlama", {"repack": args.ik_repack}),
    }
    workers = {}
    for name in ("deskside", *args.against):
        source, class_name, extra = sources[name]
        begun = time.perf_counter()
        try:
            workers[name] = Remote(source, class_name, str(args.model), **shape, **extra)
        except RemoteError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        info = workers[name].info()["system"]
        print(f"{name}: loaded in {time.perf_counter() - begun:.1f} s; {info}", file=sys.stderr)
    return workers


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All rounds: {"engines": {name: {"prefill": [tok/s], "decode": [tok/s]}}, ...}."""
    file = GGUF.open(args.model)
    normal = np.flatnonzero(file.metadata["tokenizer.ggml.token_type"] == NORMAL_TOKEN)
    rng = np.random.default_rng(args.seed)
    workers = start(args)
    rates: dict[str, dict[str, list[float]]] = {n: {"prefill": [], "decode": []} for n in workers}
    idle: dict[str, list[float]] = {name: [] for name in workers}
    bandwidth: list[float] = []
    try:
        for r in range(-args.warmup, args.rounds):
            ids = rng.choice(normal, args.prompt).tolist()
            names = list(workers)
            names = names[r % len(names) :] + names[: r % len(names)]
            measured = _native.read_bandwidth(args.threads, BANDWIDTH_BYTES, 4)
            for name in names:
                waiting = {n: cpu_seconds(w) for n, w in workers.items() if n != name}
                begun = time.perf_counter()
                prefill, decode = workers[name].timed(ids, args.gen)
                elapsed = time.perf_counter() - begun
                if r < 0:
                    continue
                rates[name]["prefill"].append(args.prompt / prefill)
                rates[name]["decode"].append(args.gen / decode)
                for n, before in waiting.items():
                    idle[n].append((cpu_seconds(workers[n]) - before) / elapsed)
                print(
                    f"round {r + 1} {name}: prefill {args.prompt / prefill:.1f}, "
                    f"decode {args.gen / decode:.2f} tok/s",
                    file=sys.stderr,
                )
            if r >= 0:
                bandwidth.append(measured)
        systems = {name: worker.info()["system"] for name, worker in workers.items()}
    finally:
        for worker in workers.values():
            worker.close()
    read = bytes_per_token(file)
    return {
        "model": str(args.model),
        "settings": {k: getattr(args, k) for k in ("threads", "ubatch", "prompt", "gen", "rounds")},
        "engines": rates,
        "systems": systems,
        "idle_cpu": {name: max(shares, default=0.0) for name, shares in idle.items()},
        "bytes_per_token": read,
        "bandwidth": bandwidth,
        "decode_ceiling": statistics.median(bandwidth) / read,
    }


def show(result: dict[str, Any]) -> None:
    """The result as a table."""
    console = Console()
    ours = result["engines"]["deskside"]
    settings = ", ".join(f"{key} {value}" for key, value in result["settings"].items())
    table = Table(title=f"{Path(result['model']).name}: {settings}")
    for column in ("engine", "prefill tok/s", "decode tok/s", "prefill ratio", "decode ratio"):
        table.add_column(column, justify="left" if column == "engine" else "right")
    for name, theirs in result["engines"].items():
        cells = [spread(theirs[phase]) for phase in ("prefill", "decode")]
        for phase in ("prefill", "decode"):
            pairs = zip(ours[phase], theirs[phase], strict=True)
            cells.append("" if name == "deskside" else spread([a / b for a, b in pairs]))
        table.add_row(name, *cells)
    console.print(table)
    console.print("Medians over rounds (min..max); a ratio is deskside's rate over that engine's.")
    console.print(
        f"read bandwidth {spread([b / 1e9 for b in result['bandwidth']])} GB/s, "
        f"{result['bytes_per_token'] / 1e9:.3f} GB of weights a token: "
        f"decode ceiling {result['decode_ceiling']:.1f} tok/s"
    )
    for name, share in result["idle_cpu"].items():
        if share > IDLE_LIMIT:
            console.print(f"{name} used {share:.0%} of a core while another engine was timed")


def spread(values: Sequence[float]) -> str:
    """Median (min..max)."""
    middle, low, high = (
        f"{x:.0f}" if x >= 100 else f"{x:.3g}"
        for x in (statistics.median(values), min(values), max(values))
    )
    return f"{middle} ({low}..{high})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ubatch", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=512, help="tokens of prefill")
    parser.add_argument("--gen", type=int, default=64, help="tokens of decode")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=1, help="rounds that do not count")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--against",
        nargs="*",
        default=["llama.cpp"],
        choices=["llama.cpp", "ik_llama.cpp"],
        help="the engines to compare with",
    )
    parser.add_argument("--ik-repack", action="store_true", help="ik_llama.cpp's -rtr")
    parser.add_argument("--json", type=Path, help="write the result here")
    args = parser.parse_args()
    result = run(args)
    show(result)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
