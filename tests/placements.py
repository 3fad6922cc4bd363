"""Placements of tiny models, and a session that is run on each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deskside.gguf import GGUF
from deskside.gguf.quants import quant_type
from deskside.models import build_tape
from deskside.tape.cache import Batch, Cache, Segment
from tests.models import tiny

IDS = np.random.default_rng(0).integers(0, 2000, 90).tolist()


def cpu_moe(names: Any, device: str = "emu0") -> dict[str, str]:
    """Routed experts and the embedding on the CPU, all else on one device."""
    host = ("_exps", "token_embd")
    return {name: "cpu" if any(h in name for h in host) else device for name in names}


def named(preset: str) -> dict[str, dict[str, str]]:
    """The placements that people ask for, and some that they should not."""
    names = list(build_tape(GGUF.open(tiny(preset))).weights())

    def place(rule: Any) -> dict[str, str]:
        return {name: rule(name) for name in names}

    def layer(name: str) -> int:
        return int(name.split(".")[1]) if name.startswith("blk.") else -1

    return {
        "one device": place(lambda n: "emu0"),
        "cpu-moe": cpu_moe(names),
        "experts on a device": place(lambda n: "emu0" if "_exps" in n else "cpu"),
        "attention apart": place(lambda n: "emu1" if "attn" in n or "ssm" in n else "emu0"),
        "uneven layers": place(lambda n: ("emu0", "emu1", "emu1", "emu1", "cpu")[layer(n)]),
        "one expert tensor alone": place(lambda n: "emu2" if "blk.1.ffn_up_exps" in n else "cpu"),
        "down alone": place(lambda n: "emu1" if "ffn_down" in n else "emu0"),
        "convolution apart": place(lambda n: "cpu" if "conv1d" in n else "emu0"),
        "head alone": place(lambda n: "emu2" if n.startswith("output") else "cpu"),
        "by turns": dict(zip(names, ["cpu", "emu0", "emu1", "emu2"] * len(names), strict=False)),
    }


def drawn(names: Any, seed: int) -> dict[str, str]:
    """A random device for every tensor."""
    rng = np.random.default_rng(seed)
    return {name: str(rng.choice(["cpu", "emu0", "emu1", "emu2"])) for name in names}


def session(backend: Any, cache: Cache) -> list[np.ndarray]:
    """Prefill in chunks (one without logits), decode, then three sequences in one batch."""
    steps = [
        batch((0, 0, IDS[:23]), outputs=[]),
        batch((0, 23, IDS[23:40])),
        batch((0, 40, IDS[40:41])),
        batch((0, 41, IDS[41:42])),
        batch((2, 0, IDS[50:59]), (0, 42, IDS[42:43]), (1, 0, IDS[60:80])),
        batch((0, 43, IDS[43:44]), (1, 20, IDS[80:82]), (2, 9, IDS[59:60]), outputs=[0, 2, 3]),
    ]
    return [backend.run(step, cache) for step in steps]


def batch(*parts: tuple[int, int, list[int]], outputs: list[int] | None = None) -> Batch:
    ids = np.array([i for _, _, own in parts for i in own], np.int32)
    wanted = np.arange(len(ids)) if outputs is None else np.array(outputs)
    segments = tuple(Segment(slot, pos, len(own)) for slot, pos, own in parts)
    return Batch(ids, segments, wanted.astype(np.int32))


def cache_options(kv: str) -> Mapping[str, Any]:
    return {"n_slots": 3, "n_ctx": 128, "k_type": quant_type(kv), "v_type": quant_type(kv)}
