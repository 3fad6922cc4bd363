"""Times decode and loading for each kind of memory: `python -m tools.memory_options`.

Kinds are page sizes: 4 KiB, transparent, and reserved 2 MiB and 1 GiB if enough are reserved. With
several NUMA nodes, each is also tried spread over the nodes. Every round loads each kind again, so
that a drift of the machine affects all. Defaults follow these figures. Use a quiet machine.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from deskside.bench.predict.slices import cache_folder
from deskside.console import note, progress_bar
from deskside.engine import LLM
from deskside.engine.config import EngineConfig
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError
from deskside.machine import pages

FILE = "qwen3.5-35b-a3b-8l.gguf"
Option = tuple[str, str]  # huge_pages, numa
BASE: Option = ("auto", "none")


def options() -> list[Option]:
    """The options to try, the default first."""
    numa = pages.NUMA if len(pages.nodes()) > 1 else ("none",)
    found = list(itertools.product(pages.HUGE_PAGES, numa))
    return sorted(found, key=lambda option: option != BASE)


def timed(path: Path, option: Option, threads: int, tokens: int) -> tuple[float, float]:
    """Tokens per second of decode, and the seconds of loading."""
    huge_pages, numa = option
    began = time.perf_counter()
    llm = LLM(path, ctx=tokens + 32, threads=threads, huge_pages=huge_pages, numa=numa)
    loading = time.perf_counter() - began
    normal = np.flatnonzero(~llm.tokenizer.banned(llm.tape.n_vocab))
    ids = np.random.default_rng(0).choice(normal, 16).tolist()
    params = SamplingParams(max_tokens=tokens, temperature=0, ignore_eos=True)
    llm.generate(ids, SamplingParams(max_tokens=8, temperature=0, ignore_eos=True))  # warms up
    llm.reset()
    rate = llm.generate(ids, params).timings.decode_rate
    del llm
    gc.collect()  # a model and its last stream reference each other
    return rate, loading


def table(found: Mapping[Option, Sequence[tuple[float, float]]]) -> str:
    """A Markdown table of medians, best decode, and decode compared with the default's."""
    lines = [
        "| pages | NUMA | decode, tok/s | best | against auto | load, s |",
        "|---|---|---|---|---|---|",
    ]
    base = statistics.median(rate for rate, _ in found[BASE])
    for (huge_pages, numa), samples in found.items():
        rates = [rate for rate, _ in samples]
        rate, load = statistics.median(rates), statistics.median(s for _, s in samples)
        cells = (huge_pages, numa, f"{rate:.2f}", f"{max(rates):.2f}",
                 f"{100 * (rate / base - 1):+.1f} %", f"{load:.1f}")  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("file", nargs="?", type=Path, default=cache_folder() / FILE)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    a = parser.parse_args(arguments)
    threads = EngineConfig(threads=a.threads).n_threads
    found: dict[Option, list[tuple[float, float]]] = {option: [] for option in options()}
    with progress_bar() as progress:
        for r in range(a.rounds):
            for i, option in enumerate(list(found)):
                progress(f"round {r + 1}: {option[0]}, {option[1]}", r * len(found) + i,
                         a.rounds * len(found))  # fmt: skip
                try:
                    found[option].append(timed(a.file, option, threads, a.tokens))
                except DesksideError as error:
                    if option == BASE:
                        raise
                    note(str(error))
                    del found[option]
    print(table(found))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DesksideError as failure:
        sys.exit(f"error: {failure}")
