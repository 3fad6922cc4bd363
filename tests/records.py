"""Plausible records with known facts in them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deskside.bench.record import Ceiling, ModelFile, OpProfile, Record, Run, Target
from deskside.machine.watch import Host, Load

BANDWIDTH, COMPUTE = 33.7e9, 900e9  # bytes and multiply-adds per second
WEIGHTS, MACS, KV = 0.9e9, 1.0e9, 10e3  # bytes and multiply-adds of a token, bytes of a position
PROMPTS = tuple(int(n) for n in np.geomspace(500, 16_000, 28))


def make_run(
    index: int,
    prompt: int,
    generated: int,
    rng: np.random.Generator,
    *,
    side: str = "A",
    name: str = "",
    rate: float = 30.0,
    slope: float = 0.0,
    noise: float = 0.003,
    factor: float = 1.0,
    cached: int = 0,
    ceilings: bool = True,
) -> Run:
    """A run that decodes at `rate` at depth 0 and at rate / (1 + slope * depth / 1000) elsewhere,
    prefills at 300 to 600 tok/s, both times `factor`; relative noise of standard deviation
    `noise`."""
    depth = prompt + cached + (generated - 1) / 2
    each = (1 + slope * depth / 1000) / rate / factor * (1 + noise * rng.standard_normal())
    gaps = each * (1 + 0.03 * rng.standard_normal(max(generated - 1, 0)))
    if len(gaps):
        gaps *= each * len(gaps) / gaps.sum()
    pp = 600 * factor * prompt / (prompt + 500) / (1 + prompt / 60_000)
    prefill = prompt / pp * (1 + noise * rng.standard_normal())
    ceiling = Ceiling()
    if ceilings:
        nbytes = WEIGHTS + KV * depth
        ceiling = Ceiling(
            bandwidth=BANDWIDTH,
            compute=COMPUTE,
            decode_bytes=nbytes,
            prefill_macs=MACS,
            decode_rate=BANDWIDTH / nbytes,
            prefill_rate=COMPUTE / MACS,
            decode_limit="bandwidth",
            prefill_limit="compute",
        )
    return Run(
        index=index,
        name=name or f"run-{index}",
        started=f"2026-07-01T12:{index % 60:02}:00+00:00",
        side=side,
        prompt_tokens=prompt,
        cached_tokens=cached,
        generated_tokens=generated,
        prefill_seconds=prefill,
        first_seconds=prefill + 0.05,
        decode_seconds=float(gaps.sum()),
        total_seconds=prefill + 0.05 + float(gaps.sum()),
        gaps=[round(float(g), 6) for g in gaps],
        stop_reason="length",
        output=f"{index:064x}",
        load=Load(0.02, 1.9, 3390, 3400, 0, 9 * 10**9),
        ceiling=ceiling,
    )


def make_record(
    *,
    prompts: Sequence[int] = PROMPTS,
    generated: int = 133,
    sides: Sequence[str] = ("A",),
    cold: bool = True,
    factors: Mapping[int, float] | None = None,
    side_factors: Mapping[str, float] | None = None,
    seed: int = 0,
    slope: float = 0.002,
    noise: float = 0.003,
    rate: float = 30.0,
    ceilings: bool = True,
    shuffle: bool = True,
) -> Record:
    """One run a prompt and side; with `cold` the first of each side is cold and half as fast.

    `factors` are by position within a side, `side_factors` by side. The order does not depend on
    the seed.
    """
    rng = np.random.default_rng(seed)
    order = np.random.default_rng(0).permutation(prompts) if shuffle else np.array(prompts)
    runs: list[Any] = []
    for position, prompt in enumerate(order.tolist()):
        for side in sides:
            factor = (factors or {}).get(position, 1.0) * (side_factors or {}).get(side, 1.0)
            is_cold = cold and position == 0
            run = make_run(
                len(runs),
                prompt,
                generated,
                rng,
                side=side,
                name=f"p{position}",
                rate=rate,
                slope=slope,
                noise=noise,
                factor=factor * (0.5 if is_cold else 1),
                ceilings=ceilings,
            )
            run.cold = is_cold
            runs.append(run)
    target = Target(
        kind="deskside",
        name="qwen3.5-35b-a3b, 8 layers",
        engine="deskside 0.1.0, avx512",
        options={"ctx": 32768, "threads": 2, "ctk": "f16"},
        files=[ModelFile("slice.gguf", 4_900_000_000, "ab" * 32)],
        architecture="qwen35moe",
        weights_bytes=4_800_000_000,
        types={"IQ4_NL": 4_000_000_000, "Q8_0": 800_000_000},
        plan={"weights": 4_800_000_000, "kv": 300_000_000, "buffers": 50_000_000},
        load_seconds=3.2,
        n_ctx=32768,
        resident_bytes=5_200_000_000,
    )
    return Record(
        workload={"name": "article", "runs": len(runs)},
        targets={side: target for side in sides},
        machine=Host(
            cpu="Intel Xeon",
            cores=2,
            memory=24 * 2**30,
            kernel="6.1.0",
            governor="performance",
            python="3.11.7",
            flags=["avx512f", "avx512_vnni"],
        ),
        runs=runs,
        profile=[
            OpProfile("experts", "decode", 0.018, 5.0e8, 4e8),
            OpProfile("linear", "decode", 0.009, 2.6e8, 3e8),
            OpProfile("attention", "decode", 0.003, 6e7, None),
            OpProfile("delta net", "decode", 0.002, None, None),
            OpProfile("experts", "prefill", 0.0011, 2e6, 4e8),
            OpProfile("linear", "prefill", 0.0006, 1e6, 3e8),
        ],
        command=["deskside", "bench", "-m", "slice.gguf", "--workload", "article"],
        seed=seed,
        created="2026-07-01T12:00:00+00:00",
        deskside="0.1.0",
    )
