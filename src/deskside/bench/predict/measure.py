"""Predicts the speed of a large model on this machine from slices of it, before its download.

A slice has random weights, true shapes and a few whole periods of layers. Decode and prefill of the
slices are measured in interleaved rounds. A line through the times (`extrapolate`) gives the time
at full depth. It holds for a machine with these cores, this bandwidth and enough memory. Each
figure stands beside its ceiling from bandwidth and arithmetic (`cost`).

If a period of layers does not fit, slices have fewer experts. Decode still reads as many experts
per token; only the router has fewer rows. The time of a layer is scaled by the missing bytes, or
for prefill by the missing multiply-adds. Two effects are not corrected:

- Experts lie closer together. So the TLB reaches more of them, and caches may keep some of them.
- In prefill, each expert gets more tokens, so its weights are read for more tokens. So prefill from
  fewer experts is too fast, above all for short prompts.
"""

from __future__ import annotations

import gc
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from deskside import _native
from deskside.bench.predict.choose import Choice, choose
from deskside.bench.predict.extrapolate import Estimate, extrapolate
from deskside.bench.predict.slices import Slice, cache_folder, full, period, write
from deskside.convert.synth import PRESETS
from deskside.engine import LLM
from deskside.engine.config import EngineConfig
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError
from deskside.files import write_whole
from deskside.machine import rates, watch
from deskside.machine.system import cpu_name, total_memory
from deskside.progress import Progress, silent
from deskside.tape.cache import kv_type
from deskside.tape.cost import Work, limit
from deskside.text.tokenizer import CONTROL, UNUSED

# Relative distance of a slice from the others' line that is worth a note.
MISFIT = 0.05


@dataclass(frozen=True)
class PredictOptions:
    """How to measure slices. DesksideError for a bad value.

    depths: tokens in the context when decoding begins, ascending. The first is also the length of
    the prompt that is timed as prefill.
    generate: tokens to decode per sample.
    repeats: rounds.
    The others are options of the engine.
    """

    depths: tuple[int, ...] = (512,)
    generate: int = 32
    repeats: int = 5
    threads: int = 0
    kv: str = "f16"
    ubatch: int = 512
    isa: str | None = None

    def __post_init__(self) -> None:
        kv_type(self.kv, "--kv")
        EngineConfig(threads=self.threads, ubatch=self.ubatch)
        try:
            _native.choose(self.isa or "")
        except ValueError as error:
            raise DesksideError(f"--isa {self.isa}: {error}") from None
        for flag, value, min_value in (
            ("--repeats", self.repeats, 2),
            ("--generate", self.generate, 2),
            ("--depths", min(self.depths, default=0), 1),
        ):
            if value < min_value:
                raise DesksideError(f"{flag} {value}: expected at least {min_value}")
        for a, b in zip(self.depths, self.depths[1:], strict=False):
            if b <= a + self.generate:
                raise DesksideError(
                    f"--depths {a},{b}: must ascend by more than the {self.generate} tokens that "
                    "are generated at each"
                )

    @property
    def ctx(self) -> int:
        """Tokens of context that the samples need."""
        return self.depths[-1] + self.generate + 2

    @property
    def kinds(self) -> tuple[str, ...]:
        """Names of the measured quantities."""
        decode = (f"decode at {d}" for d in self.depths)
        return (f"prefill of {self.depths[0]}", *decode)


@dataclass
class Measured:
    """A measured slice. `seconds`: by kind (a prompt, or a decoded token), one per round."""

    slice: Slice
    seconds: dict[str, list[float]] = field(default_factory=dict)

    def median(self, kind: str) -> float:
        return statistics.median(self.seconds[kind])


@dataclass(frozen=True)
class Figure:
    """The prediction for one kind of step at full depth. Rates are tokens per second.

    depth           tokens in the context; 0 for prefill
    tokens          tokens of one step, whose seconds are in `estimate`
    scale           work of a full layer over that of a slice's layer with fewer experts
    low, high       95 % interval of `rate`
    check_*         the same for the slice of --check
    measured        measured rate of the slice of --check
    error           check_rate / measured - 1
    """

    kind: str
    depth: int
    tokens: int
    estimate: Estimate
    scale: float
    rate: float
    low: float
    high: float
    ceiling: float | None
    check_rate: float | None = None
    check_low: float | None = None
    check_high: float | None = None
    measured: float | None = None
    error: float | None = None


@dataclass(frozen=True)
class Prediction:
    preset: str
    layers: int
    nbytes: int  # size of the whole model's file
    choice: Choice
    options: PredictOptions
    cpu: str
    threads: int
    isa: str
    bandwidth: float  # bytes per second, median of samples beside the rounds
    compute: float  # int8 multiply-adds per second
    slices: list[Measured]
    figures: list[Figure]
    notes: list[str]

    def ceiling(self, slice_: Slice, figure: Figure) -> float | None:
        """Most tokens per second that the machine allows a slice; None if unknown."""
        work = _work(slice_.work, self.options, figure.depth)
        found = limit(work, self.bandwidth, self.compute, prefill=not figure.depth)
        return found and found.rate

    def save(self, path: Path) -> None:
        write_whole(path, json.dumps(asdict(self), indent=1))


def predict(
    preset: str,
    layers: Sequence[int] | str = "auto",
    *,
    experts: int | None = None,
    check: int | None = None,
    options: PredictOptions | None = None,
    keep: bool = True,
    folder: Path | None = None,
    say: Callable[[str], None] = lambda text: None,
    progress: Progress = silent,
) -> Prediction:
    """Write the slices that are missing, measure all, and extrapolate.

    layers: of the slices, or "auto". experts: fewer experts per layer.
    check: layers of one more slice, which is predicted and measured but not part of the fit.
    keep: keep new slices in the cache folder. say: called with sizes before anything is written.
    DesksideError if memory or disk do not suffice, and for values that make no slice.
    """
    options = options or PredictOptions()
    folder = folder or cache_folder()
    full(preset)  # raises if the preset is not known
    max_ctx = PRESETS[preset]["max_position_embeddings"]
    if options.ctx > max_ctx:
        raise DesksideError(f"--depths {options.depths[-1]}: {preset} has a context of {max_ctx}")
    choice = choose(preset, layers, experts=experts, check=check, folder=folder)
    missing = [s for s in choice.every if not s.file(folder).exists()]
    for s in choice.every:
        what = "to be written" if s in missing else "in the cache"
        say(f"{s.name}: {s.nbytes / 1e9:.2f} GB, {what}")
    say(choice.order)
    for line in EngineConfig(threads=options.threads).notes:
        say(line)
    try:
        for s in missing:
            write(s, folder, progress)
        runner = _Runner(choice, options, folder, progress)
        runner.run()
    finally:
        if not keep:
            for s in missing:
                s.file(folder).unlink(missing_ok=True)
    return _result(preset, choice, options, runner)


class _Runner:
    """Measures the slices, group by group.

    Several groups run forwards, then backwards, so that a drift of the machine hits all alike.
    """

    def __init__(
        self, choice: Choice, options: PredictOptions, folder: Path, progress: Progress
    ) -> None:
        self.choice = choice
        self.options = options
        self.folder = folder
        self.measured = [Measured(s, {k: [] for k in options.kinds}) for s in choice.every]
        self.bandwidth: list[float] = []
        self.compute: list[float] = []
        self.threads = 0
        self.isa = ""
        self._progress = progress
        self._done = 0
        self._loaded: dict[int, LLM] = {}

    def run(self) -> None:
        groups, n = self.choice.groups, self.options.repeats
        if len(groups) == 1:
            passes = [(groups[0], range(n))]
        else:
            half = -(-n // 2)
            forwards = [(g, range(half)) for g in groups]
            passes = forwards + [(g, range(half, n)) for g in reversed(groups)]
        for group, rounds in passes:
            self._load(group)
            for r in rounds:
                self._limits()
                turn = r % len(group)
                for i in (*group[turn:], *group[:turn]):
                    self._sample(i, r)
        self._loaded.clear()
        gc.collect()

    def _load(self, group: Sequence[int]) -> None:
        if set(self._loaded) == set(group):
            return
        self._loaded.clear()
        gc.collect()  # a model and its last stream reference each other
        o = self.options
        for i in group:
            llm = LLM(
                self.choice.every[i].file(self.folder),
                progress=self._progress,
                ctx=o.ctx,
                threads=o.threads,
                ubatch=o.ubatch,
                ctk=o.kv,
                ctv=o.kv,
                isa=o.isa,
            )
            self._loaded[i] = llm
            self.threads = llm.config.n_threads
            self.isa = str(getattr(llm.backend, "isa", ""))
            _times(llm, o, np.random.default_rng(0))  # warms up pages, caches, clocks

    def _limits(self) -> None:
        self.bandwidth.append(rates.bandwidth(self.threads))
        self.compute.append(rates.compute(self.threads, self.isa))

    def _sample(self, i: int, r: int) -> None:
        rng = np.random.default_rng([1, r])  # the same prompts for all slices
        for kind, seconds in _times(self._loaded[i], self.options, rng).items():
            self.measured[i].seconds[kind].append(seconds)
        self._done += 1
        self._progress(
            f"measuring {self.choice.every[i].layers} layers",
            self._done,
            self.options.repeats * len(self.measured),
        )


def _times(llm: LLM, options: PredictOptions, rng: np.random.Generator) -> dict[str, float]:
    """Seconds by kind: of the first prompt, and of a decoded token at each depth."""
    types = llm.tokenizer.types
    normal = np.flatnonzero((types != UNUSED) & (types != CONTROL))
    # Random weights soon repeat one token, and a repeated token finds its experts in the cache: no
    # token is taken twice.
    params = SamplingParams(
        max_tokens=options.generate,
        temperature=0,
        presence_penalty=1e6,
        repeat_last_n=-1,
        ignore_eos=True,
    )
    llm.reset()
    ids: list[int] = []
    found: dict[str, float] = {}
    prefill, *decode = options.kinds
    for kind, depth in zip(decode, options.depths, strict=True):
        ids += rng.choice(normal, depth - len(ids)).tolist()
        stream = llm.stream(ids, params)
        for _ in stream:
            pass
        t = stream.timings
        if t.generated_tokens != options.generate:
            raise DesksideError(f"{llm.file.path}: stopped after {t.generated_tokens} tokens")
        found.setdefault(prefill, t.prompt_seconds)
        found[kind] = t.decode_seconds / (options.generate - 1)
        ids += stream.tokens[:-1]
    return found


def _result(preset: str, choice: Choice, options: PredictOptions, runner: _Runner) -> Prediction:
    whole = full(preset)
    bandwidth = statistics.median(runner.bandwidth)
    compute = statistics.median(runner.compute)
    n = len(choice.slices)
    figures = []
    for kind, depth in zip(options.kinds, (0, *options.depths), strict=True):
        tokens = 1 if depth else options.depths[0]
        work = _work(whole.work, options, depth)
        scale = _scale(choice.slices[0], options, depth)
        samples = [m.seconds[kind] for m in runner.measured[:n]]
        layers = [s.layers for s in choice.slices]
        ceiling = limit(work, bandwidth, compute, prefill=not depth)
        estimate = extrapolate(layers, samples, whole.layers * scale, paired=choice.together)
        figure = Figure(
            kind,
            depth,
            tokens,
            estimate,
            scale,
            rate=tokens / estimate.seconds,
            low=tokens / estimate.high,
            high=tokens / estimate.low,
            ceiling=ceiling and ceiling.rate,
        )
        figures.append(_checked(figure, choice, runner, samples) if choice.check else figure)
    return Prediction(
        preset,
        whole.layers,
        whole.nbytes,
        choice,
        options,
        cpu_name(),
        runner.threads,
        runner.isa,
        bandwidth,
        compute,
        runner.measured,
        figures,
        _notes(whole, choice, figures),
    )


def _work(work: Work, options: PredictOptions, depth: int) -> dict[str, float]:
    """Bytes and multiply-adds per token at a depth; depth 0 means prefill."""
    if not depth:
        return work.prefill(options.depths[0], options.ubatch)
    return work.decode(depth + options.generate // 2, options.kv)


def _scale(cut: Slice, options: PredictOptions, depth: int) -> float:
    """Work of a full layer over that of a slice's layer: bytes, or for prefill multiply-adds."""
    if cut.experts is None:
        return 1.0
    key = "bytes" if depth else "macs"
    step = period(cut.preset)

    def layer(experts: int | None) -> float:
        one, two = (Slice(cut.preset, n * step, experts).work for n in (1, 2))
        return _work(two, options, depth)[key] - _work(one, options, depth)[key]

    return layer(None) / layer(cut.experts)


def _checked(
    figure: Figure, choice: Choice, runner: _Runner, samples: Sequence[Sequence[float]]
) -> Figure:
    assert choice.check is not None
    layers = [s.layers for s in choice.slices]
    e = extrapolate(layers, samples, choice.check.layers, paired=choice.together)
    measured = figure.tokens / runner.measured[-1].median(figure.kind)
    rate = figure.tokens / e.seconds
    return replace(
        figure,
        check_rate=rate,
        check_low=figure.tokens / e.high,
        check_high=figure.tokens / e.low,
        measured=measured,
        error=rate / measured - 1,
    )


def _notes(whole: Slice, choice: Choice, figures: Sequence[Figure]) -> list[str]:
    """Notes that the reader of the figures needs."""
    notes = []
    if whole.weights + watch.WORK_BYTES > total_memory():
        notes.append(
            f"the whole model takes {whole.weights / 1e9:.0f} GB of memory, this machine has "
            f"{total_memory() / 1e9:.0f} GB: the figures are for one with these cores, this "
            "bandwidth and enough memory"
        )
    if len(choice.slices) == 2:
        notes.append(
            "two slices: the interval covers only the scatter between rounds, because two slices "
            "cannot show whether time grows linearly"
        )
    if choice.slices[0].experts is not None:
        notes.append(
            f"{choice.slices[0].experts} experts a layer: decode reads as many per token, but from "
            "less memory; each gets more tokens of a prompt, so the prefill rate is an upper bound"
        )
    for f in figures:
        if f.estimate.layer <= 0:
            notes.append(f"{f.kind}: deeper slices took no longer; their times scatter too much")
        elif f.estimate.head < 0:
            notes.append(f"{f.kind}: the head's time is below 0, less than the layers' scatter")
        if f.estimate.misfit is not None and f.estimate.misfit > MISFIT:
            notes.append(
                f"{f.kind}: a slice lies {100 * f.estimate.misfit:.0f} % off the line through the "
                "others; repeat it on a quieter machine"
            )
    return notes
