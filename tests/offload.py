"""Backends of a tiny model whose experts devices compute for the host, for tests."""

from __future__ import annotations

from functools import cache as cached
from typing import Any

import numpy as np

from deskside.gguf import GGUF
from deskside.machine.host import HostOptions
from deskside.models import build_tape
from tests.models import tiny
from tests.placements import IDS, batch, cache_options, cpu_moe
from tests.torch_devices import Layout, PlacedBackend, parse_devices, torch_ops

PRESET = "tiny-moe"
TAPE = build_tape(GGUF.open(tiny(PRESET)))
NAMES = list(TAPE.weights())
TOP_K = 4
N_EXPERT = 32
EXPERT = max(Layout.of(op).nbytes for op in TAPE.ops if op.kind == "experts")
TABLE = 4 * 4 * N_EXPERT  # bytes: four layers


def placed(types: str = "", *, size: str | int = "1GiB", **options: Any) -> Any:
    """Experts and embedding on the host where `options` have no placement."""
    file = GGUF.open(tiny(PRESET, types))
    placement = options.pop("placement", None) or cpu_moe(NAMES)
    devices = parse_devices(f"emu0:{size},emu1:1GiB,emu2:1GiB")
    settings = {"host": HostOptions(2), "max_tokens": 40} | options
    return PlacedBackend(file, build_tape(file), placement, devices, **settings)


def results(backend: Any, kv: str = "f16") -> list[np.ndarray]:
    """Of a session on a backend with devices: see `results_of`."""
    return results_of(backend, backend.new_cache(**cache_options(kv)))


def results_of(backend: Any, cache: Any) -> list[np.ndarray]:
    """A prompt in two steps, tokens one by one, three sequences together."""
    steps = [
        batch((0, 0, IDS[:5]), outputs=[]),
        batch((0, 5, IDS[5:28])),
        batch((0, 28, IDS[28:29])),
        batch((0, 29, IDS[28:29])),
        batch((2, 0, IDS[50:59]), (0, 30, IDS[42:43]), (1, 0, IDS[60:67])),
        batch((0, 31, IDS[43:44]), (1, 7, IDS[80:82]), (2, 9, IDS[59:60]), outputs=[0, 2, 3]),
    ]
    return [backend.run(step, cache) for step in steps]


@cached
def plain(types: str = "", kv: str = "f16", native: bool = False) -> list[np.ndarray]:
    """Without offload: with native=False the bits of every placement."""
    return results(placed(types, native=native), kv)


def assert_same(got: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(a, b)


def relative(a: list[np.ndarray], b: list[np.ndarray]) -> float:
    x, y = np.concatenate(a), np.concatenate(b)
    return float(np.linalg.norm(x - y) / np.linalg.norm(y))


def needed(backend: Any, name: str = "emu0", kv: str = "f16") -> int:
    """Bytes of weights, states, work memory, slots and cache of a device."""
    cache = backend.new_cache(**cache_options(kv))
    homes = backend.state_homes()
    states = sum(held.nbytes for i, held in cache.device_states.items() if homes[i] == name)
    work = backend._work(backend.devices[name])
    return backend.weight_bytes()[name] + states + work + backend.offload.nbytes(name)


def record_routes(monkeypatch: Any) -> list[np.ndarray]:
    """From now on the expert numbers of every layer that is run: (tokens, top_k) each."""
    found: list[np.ndarray] = []
    route = torch_ops.OPS["route"]

    def recorded(op: Any, inputs: Any, step: Any) -> Any:
        made = route(op, inputs, step)
        found.append(made[0].numpy().astype(int))
        return made

    monkeypatch.setitem(torch_ops.OPS, "route", recorded)
    return found
