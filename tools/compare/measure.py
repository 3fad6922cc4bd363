"""Runs the tests of one file in paired rounds. Every engine has its own process.

If memory holds all engines, they stay loaded, and sleep while another one is timed. The order
rotates by one each round. Otherwise engines are loaded, measured and ended one by one. A shared
machine drifts, so only the ratio within a round counts.
"""

from __future__ import annotations

import time
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deskside.gguf import GGUF
from deskside.machine import rates, watch
from deskside.machine.system import available_memory
from tests.oracles.remote import Remote, RemoteError
from tools.compare import machine, record
from tools.compare.plan import OURS, PROMPT, WARM_STEPS, Context, Engine, Stage, Test

NORMAL_TOKEN = 1  # tokenizer.ggml.token_type
SEED = 0

Say = Callable[[str], None]


@dataclass
class Run:
    """The measurements of one file. python: the peers' interpreter. libraries: their own builds."""

    file: GGUF
    entry: dict[str, Any]
    stages: Sequence[Stage]
    engines: Sequence[Engine]
    threads: int
    isa: str  # of deskside; "" for the fastest
    python: Path | None
    libraries: dict[str, Path]
    save: Callable[[], None]
    say: Say

    def __post_init__(self) -> None:
        kinds = self.file.metadata["tokenizer.ggml.token_type"]
        self._tokens = np.flatnonzero(np.asarray(kinds) == NORMAL_TOKEN)
        self.rounds = int(self.entry["rounds"])

    def ids(self, what: str, r: int, *shape: int) -> Any:
        """Random normal tokens, the same for all engines; new ones for every test and round."""
        rng = np.random.default_rng([SEED, r + 1, zlib.crc32(what.encode())])
        return rng.choice(self._tokens, shape).tolist()

    # engines

    def start(self, engine: Engine, r: int) -> Remote | None:
        """A worker with the loaded model; None, and a reason in the record, if it cannot load."""
        options: dict[str, Any] = {"threads": self.threads, **engine.options}
        if engine.peer == OURS:
            # room for any test's context, but no more than the model's own
            options["isa"] = self.isa or None
            options["n_ctx"] = max(c.n_ctx // c.n_seq for s in self.stages for c in s.contexts)
            options["ubatch"] = max(u for s in self.stages for c in s.contexts for u in c.ubatches)
            where: dict[str, Any] = {}
        else:
            where = {"python": self.python}
            if engine.peer in self.libraries:
                library = self.libraries[engine.peer]
                options["library"] = str(library)
                where["environment"] = {"LD_LIBRARY_PATH": str(library.parent)}
        try:
            worker = Remote(
                engine.source, engine.class_name, str(self.file.path), **options, **where
            )
            seconds = worker.loaded()
        except RemoteError as error:
            tests = [t.name for s in self.stages for t in s.tests]
            record.leave_out(self.entry, engine.name, tests, _reason(error))
            self.say(f"{engine.name} is left out: {_reason(error)}")
            return None
        self.entry["load"].setdefault(engine.name, {})[str(r)] = seconds
        self.entry["rss"][engine.name] = watch.rss(worker.pid)
        self.entry["systems"][engine.name] = worker.info()["system"]
        self.say(f"{engine.name}: loaded in {seconds:.1f} s")
        return worker

    def open(self, engine: Engine, worker: Remote, stage: Stage) -> bool:
        """Open and warm up the contexts of a stage. Returns False if the engine cannot."""
        try:
            worker.drop()
            for context in stage.contexts:
                ubatch = self._ubatch(engine, worker, context)
                worker.open(context.name, context.n_ctx, context.kv, ubatch, context.n_seq)
                self._warm(worker, context)
        except RemoteError as error:
            self._failed(engine, stage, error)
            return False
        return True

    def _ubatch(self, engine: Engine, worker: Remote, context: Context) -> int:
        """The fastest physical batch size for this engine. It is measured once and recorded."""
        if len(context.ubatches) == 1:
            return context.ubatches[0]
        known = self.entry["ubatch"].setdefault(engine.name, {})
        if context.name not in known:
            rates = {}
            for ubatch in context.ubatches:
                worker.open(context.name, context.n_ctx, context.kv, ubatch, context.n_seq)
                worker.prefill(self.ids("warm", -1, 64))
                ids = self.ids("ubatch", -1, context.n_ctx)
                rates[str(ubatch)] = len(ids) / worker.prefill(ids)
                worker.drop()
            taken = int(max(rates, key=lambda u: rates[u]))
            known[context.name] = {"taken": taken, "tok/s": rates}
        return int(known[context.name]["taken"])

    def _warm(self, worker: Remote, context: Context) -> None:
        if context.n_seq > 1:
            worker.begin(self.ids("warm", -1, context.n_seq, PROMPT))
            worker.step_all(self.ids("steps", -1, WARM_STEPS, context.n_seq))
        else:
            worker.prefill(self.ids("warm", -1, context.depth or 64))
            worker.decode(self.ids("steps", -1, WARM_STEPS))

    def _failed(self, engine: Engine, stage: Stage, error: RemoteError) -> None:
        tests = [t.name for t in stage.tests]
        record.leave_out(self.entry, engine.name, tests, _reason(error))
        self.say(f"{engine.name} cannot run {', '.join(tests)}: {_reason(error)}")

    # figures

    def time(self, engine: Engine, worker: Remote, stage: Stage, test: Test, r: int) -> None:
        """Take one sample of one test."""
        context = stage.context(test)
        worker.use(context.name)
        if test.kind == "prefill":
            seconds = worker.prefill(self.ids(test.name, r, test.tokens))
        elif test.kind == "batch":
            seconds = worker.step_all(self.ids(test.name, r, test.tokens, context.n_seq))
        else:
            if not context.depth:
                worker.prefill(self.ids("prompt", r, PROMPT))
            seconds = worker.decode(self.ids(test.name, r, test.tokens))
            if engine.peer == OURS:
                self.entry["python"].setdefault(test.name, {})[str(r)] = worker.python_share()
        rate = test.tokens * context.n_seq / seconds
        record.add(self.entry, test.name, engine.name, r, rate)
        self.say(f"round {r + 1}, {test.name}, {engine.name}: {rate:.1f} tok/s")

    def limits(self) -> None:
        """Sample the machine's limits."""
        self.entry["bandwidth"].append(rates.bandwidth(self.threads))
        self.entry["compute"].append(rates.compute(self.threads, self.isa))

    def copy(self) -> None:
        """Time copying the file into memory, or a part of it if memory is short."""
        if self.entry["copy"]:
            return
        paths = [str(p) for p in self.file.paths]
        limit = int(available_memory() * 0.4)
        source = Path(machine.__file__)
        with Remote(source, "Copier", paths, limit) as copier:
            copier.seconds(self.threads)  # warms up the page cache
            seconds = {
                str(n): [copier.seconds(n) for _ in range(2)] for n in sorted({1, self.threads})
            }
            self.entry["copy"] = {"bytes": copier.copied(), "seconds": seconds}
        self.save()

    # order

    def all_loaded(self) -> None:
        """Run all engines at once, stage by stage."""
        if not any(self._pending(s, e) for s in self.stages for e in self.engines):
            return
        with ExitStack() as stack:
            workers: dict[str, Remote] = {}

            def begin(engine: Engine) -> None:
                worker = self.start(engine, 0)
                if worker is not None:
                    workers[engine.name] = worker
                    stack.callback(worker.close, 1)

            for engine in self.engines:
                begin(engine)
            self.save()
            for stage in self.stages:
                ready = []
                for engine in self.engines:
                    worker = workers.get(engine.name)
                    if not self._pending(stage, engine):
                        continue
                    if worker is not None and not worker.alive:
                        del workers[engine.name]
                        begin(engine)
                    if engine.name in workers and self.open(engine, workers[engine.name], stage):
                        ready.append(engine)
                self._rounds(stage, ready, workers)
                for worker in workers.values():
                    if worker.alive:
                        worker.drop()

    def _rounds(self, stage: Stage, engines: Sequence[Engine], workers: dict[str, Remote]) -> None:
        for r in range(self.rounds):
            for test in stage.tests:
                lacking = record.missing(self.entry, [e.name for e in engines], [test.name], r)
                if not lacking:
                    continue
                self.limits()
                for engine in turned(engines, r):
                    if engine.name in lacking and workers[engine.name].alive:
                        self._watched(engine, workers, stage, test, r)
            self.save()

    def _watched(
        self, engine: Engine, workers: dict[str, Remote], stage: Stage, test: Test, r: int
    ) -> None:
        """Take a sample, and record the share of a core that the sleeping engines used."""
        waiting = {
            name: machine.cpu_seconds(w.pid)
            for name, w in workers.items()
            if name != engine.name and w.alive
        }
        begun = time.perf_counter()
        try:
            self.time(engine, workers[engine.name], stage, test, r)
        except RemoteError as error:
            self._failed(engine, stage, error)
            return
        elapsed = time.perf_counter() - begun
        idle = self.entry["idle"]
        for name, before in waiting.items():
            used = (machine.cpu_seconds(workers[name].pid) - before) / elapsed
            # CPU time has steps of 10 ms, so short tests show nothing.
            if elapsed > 1:
                idle[name] = max(idle.get(name, 0.0), used)

    def one_at_a_time(self) -> None:
        """Run engines one by one. Each is loaded for all stages of a round."""
        for r in range(self.rounds):
            for engine in turned(self.engines, r):
                pending = [s for s in self.stages if self._pending(s, engine, r)]
                if not pending:
                    continue
                self.limits()
                worker = self.start(engine, r)
                if worker is None:
                    continue
                try:
                    for stage in pending:
                        if not worker.alive or not self.open(engine, worker, stage):
                            continue
                        for test in stage.tests:
                            self.time(engine, worker, stage, test, r)
                except RemoteError as error:
                    self._failed(engine, stage, error)
                finally:
                    worker.close(1)
                self.save()

    def _pending(self, stage: Stage, engine: Engine, r: int | None = None) -> bool:
        tests = [t.name for t in stage.tests]
        rounds = range(self.rounds) if r is None else (r,)
        return any(record.missing(self.entry, [engine.name], tests, i) for i in rounds)


def turned(engines: Sequence[Engine], r: int) -> list[Engine]:
    """The order of engines in round r."""
    n = r % len(engines) if engines else 0
    return [*engines[n:], *engines[:n]]


def _reason(error: RemoteError) -> str:
    """One line of an error: a failed assertion if there is one, else the first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    failed = [line for line in lines if "GGML_ASSERT" in line]
    return "; ".join([lines[0], *failed[:1]])
