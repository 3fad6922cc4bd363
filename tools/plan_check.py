"""Compares predicted with measured speed: `python -m tools.plan_check [FILE...]`.

Without files, it takes the slices that `deskside predict` and `make bench-peers` keep (35b with 8
layers; 397b with 4 layers and 320 experts). For each file it takes these steps:

1. Load the model, and measure bandwidth and arithmetic. With `--calibrate`, a profile of the
   *first* file gives the share of both that each sort of op reaches (plan/calibrate.py). So the
   other files test these shares.
2. Time decode at three depths, and prefill of one and four ubatches, in rounds.
3. Predict the same figures with the plan for this machine.

Writes Markdown for docs/PLANNER.md. `--store` stores the measurements for `deskside plan`. Use a
quiet machine. The exit code is 1 if a prediction is wrong by more than 20 %.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import statistics
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from deskside.bench.measure.profile import profile
from deskside.bench.predict.slices import cache_folder
from deskside.console import note, progress_bar
from deskside.engine import LLM
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError
from deskside.gguf.quants import quant_type
from deskside.machine import rates
from deskside.machine.descriptions import store, this_machine
from deskside.machine.devices import Efficiency, Figure, Machine
from deskside.plan import Options, make_plan
from deskside.plan.calibrate import calibrate, sort_of
from deskside.plan.rules import Rules
from deskside.plan.speed import SpeedModel
from deskside.plan.units import group_units
from deskside.progress import Progress
from deskside.tape.cost import BatchShape

FILES = ("qwen3.5-35b-a3b-8l.gguf", "qwen3.5-397b-a17b-4l-320e.gguf")
DEPTHS = (16, 1024, 4096)
GENERATE = 32
UBATCH = 512
TARGET = 0.2
Sums = dict[str, tuple[float, float, float]]  # seconds, bytes, multiply-adds


def measured_machine(threads: int, samples: int = 3) -> Machine:
    """This machine, with bandwidth and 8-bit arithmetic measured now."""
    base = this_machine(threads)
    when = f"measured {datetime.date.today()}"
    bandwidth = statistics.median(rates.bandwidth(threads) for _ in range(samples))
    compute = statistics.median(rates.compute(threads) for _ in range(samples))
    cpu = replace(base.cpu, bandwidth=Figure(bandwidth, when), compute=Figure(compute, when))
    return replace(base, devices=(cpu, *base.gpus))


def shares(llm: LLM, machine: Machine, progress: Progress) -> dict[str, Efficiency]:
    """The share of both limits that each sort of op reaches, from a profile of this model."""
    depth = 1024
    found: dict[str, Sums] = {"decode": {}, "prefill": {}}  # sort -> sums
    tokens = {"decode": 1, "prefill": min(llm.ubatch, llm.ctx)}
    for row in profile(llm, depth, progress):
        sums = found[row.phase]
        n = tokens[row.phase]
        old = sums.get(sort_of(row.name), (0.0, 0.0, 0.0))
        new = (row.seconds * n, (row.nbytes or 0.0) * n, (row.macs or 0.0) * n)
        sums[sort_of(row.name)] = (old[0] + new[0], old[1] + new[1], old[2] + new[2])
    return calibrate(found["decode"], found["prefill"], machine.cpu)


def timed(llm: LLM, rounds: int, progress: Progress) -> dict[str, float]:
    """Median tokens per second by name."""
    rng = np.random.default_rng(0)
    normal = np.flatnonzero(~llm.tokenizer.banned(llm.tape.n_vocab))
    # Use no token twice, because a repeated one would find its experts in the CPU's cache.
    params = SamplingParams(
        max_tokens=GENERATE, temperature=0, presence_penalty=1e6, repeat_last_n=-1, ignore_eos=True
    )
    rates: dict[str, list[float]] = {}
    for r in range(rounds):
        for n in (UBATCH, 4 * UBATCH):
            progress("measuring", r, rounds)
            llm.reset()
            stream = llm.stream(rng.choice(normal, n).tolist(), SamplingParams(max_tokens=1))
            list(stream)
            rates.setdefault(f"prefill of {n}", []).append(n / stream.timings.prompt_seconds)
        ids: list[int] = []
        llm.reset()
        for depth in DEPTHS:
            ids += rng.choice(normal, depth - len(ids)).tolist()
            stream = llm.stream(ids, params)
            list(stream)
            ids += stream.tokens[:-1]
            rates.setdefault(f"decode at {depth}", []).append(stream.timings.decode_rate)
    return {name: statistics.median(found) for name, found in rates.items()}


def predicted(llm: LLM, machine: Machine) -> dict[str, float]:
    """Tokens per second by name, predicted by the plan's speed model."""
    memory = replace(machine.cpu, memory=1 << 50)  # the model is loaded already
    machine = replace(machine, devices=(memory,))
    options = Options(ctx=llm.ctx, ubatch=llm.ubatch, threads=machine.cores)
    plan = make_plan(llm.tape, machine, Rules(), options)
    f16 = quant_type("f16")
    model = SpeedModel(group_units(llm.tape, {}), plan.machine, f16, f16)
    place = np.zeros(len(model.cut.atoms), np.intp)
    found = {
        f"prefill of {n}": model.rate(BatchShape(llm.ubatch, 0), place, n).rate
        for n in (UBATCH, 4 * UBATCH)
    }
    for depth in DEPTHS:
        found[f"decode at {depth}"] = model.rate(BatchShape(1, depth + GENERATE // 2), place).rate
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("files", nargs="*", type=Path)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--calibrate", action="store_true", help="from the first file")
    parser.add_argument("--store", action="store_true", help="for `deskside plan`")
    a = parser.parse_args()
    files = a.files or [f for name in FILES if (f := cache_folder() / name).exists()]
    if not files:
        raise DesksideError(f"no slices in {cache_folder()}; name files, or run `deskside predict`")
    efficiency: dict[str, Efficiency] = {}
    worst = 0.0
    print("| model | | predicted, tok/s | measured | error |\n|---|---|---|---|---|")
    for path in files:
        with progress_bar() as progress:
            ctx = max(DEPTHS[-1] + 2 * GENERATE, 4 * UBATCH + 2)
            llm = LLM(path, ctx=ctx, threads=a.threads, ubatch=UBATCH, progress=progress)
            machine = measured_machine(llm.config.n_threads)
            timed(llm, 1, progress)  # warms up
            if a.calibrate and not efficiency:
                efficiency = shares(llm, machine, progress)
            rates = timed(llm, a.rounds, progress)
        machine = replace(machine, efficiency=efficiency)
        for name, rate in predicted(llm, machine).items():
            error = rate / rates[name] - 1
            worst = max(worst, abs(error))
            cells = (path.stem, name, f"{rate:.1f}", f"{rates[name]:.1f}", f"{100 * error:+.0f} %")
            print(f"| {' | '.join(cells)} |", flush=True)
        cpu = machine.cpu
        note(f"{machine.cores} threads, {cpu.bandwidth.value / 1e9:.1f} GB/s, "
             f"{cpu.compute.value / 1e9:.0f} G products/s")  # fmt: skip
        del llm
        gc.collect()  # a model and its last stream reference each other
    if a.store:
        if efficiency:
            source = f"measured {datetime.date.today()}"
            machine = replace(machine, efficiency_source=source)
        else:  # those of an earlier run stay
            kept = this_machine(machine.cores)
            machine = replace(
                machine, efficiency=kept.efficiency, efficiency_source=kept.efficiency_source
            )
        note(f"stored in {store(machine)}")
    return int(worst > TARGET)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except DesksideError as failure:
        sys.exit(f"error: {failure}")
