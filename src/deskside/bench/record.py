"""The record of a measurement: what ran, on what, and every raw sample. It is a JSON file.

Times are seconds, sizes bytes, rates tokens per second, unless a name says otherwise. `None` means
not measured. The file is written after every run, so that no run is lost. A file with fewer runs
than its workload can be resumed.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Self

import msgspec
from msgspec import Struct, field

from deskside import schema
from deskside.errors import DesksideError
from deskside.files import write_whole
from deskside.machine.watch import Host, Load

SCHEMA = 1
LOOP = 200  # characters that must repeat at an answer's end before it is called a loop

# Counts and sizes fit 64 bits.
Whole = Annotated[int, msgspec.Meta(ge=-(1 << 63), le=(1 << 63) - 1)]


class Ceiling(Struct, forbid_unknown_fields=True):
    """The highest rates that the machine allows a run (tape/cost.py).

    decode_bytes   bytes read per token at the run's mean depth
    prefill_macs   multiply-adds per prompt token
    *_rate         tokens per second
    *_limit        "bandwidth" or "compute"
    """

    bandwidth: float | None = None  # bytes per second, sampled beside this run
    compute: float | None = None  # int8 multiply-adds per second
    decode_bytes: float | None = None
    prefill_macs: float | None = None
    decode_rate: float | None = None
    prefill_rate: float | None = None
    decode_limit: str | None = None
    prefill_limit: str | None = None


class Answer(Struct, forbid_unknown_fields=True):
    """What was seen of an answer's text (measure/answer.py); the text itself is not kept.

    asked        tokens that were to be generated
    characters   of the text; `printed` without white space at its ends
    garbage      replacement and control characters
    loop         characters at the end that repeat one piece
    repeated     share of stretches of 40 characters that came before
    """

    asked: Whole
    characters: Whole
    printed: Whole
    garbage: Whole
    loop: Whole
    repeated: float


class Run(Struct, forbid_unknown_fields=True):
    """One inference.

    side              "A", or "B" for the other engine of `bench --vs`
    cold              the first run after loading
    warmup            a run that was made only to warm up
    prompt_tokens     computed in prefill; `cached_tokens` more came from a cache
    prefill_seconds   to compute the prompt; None if an endpoint does not report it
    first_seconds     from the request to the first token
    decode_seconds    from the first to the last token: generated_tokens - 1 steps
    total_seconds     from the request to the end
    gaps              between consecutive tokens: generated_tokens - 1 values, to a microsecond
    clock             "engine", "server" (llama-server's timings) or "stream" (arrival here)
    output            SHA-256 of the generated text
    answer            figures of the text; None in older records and for failed runs
    error             one line; do not use the times of a failed run
    """

    index: Whole
    name: str
    started: str = ""
    side: str = "A"
    cold: bool = False
    warmup: bool = False
    prompt_tokens: Whole = 0
    cached_tokens: Whole = 0
    generated_tokens: Whole = 0
    prefill_seconds: float | None = None
    first_seconds: float | None = None
    decode_seconds: float | None = None
    total_seconds: float | None = None
    gaps: list[float] = []
    clock: str = "engine"
    stop_reason: str = ""
    output: str = ""
    answer: Answer | None = None
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
        """Prompt tokens per second; None if nothing was computed or the time is unknown."""
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


class ModelFile(Struct, forbid_unknown_fields=True):
    """A file of the model; `sha256` is of the whole file."""

    name: str
    nbytes: Whole
    sha256: str | None = None


class Part(Struct, forbid_unknown_fields=True):
    """A slice: `layers` of the layers of a preset, and `experts` of each layer's, None for all."""

    preset: str
    layers: Whole
    experts: Whole | None = None


class Target(Struct, forbid_unknown_fields=True):
    """What was measured: `kind` is "deskside" (in process) or "endpoint".

    random: the weights are random (`deskside synth`). part: what the file is of a whole model.
    """

    kind: str
    name: str  # the model, as people call it
    engine: str = ""  # "deskside 0.1.0, avx512" or what the server says of itself
    url: str | None = None
    options: dict[str, Any] = {}  # of the engine, as used
    files: list[ModelFile] = []
    architecture: str = ""
    weights_bytes: Whole | None = None
    types: dict[str, Whole] = {}  # bytes of weights by quant type
    plan: dict[str, Whole] = {}  # bytes: weights, kv, recurrent, buffers
    load_seconds: float | None = None
    n_ctx: Whole | None = None
    resident_bytes: Whole | None = None  # anonymous memory of the process after loading
    random: bool = False
    part: Part | None = None


class OpProfile(Struct, forbid_unknown_fields=True):
    """Wall time of one kind of step in decode or prefill, and what it must read and multiply."""

    name: str
    phase: str  # "decode" or "prefill"
    seconds: float  # a token
    nbytes: float | None = None  # a token
    macs: float | None = None  # a token


class Record(Struct, forbid_unknown_fields=True):
    """A measurement. `workload` is the complete workload (workload.py), so it can be replayed.

    commit, compiler: of the deskside that measured; "" if unknown.
    """

    workload: dict[str, Any]
    targets: dict[str, Target]  # by side
    machine: Host = field(default_factory=Host)
    runs: list[Run] = []
    profile: list[OpProfile] = []
    command: list[str] = []
    seed: int = 0
    created: str = ""
    deskside: str = ""
    commit: str = ""
    compiler: str = ""
    schema: Whole = SCHEMA

    def save(self, path: Path) -> None:
        """Write the record. An older file is replaced completely or not at all."""
        write_whole(path, json.dumps(msgspec.to_builtins(self), indent=1, allow_nan=False))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a record. DesksideError names the file and what is wrong with it."""
        data = schema.parse(path, ".json", "a record of deskside bench")
        if not isinstance(data, dict) or "schema" not in data:
            raise DesksideError(f"{path}: not a record of deskside bench")
        if data["schema"] != SCHEMA:
            raise DesksideError(
                f"{path}: schema {data['schema']!r:.40}; this deskside reads schema {SCHEMA}"
            )
        return schema.build(data, cls, str(path))
