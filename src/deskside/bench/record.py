"""The record of a characterisation: what was run, on what, and every raw sample. JSON on disk.

All times are seconds, all sizes bytes, all rates tokens per second, unless a name says otherwise.
`None` stands for what could not be measured. A record is written after every run, so that nothing
that was measured is lost; a file that has fewer runs than its workload can be resumed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, Self, get_args, get_origin, get_type_hints

from deskside.errors import DesksideError
from deskside.files import write_whole
from deskside.machine.watch import Host, Load

SCHEMA = 1


@dataclass
class Ceiling:
    """What the machine allows a run, from the tape's bytes and products (cost.py).

    `decode_bytes` are read for one token at the run's mean depth; `prefill_macs` are multiply-adds
    of a prompt token. `*_rate` are tokens per second, `*_limit` is "bandwidth" or "compute".
    """

    bandwidth: float | None = None  # bytes per second, sampled beside this run
    compute: float | None = None  # int8 multiply-adds per second
    decode_bytes: float | None = None
    prefill_macs: float | None = None
    decode_rate: float | None = None
    prefill_rate: float | None = None
    decode_limit: str | None = None
    prefill_limit: str | None = None


@dataclass
class Run:
    """One inference.

    side              "A", or "B" for the other engine of `bench --vs`
    cold              the first run after loading
    warmup            a run that was made only to warm up
    prompt_tokens     computed in prefill; `cached_tokens` more came from a cache
    prefill_seconds   computing the prompt; None where an endpoint does not tell
    first_seconds     from the request to the first token
    decode_seconds    from the first to the last token: generated_tokens - 1 steps
    total_seconds     from the request to the end
    gaps              between consecutive tokens, generated_tokens - 1 of them, to a microsecond
    clock             "engine", "server" (llama-server's timings) or "stream" (arrival here)
    output            SHA-256 of the generated text
    error             one line; the clocks of a failed run are not to be used
    """

    index: int
    name: str
    started: str = ""
    side: str = "A"
    cold: bool = False
    warmup: bool = False
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    prefill_seconds: float | None = None
    first_seconds: float | None = None
    decode_seconds: float | None = None
    total_seconds: float | None = None
    gaps: list[float] = field(default_factory=list)
    clock: str = "engine"
    stop_reason: str = ""
    output: str = ""
    load: Load = field(default_factory=Load)
    ceiling: Ceiling = field(default_factory=Ceiling)
    error: str | None = None

    @property
    def ok(self) -> bool:
        return self.error is None

    @property
    def depth(self) -> int:
        """Tokens in the context when decoding began."""
        return self.prompt_tokens + self.cached_tokens

    @property
    def prefill_rate(self) -> float | None:
        """Prompt tokens per second; None where nothing was computed or the time is unknown."""
        if not self.ok or not self.prompt_tokens or not self.prefill_seconds:
            return None
        return self.prompt_tokens / self.prefill_seconds

    @property
    def decode_rate(self) -> float | None:
        """Tokens per second after the first."""
        steps = self.generated_tokens - 1
        if not self.ok or steps < 1 or not self.decode_seconds:
            return None
        return steps / self.decode_seconds


@dataclass
class ModelFile:
    """A file of the model; `sha256` is of the whole file."""

    name: str
    nbytes: int
    sha256: str | None = None


@dataclass
class Target:
    """What was measured: `kind` is "deskside" (in process) or "endpoint"."""

    kind: str
    name: str  # the model, as people call it
    engine: str = ""  # "deskside 0.1.0, avx512" or what the server says of itself
    url: str | None = None
    options: dict[str, Any] = field(default_factory=dict)  # of the engine, as used
    files: list[ModelFile] = field(default_factory=list)
    architecture: str = ""
    weights_bytes: int | None = None
    types: dict[str, int] = field(default_factory=dict)  # bytes of weights by quant type
    plan: dict[str, int] = field(default_factory=dict)  # bytes: weights, kv, recurrent, buffers
    load_seconds: float | None = None
    n_ctx: int | None = None
    resident_bytes: int | None = None  # anonymous memory of the process after loading


@dataclass
class OpProfile:
    """Wall time of one sort of step in a decode or prefill step, beside what it must read and
    multiply."""

    name: str
    phase: str  # "decode" or "prefill"
    seconds: float  # a token
    nbytes: float | None = None  # a token
    macs: float | None = None  # a token


@dataclass
class Record:
    """`workload` is the whole workload as it was run (workload.py), so that it can be replayed."""

    workload: dict[str, Any]
    targets: dict[str, Target]  # by side
    machine: Host = field(default_factory=Host)
    runs: list[Run] = field(default_factory=list)
    profile: list[OpProfile] = field(default_factory=list)
    command: list[str] = field(default_factory=list)
    seed: int = 0
    created: str = ""
    deskside: str = ""
    schema: int = SCHEMA

    def save(self, path: Path) -> None:
        """Write the record; an older file is replaced at once or not at all."""
        write_whole(path, json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record; DesksideError names the file and what is wrong with it."""
        try:
            data = json.loads(
                path.read_text(encoding="utf-8"),
                parse_constant=_finite,
                parse_float=_finite,
                parse_int=_whole,
            )
        except (ValueError, RecursionError) as failure:
            raise DesksideError(f"{path}: not a record of deskside bench: {failure}") from None
        if not isinstance(data, dict) or "schema" not in data:
            raise DesksideError(f"{path}: not a record of deskside bench")
        if data["schema"] != SCHEMA:
            raise DesksideError(
                f"{path}: schema {data['schema']!r:.40}; this deskside reads schema {SCHEMA}"
            )
        return _build(cls, data, str(path))  # type: ignore[no-any-return]


def _finite(text: str) -> float:
    """A number of JSON; ValueError for NaN, Infinity and what is too large for a float."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no number")
    return value


def _whole(text: str) -> int:
    """A whole number of JSON; ValueError beyond 64 bits, where no count or size is."""
    value = int(text)
    if abs(value) >= 1 << 64:
        raise ValueError(f"{text[:20]}… is too large")
    return value


def _build(kind: Any, data: Any, where: str) -> Any:
    """`data` as JSON gives it, checked and made into `kind`: a dataclass, list, dict or scalar."""
    origin, args = get_origin(kind), get_args(kind)
    if kind is Any:
        return data
    if origin is UnionType:
        if data is None and type(None) in args:
            return None
        return _build(next(a for a in args if a is not type(None)), data, where)
    if origin is list:
        _expect(isinstance(data, list), where, "a list")
        return [_build(args[0], item, f"{where}[{i}]") for i, item in enumerate(data)]
    if origin is dict:
        _expect(isinstance(data, Mapping), where, "an object")
        return {key: _build(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if dataclasses.is_dataclass(kind):
        _expect(isinstance(data, Mapping), where, "an object")
        hints = get_type_hints(kind)
        known = {f.name: f for f in dataclasses.fields(kind)}
        for key in data:
            if key not in known:
                raise DesksideError(f"{where}: unknown field {key!r}")
        for name, f in known.items():
            required = f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
            if required and name not in data:
                raise DesksideError(f"{where}: field {name!r} is missing")
        built = {key: _build(hints[key], value, f"{where}.{key}") for key, value in data.items()}
        return kind(**built)  # type: ignore[operator]
    number = isinstance(data, int | float) and not isinstance(data, bool)
    if kind is float:
        _expect(number, where, "a number")
        return float(data)
    _expect(type(data) is kind, where, {int: "a whole number", str: "text"}.get(kind, "a boolean"))
    return data


def _expect(ok: bool, where: str, what: str) -> None:
    if not ok:
        raise DesksideError(f"{where}: expected {what}")
