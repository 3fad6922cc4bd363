"""Runs every item of a workload on every target, by turns, and saves the record after each run."""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

import deskside
from deskside import __version__, _native
from deskside.bench.measure.ceiling import Limits
from deskside.bench.measure.targets import TargetRunner
from deskside.bench.measure.text import Corpus, Token, exactly, fresh, part, text_of_part, tokens_of
from deskside.bench.record import Record, Run, Target
from deskside.bench.workload import Item, Workload, fit_context
from deskside.errors import DesksideError
from deskside.machine import environment, watch
from deskside.machine.watch import Host
from deskside.progress import Progress, silent

PACKAGE = Path(deskside.__file__).parent
SAMPLE = 4000  # characters that a target sees before the first run
MAX_FAILURES = 3  # failed runs in a row that end the measurement
# Seconds between two updates of the progress bar, because drawing slows a decoding thread.
BETWEEN = 1.0
# Prompt tokens that take as long as one generated token, until a run has measured it.
USUAL_RATIO = 12.0


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """A run to make.

    index: place in the plan; both sides of a pair have the same one.
    key: decides the text of the prompt.
    part: which part of the tree to read, for an item that reads all of it.
    before: the run whose prompt and answer this one continues.
    """

    index: int
    side: str
    item: Item
    key: str
    warmup: bool = False
    part: int | None = None
    before: PlannedRun | None = None

    @property
    def name(self) -> str:
        return self.item.name if self.part is None else f"{self.item.name} {self.part + 1}"


def plan(workload: Workload, sides: Sequence[str], seed: str, parts: int = 0) -> list[PlannedRun]:
    """The runs in their order. parts: number of prompts that read the tree.

    Two sides take turns. The side that runs first changes with every pair and every round.
    """
    listed: list[tuple[Item, int | None]] = []
    for item in workload.items:
        listed += [(item, number) for number in (range(parts) if item.tree else [None])]
    entries = [(listed[0], True, i) for i in range(workload.warmup)]
    for r in range(workload.repeats):
        entries += [(entry, False, r + place) for place, entry in enumerate(listed)]
    runs: list[PlannedRun] = []
    last: dict[str, PlannedRun] = {}
    for index, ((item, number), warmup, turn) in enumerate(entries):
        swapped = turn % 2 == 1
        for side in reversed(sides) if swapped else sides:
            before = last[side] if item.continues else None
            key = f"{seed} {index}"
            last[side] = PlannedRun(index, side, item, key, warmup, number, before)
            runs.append(last[side])
    return runs


def characterise(
    workload: Workload,
    targets: Mapping[str, TargetRunner],
    out: Path,
    *,
    seed: int = 0,
    resume: Record | None = None,
    command: Sequence[str] = (),
    progress: Progress = silent,
) -> Record:
    """Run a workload on the targets, by side. Saves the record in `out` after every run.

    resume: a record of the same workload and targets; only missing and failed runs are made.
    DesksideError before the first run, if an item is too long for a target or the record to resume
    does not match. DesksideError later, if runs cannot continue, as when an endpoint is gone.
    KeyboardInterrupt loses only the current run.
    """
    shortest = min(targets.values(), key=lambda t: t.n_ctx or float("inf"))
    fitted, skipped = fit_context(workload, shortest.n_ctx, shortest.limit)
    corpus = Corpus.of(fitted.text)
    for target in targets.values():
        target.learn(corpus.sample(SAMPLE, str(seed)))
    described = {side: target.describe() for side, target in targets.items()}
    run_as = {**fitted.to_dict(), "skipped": skipped, "text_digest": corpus.digest()}
    if resume is None:
        record = Record(
            workload=run_as,
            targets=described,
            machine=_machine(targets),
            command=list(command),
            seed=seed,
            created=_now(),
            deskside=__version__,
            commit=environment.commit(PACKAGE) or "",
            compiler=str(getattr(_native, "compiler", "")),
        )
    else:
        record = resume
        _expect_same(record, run_as, described, seed, out)
        record.workload = run_as
    session = _Session(fitted, targets, corpus, record, out, progress)
    session.save()
    session.go()
    return record


class _Session:
    """One session of runs: the state of the targets, and the record so far."""

    def __init__(
        self,
        workload: Workload,
        targets: Mapping[str, TargetRunner],
        corpus: Corpus,
        record: Record,
        out: Path,
        progress: Progress,
    ) -> None:
        self.workload, self.targets, self.corpus = workload, targets, corpus
        self.record, self.out = record, out
        self.roofs = {side: target.roof() for side, target in targets.items()}
        self.limits = {
            side: Limits(roof.threads, roof.isa) for side, roof in self.roofs.items() if roof
        }
        # A cache that cannot be switched off may hold prompts of another session.
        self.salt = record.created if any(t.caches for t in targets.values()) else ""
        self.trees: dict[str, list[Token]] = {}
        runs = plan(workload, list(targets), f"{record.seed}{self.salt}", self._parts())
        done = {(run.index, run.side) for run in record.runs if run.ok}
        self.runs = [planned for planned in runs if (planned.index, planned.side) not in done]
        self.said: dict[PlannedRun, list[Token]] = {}  # prompt and answer of each side's last run
        self.bar = _Bar(progress, runs, self.runs)
        self.failures = 0

    def _parts(self) -> int:
        """Prompts that read the tree, on the side with the most tokens; 0 if no item reads it."""
        items = [item for item in self.workload.items if item.tree]
        if not items:
            return 0
        for side, target in self.targets.items():
            self.trees[side] = tokens_of(self.corpus, target.encode)
        max_tokens = max(len(tokens) for tokens in self.trees.values()) * self.workload.scale
        return max(1, -int(-max_tokens // text_of_part(items[0].prompt)))

    def go(self) -> None:
        for planned in self.runs:
            self.bar.begin(planned)
            run = self._run(planned)
            run.index, run.name, run.side, run.warmup = (
                planned.index,
                planned.name,
                planned.side,
                planned.warmup,
            )
            place = (run.index, run.side)
            self.record.runs = [r for r in self.record.runs if (r.index, r.side) != place]
            self.record.runs.append(run)
            self.save()
            self.bar.end(planned, run)
            if run.error is not None:
                self._stop_if_hopeless(planned, run.error)
            else:
                self.failures = 0

    def _run(self, planned: PlannedRun) -> Run:
        """Make one run and record it. A failure is recorded as a run, too."""
        target = self.targets[planned.side]
        limits = self.limits.get(planned.side)
        if limits is not None:
            limits.refresh()
        started = _now()
        seen = watch.Watch(own=target.own, local=target.local)
        try:
            prompt = self._prompt(planned)
            with seen:
                run = self._generate(planned, prompt)
        except DesksideError as failure:
            run = Run(index=planned.index, name=planned.name, error=str(failure))
        run.started, run.load = started, seen.load
        run.gaps = [round(gap, 6) for gap in run.gaps]  # clocks are no finer; keeps files small
        roof = self.roofs[planned.side]
        if run.ok and roof is not None and limits is not None:
            run.ceiling = roof.over(run, limits.bandwidth, limits.compute)
        return run

    def _generate(self, planned: PlannedRun, prompt: list[Token]) -> Run:
        params = self.workload.params(planned.item.generate, self.record.seed + planned.index)
        run, answer = self.targets[planned.side].run(
            prompt,
            params,
            reuse=planned.item.continues,
            thinks=planned.item.thinking > 0,
            on_token=self.bar.token,
        )
        self.said = {s: tokens for s, tokens in self.said.items() if s.side != planned.side}
        self.said[planned] = prompt + answer[planned.item.thinking :]
        return run

    def _prompt(self, planned: PlannedRun) -> list[Token]:
        encode, item = self.targets[planned.side].encode, planned.item
        if planned.part is not None:
            return part(item.prompt, planned.part, planned.key, self.trees[planned.side], encode)
        if planned.before is None:
            return fresh(item.prompt, planned.key, self.corpus, encode)
        said = self._said(planned.before)
        return said + exactly(item.prompt, self.corpus.shuffled(planned.key), encode)

    def _said(self, planned: PlannedRun) -> list[Token]:
        """Prompt and answer of the run that `planned` continues.

        In a resumed record, that run may be from an earlier session. Then it runs again, without a
        record, to restore the conversation and the cache.
        """
        if planned not in self.said:
            if planned in self.runs:
                raise DesksideError(f"{planned.name}, which it continues, failed")
            self._generate(planned, self._prompt(planned))
        return self.said[planned]

    def _stop_if_hopeless(self, planned: PlannedRun, error: str) -> None:
        hint = kept(self.out)
        try:
            self.targets[planned.side].check()
        except DesksideError:
            raise DesksideError(f"{planned.name}: {error}; {hint}") from None
        if planned.before is not None and planned.before not in self.said:
            return  # the run was not tried
        self.failures += 1
        if self.failures == MAX_FAILURES:
            raise DesksideError(
                f"{MAX_FAILURES} runs in a row failed, the last one, {planned.name}: {error}; "
                f"{hint}"
            )

    def save(self) -> None:
        try:
            self.record.save(self.out)
        except OSError as failure:
            reason = failure.strerror or str(failure)
            raise DesksideError(
                f"{self.out}: cannot be written: {reason}; {kept(self.out)}"
            ) from None


def kept(out: Path) -> str:
    """A message that says how many runs are saved and how to continue."""
    try:
        runs = Record.load(out).runs
    except (OSError, DesksideError):
        runs = []
    n = sum(run.ok for run in runs)
    count = f"{n} run{'s are' if n != 1 else ' is'} in {out}"
    return f"{count}; deskside bench --resume {out} continues" if n else "nothing was measured yet"


class _Bar:
    """Progress in units of one prompt token, so that the bar can show the time left."""

    def __init__(
        self, progress: Progress, runs: Sequence[PlannedRun], left: Sequence[PlannedRun]
    ) -> None:
        self._progress = progress
        self._all = runs
        self._left = list(left)
        self._ratio = USUAL_RATIO
        self._known = False
        self._label = ""
        self._tokens = 0
        self._shown = 0.0

    def begin(self, planned: PlannedRun) -> None:
        side = f" {planned.side}" if len({s.side for s in self._all}) > 1 else ""
        n = len(self._all) - len(self._left) + 1
        self._label = f"{n}/{len(self._all)} {planned.name}{side}"
        self._tokens = 0
        self._show()

    def token(self) -> None:
        self._tokens += 1
        if time.monotonic() - self._shown > BETWEEN:
            self._show()

    def end(self, planned: PlannedRun, run: Run) -> None:
        self._left.remove(planned)
        if run.prefill_rate and run.decode_rate and not self._known:
            self._ratio, self._known = run.prefill_rate / run.decode_rate, True
        self._tokens = 0
        self._show()

    def _show(self) -> None:
        self._shown = time.monotonic()
        total = sum(map(self._cost, self._all))
        done = total - sum(map(self._cost, self._left))
        if self._tokens:
            done += self._left[0].item.prompt + self._ratio * self._tokens
        self._progress(self._label, round(done), round(total))

    def _cost(self, planned: PlannedRun) -> float:
        return planned.item.prompt + self._ratio * planned.item.generate


def _machine(targets: Mapping[str, TargetRunner]) -> Host:
    """Facts about this machine if a target runs on it, else no facts."""
    return watch.describe() if any(t.local for t in targets.values()) else Host()


def _expect_same(
    record: Record, workload: Mapping[str, Any], targets: Mapping[str, Target], seed: int, out: Path
) -> None:
    """DesksideError names what changed since the record was begun."""

    def check(what: str, was: Any, now: Any) -> None:
        if was != now:
            raise DesksideError(
                f"{out}: was measured with {what} {was!r:.80}, now it is {now!r:.80}; "
                "begin a new record instead (--out)"
            )

    check("seed", record.seed, seed)
    keys = record.workload.keys() | workload.keys()
    for key in sorted(keys - {"skipped", "items"}):
        check(f"workload.{key}", record.workload.get(key), workload.get(key))
    items = record.workload.get("items")
    recorded = [_complete(item) for item in items] if isinstance(items, list) else []
    both = itertools.zip_longest(recorded, workload["items"])
    for i, (was, now) in enumerate(both):
        check(f"workload.items[{i}]", was, now)
    check("sides", sorted(record.targets), sorted(targets))
    for side, target in targets.items():
        old, new = map(msgspec.structs.asdict, (record.targets[side], target))
        for key in ("kind", "name", "engine", "url", "n_ctx"):
            check(key, old[key], new[key])
        for name in sorted(old["options"].keys() | new["options"].keys()):
            check(f"option {name}", old["options"].get(name), new["options"].get(name))
        check_files(record.targets[side], target, str(out))


def _complete(item: Any) -> Any:
    """An item of a record with the defaults of fields that came after it."""
    try:
        return msgspec.to_builtins(msgspec.convert(item, Item))
    except msgspec.ValidationError:
        return item


def check_files(old: Target, new: Target, source: str) -> None:
    """DesksideError if the model files changed. Compares hashes if both are known."""
    for was, now in zip(old.files, new.files, strict=False):
        hashes = (was.sha256, now.sha256)
        if was.nbytes != now.nbytes or (all(hashes) and len(set(hashes)) > 1):
            raise DesksideError(f"{source}: {now.name} is not the file that was measured")
    if len(old.files) != len(new.files):
        raise DesksideError(f"{source}: the model had {len(old.files)} files, now {len(new.files)}")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
