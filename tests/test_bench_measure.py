"""The loop in this process: clocks, order, resume, replay, what is kept when things go wrong."""

from __future__ import annotations

import dataclasses
import errno
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from deskside.bench import command
from deskside.bench.measure import loop as measure
from deskside.bench.measure.loop import characterise, plan
from deskside.bench.measure.profile import profile
from deskside.bench.measure.targets import InProcess, context_room, load
from deskside.bench.record import Record, Run
from deskside.bench.request import Request
from deskside.bench.workload import Item, Workload
from deskside.engine.config import EngineConfig, demo_model
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine import rates, watch
from deskside.models import build_tape
from deskside.tape.cost import Work
from tests.commands import COMMAND, inside, refused
from tests.models import tiny

SMALL = Workload(
    "small",
    (
        Item("one", 40, 6),
        Item("two", 90, 4),
        Item("talk", 30, 5),
        Item("talk on", 20, 5, continues=True),
        Item("talk more", 25, 3, continues=True),
    ),
)
BANDWIDTH, COMPUTE = 1e9, 1e12


@pytest.fixture(autouse=True)
def quick_limits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measuring takes a second and a gigabyte."""
    monkeypatch.setattr(rates, "bandwidth", lambda threads: BANDWIDTH)
    monkeypatch.setattr(rates, "compute", lambda threads, isa="": COMPUTE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def target() -> InProcess:
    return InProcess(tiny(), sha=False, ctx=256, threads=1)


def key(run: Run) -> tuple[int, str, str, int, int, int, str]:
    return (
        *(run.index, run.side, run.name, run.prompt_tokens, run.cached_tokens),
        *(run.generated_tokens, run.output),
    )


def test_every_clock_is_filled_and_they_agree(target: InProcess, tmp_path: Path) -> None:
    record = characterise(SMALL, {"A": target}, tmp_path / "r.json", seed=3)
    assert Record.load(tmp_path / "r.json") == record
    assert [r.name for r in record.runs] == [i.name for i in SMALL.items]
    for run, item in zip(record.runs, SMALL.items, strict=True):
        assert run.ok and run.clock == "engine" and run.stop_reason == "length"
        assert run.generated_tokens == item.generate and len(run.gaps) == item.generate - 1
        assert run.decode_seconds is not None and run.prefill_seconds is not None
        assert run.first_seconds is not None and run.total_seconds is not None
        rounding = 5e-7 * len(run.gaps)
        assert sum(run.gaps) == pytest.approx(run.decode_seconds, abs=rounding + 1e-9)
        assert min(run.gaps) > 0 and all(gap == round(gap, 6) for gap in run.gaps)
        assert 0 < run.prefill_seconds <= run.first_seconds < run.total_seconds
        assert run.first_seconds + run.decode_seconds <= run.total_seconds
        assert len(run.output) == 64 and run.started.endswith("+00:00")
        assert run.answer is not None and run.answer.asked == item.generate
        assert run.answer.characters > 0
    one, two, talk, on, more = record.runs
    assert (one.prompt_tokens, one.cached_tokens) == (40, 0) and one.depth == 40
    assert (two.prompt_tokens, two.cached_tokens) == (90, 0)
    # a turn computes its new text, and the last token of the answer before
    assert (on.prompt_tokens, on.cached_tokens) == (21, talk.depth + 4)
    assert (more.prompt_tokens, more.cached_tokens) == (26, on.depth + 4)
    assert record.targets["A"].plan["kv"] > 0 and record.machine.cores > 0
    assert record.targets["A"].random and record.machine.container


def test_only_the_first_run_after_loading_is_cold(tmp_path: Path) -> None:
    fresh = InProcess(tiny(), sha=False, ctx=256, threads=1)
    w = structs.replace(SMALL, warmup=2)
    runs = characterise(w, {"A": fresh}, tmp_path / "r.json").runs
    assert [r.cold for r in runs] == [True] + [False] * 6
    assert [r.warmup for r in runs] == [True, True] + [False] * 5
    assert [r.index for r in runs] == list(range(7)) and runs[0].name == "one"
    # the same item, other text
    assert len({r.output for r in runs[:3]}) == 3


@pytest.mark.parametrize("preset", ["tiny-moe", "tiny-llama"])
def test_a_cache_answers_only_where_it_may(preset: str) -> None:
    fresh = InProcess(tiny(preset), sha=False, ctx=256, threads=1)
    prompt = fresh.encode("The same words again and again and again.", True)
    params = SMALL.params(3, seed=1)

    def run(prompt: list[Any], reuse: bool) -> tuple[Run, list[Any]]:
        return fresh.run(prompt, params, reuse=reuse, thinks=False, on_token=lambda: None)

    first, answer = run(prompt, False)
    again, _ = run(prompt, False)
    assert first.cached_tokens == again.cached_tokens == 0 and first.output == again.output
    longer, _ = run(prompt + answer + prompt, True)
    assert longer.cached_tokens == len(prompt) + 2


def test_ceilings_are_those_of_the_cost_model(target: InProcess, tmp_path: Path) -> None:
    record = characterise(SMALL, {"A": target}, tmp_path / "r.json")
    work = Work.of(target.llm.tape)
    two = record.runs[1]
    c = two.ceiling
    assert (c.bandwidth, c.compute) == (BANDWIDTH, COMPUTE)
    assert c.decode_bytes == pytest.approx(work.decode(92, "f16")["bytes"])
    assert c.decode_rate == pytest.approx(BANDWIDTH / work.decode(92, "f16")["bytes"])
    assert c.prefill_macs == pytest.approx(work.prefill(90)["macs"])
    assert c.prefill_rate == pytest.approx(BANDWIDTH / work.prefill(90)["bytes"])
    assert c.decode_limit == c.prefill_limit == "bandwidth"


def test_prefill_reads_the_weights_once_a_batch(target: InProcess) -> None:
    roof = target.roof()
    assert roof is not None
    work, n = roof.work, roof.ubatch
    assert work.prefill(n, n) == work.prefill(n)
    two = work.weight_bytes(n) + work.weight_bytes(10)
    assert work.prefill(n + 10, n)["bytes"] == pytest.approx(two / (n + 10))
    run = Run(0, "x", prompt_tokens=10, generated_tokens=4)
    assert roof.over(run, 1e15, 1e6).decode_limit == "compute"
    mixed = dataclasses.replace(roof, ctv="q8_0").decode_bytes(100)
    both = [work.decode(100, kind)["bytes"] for kind in ("f16", "q8_0")]
    assert min(both) < mixed < max(both) and mixed == pytest.approx(sum(both) / 2)


def test_the_same_seed_gives_the_same_answers(target: InProcess, tmp_path: Path) -> None:
    first, again, other = (
        [r.output for r in characterise(SMALL, {"A": target}, tmp_path / f"{i}", seed=s).runs]
        for i, s in enumerate((1, 1, 2))
    )
    assert first == again and not set(first) & set(other)


# order


def test_sides_take_turns_and_swap() -> None:
    w = structs.replace(SMALL, repeats=2)
    steps = plan(w, ["A", "B"], "0")
    sides = "".join(s.side for s in steps)
    assert sides == "ABBAABBAAB" + "BAABBAABBA"
    assert [s.index for s in steps] == [i // 2 for i in range(20)]
    for a, b in zip(steps[::2], steps[1::2], strict=True):
        assert a.key == b.key and a.item == b.item
    assert len({s.key for s in steps}) == 10
    befores = {(s.index, s.side): s.before for s in steps if s.item.continues}
    for (index, side), before in befores.items():
        assert before is not None and (before.index, before.side) == (index - 1, side)


def test_a_tree_is_as_many_runs_as_it_takes(target: InProcess, tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    for i in range(4):
        (tmp_path / "code" / f"{i}.py").write_text(f"x{i} = [1, 2, 3]\n" * 30)
    w = Workload("t", (Item("part", 120, 2, tree=True),), text=str(tmp_path / "code"))
    runs = characterise(w, {"A": target}, tmp_path / "r.json").runs
    assert [r.name for r in runs] == [f"part {i + 1}" for i in range(len(runs))] and len(runs) > 3
    assert all(r.prompt_tokens == 120 for r in runs[:-1]) and runs[-1].prompt_tokens <= 120
    half = characterise(w.shrunk(0.5), {"A": target}, tmp_path / "h.json").runs
    # half of the text in prompts of half the size
    assert abs(len(half) - len(runs)) <= 2 and half[0].prompt_tokens == 60


# interruptions


class Stop(Exception):
    pass


def stopping_after(n: int, error: type[BaseException]) -> Callable[..., None]:
    runs = itertools.count()
    labels: set[str] = set()

    def progress(label: str, done: int, total: int) -> None:
        if label not in labels:
            labels.add(label)
            if next(runs) == n:
                raise error

    return progress


@pytest.mark.parametrize("stop_at", range(5))
def test_resume_after_ctrl_c_gives_the_same_runs(
    target: InProcess, tmp_path: Path, stop_at: int
) -> None:
    whole = characterise(SMALL, {"A": target}, tmp_path / "whole.json", seed=5)
    path = tmp_path / "r.json"
    with pytest.raises(KeyboardInterrupt):
        characterise(
            SMALL, {"A": target}, path, seed=5, progress=stopping_after(stop_at, KeyboardInterrupt)
        )
    record = Record.load(path)
    assert len(record.runs) == stop_at
    kept = [structs.asdict(r) for r in record.runs]
    target.llm.reset()  # as in a new process
    resumed = characterise(SMALL, {"A": target}, path, seed=5, resume=record)
    assert [key(r) for r in resumed.runs] == [key(r) for r in whole.runs]
    assert [structs.asdict(r) for r in resumed.runs[:stop_at]] == kept


def test_resume_wants_the_same_measurement(target: InProcess, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    characterise(SMALL, {"A": target}, path, seed=1)
    before = path.read_bytes()

    def resumed(workload: Workload, target: InProcess, seed: int) -> None:
        characterise(workload, {"A": target}, path, seed=seed, resume=Record.load(path))

    with pytest.raises(DesksideError, match="seed 1, now it is 2"):
        resumed(SMALL, target, 2)
    with pytest.raises(DesksideError, match=r"workload\.repeats 1, now it is 2"):
        resumed(structs.replace(SMALL, repeats=2), target, 1)
    with pytest.raises(DesksideError, match="ctk 'f16', now it is 'q8_0'"):
        resumed(SMALL, InProcess(tiny(), sha=False, ctx=256, threads=1, ctk="q8_0"), 1)
    with pytest.raises(DesksideError, match="was measured with"):
        resumed(SMALL, InProcess(tiny("tiny-dense"), sha=False, ctx=256, threads=1), 1)
    assert path.read_bytes() == before
    resumed(SMALL, target, 1)  # complete: nothing to do, nothing changed
    assert path.read_bytes() == before
    # a record of before some field of an item existed
    old = Record.load(path)
    for item in old.workload["items"]:
        del item["representative"]
    old.save(path)
    resumed(SMALL, target, 1)
    assert [key(r) for r in Record.load(path).runs] == [key(r) for r in old.runs]


def test_too_long_is_refused_before_anything_runs(target: InProcess, tmp_path: Path) -> None:
    w = structs.replace(SMALL, items=(*SMALL.items, Item("huge", 300, 5)))
    with pytest.raises(DesksideError, match=r"item 'huge' needs a context of 305 tokens"):
        characterise(w, {"A": target}, tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()
    skipping = structs.replace(w, too_long="skip")
    record = characterise(skipping, {"A": target}, tmp_path / "r.json")
    assert len(record.runs) == 5 and record.workload["skipped"][0]["name"] == "huge"


def test_a_full_disk_keeps_what_was_there(
    target: InProcess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "r.json"
    real, saved = Record.save, itertools.count()

    def save(record: Record, to: Path) -> None:
        if next(saved) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(to))
        real(record, to)

    monkeypatch.setattr(Record, "save", save)
    with pytest.raises(DesksideError, match=r"No space left on device; 2 runs are in .*--resume"):
        characterise(SMALL, {"A": target}, path)
    assert len(Record.load(path).runs) == 2
    with pytest.raises(DesksideError, match="cannot be written: No such file"):
        characterise(SMALL, {"A": target}, tmp_path / "none" / "r.json")


class Failing:
    """A target whose runs fail where it is told to."""

    def __init__(self, target: InProcess, at: set[int]) -> None:
        self._target, self._at, self._runs = target, at, itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        if next(self._runs) in self._at:
            raise DesksideError("it broke")
        return self._target.run(*args, **kwargs)


def test_a_failed_run_is_recorded_and_made_again_on_resume(
    target: InProcess, tmp_path: Path
) -> None:
    path = tmp_path / "r.json"
    record = characterise(SMALL, {"A": Failing(target, {1, 3})}, path)
    errors = [r.error for r in record.runs]
    assert errors[0] is None and errors[1] == "it broke" and errors[3] == "it broke"
    assert errors[2] is None and errors[4] is not None and "talk on" in errors[4]
    assert record.runs[1].prefill_rate is None
    resumed = characterise(SMALL, {"A": target}, path, resume=Record.load(path))
    assert (
        sorted(r.index for r in resumed.runs if r.ok)
        == [0, 1, 2, 3, 4]
        == sorted(r.index for r in resumed.runs)
    )


def test_three_failures_in_a_row_end_it(target: InProcess, tmp_path: Path) -> None:
    with pytest.raises(DesksideError, match=r"3 runs in a row failed.*it broke; nothing was"):
        failing: Any = Failing(target, {0, 1, 2})
        characterise(SMALL, {"A": failing}, tmp_path / "r.json")
    assert len(Record.load(tmp_path / "r.json").runs) == 3


# the machine


def test_a_watch_tells_what_else_ran() -> None:
    with watch.Watch(own=True) as seen:
        end = time.monotonic() + 2 * watch.SHORTEST
        while time.monotonic() < end:
            sum(range(1000))
    load = seen.load
    # this loop keeps a core busy and is not "other"
    assert load.other_cpu is not None and 0 <= load.other_cpu <= (os.cpu_count() or 1)
    assert load.load_average is not None and load.available_memory
    with watch.Watch(own=False) as seen:
        pass
    assert seen.load.other_cpu is None and seen.load.available_memory
    with watch.Watch(own=False, local=False) as seen:
        pass
    assert seen.load.load_average is None


def test_files_of_the_kernel_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cores = sorted(os.sched_getaffinity(0))
    for core, khz in zip(cores, itertools.cycle((3_100_000, 2_500_000)), strict=False):
        folder = tmp_path / f"cpu{core}"
        (folder / "cpufreq").mkdir(parents=True)
        (folder / "thermal_throttle").mkdir()
        (folder / "cpufreq/scaling_cur_freq").write_text(f"{khz}\n")
        (folder / "thermal_throttle/core_throttle_count").write_text("7\n")
    monkeypatch.setattr(watch, "CPUS", tmp_path)
    assert watch.megahertz()[0] == 3100 and len(watch.megahertz()) == len(cores)
    assert watch.throttle_events() == 7 * len(cores)
    with watch.Watch(own=True) as seen:
        count = tmp_path / f"cpu{cores[0]}/thermal_throttle/core_throttle_count"
        count.write_text("9\n")
    assert seen.load.throttled == 2 and seen.load.mhz_min is not None


# memory, profile


def test_a_context_is_as_long_as_needed_and_as_memory_allows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file = GGUF.open(tiny())
    assert load(file, SMALL, sha=False).llm.ctx == 46 - 6 - 40 + 94  # the longest item: 90 + 4
    tape = build_tape(file)
    assert context_room(tape, EngineConfig(ctx=77)) == (77, "-c 77 was given")
    room, why = context_room(tape, EngineConfig())
    assert room == tape.n_ctx_train and str(room) in why
    weights = sum(w.nbytes for w in tape.weights().values())
    free = weights + 500_000_000 + 2_000_000
    monkeypatch.setattr("deskside.bench.measure.targets.available_memory", lambda: free)
    room, why = context_room(tape, EngineConfig())
    assert 1 < room < tape.n_ctx_train and "free memory" in why
    with pytest.raises(DesksideError, match="--vs: the two models"):
        context_room(tape, EngineConfig(), tape)


def test_the_profile_adds_up_to_the_cost_model() -> None:
    target = InProcess(tiny(), sha=False, ctx=200, threads=1)
    rows = profile(target.llm, 100)
    work = Work.of(target.llm.tape).decode(100, "f16")
    decode = [r for r in rows if r.phase == "decode"]
    assert sum(r.nbytes or 0 for r in decode) == pytest.approx(work["bytes"])
    assert sum(r.macs or 0 for r in decode) == pytest.approx(work["macs"])
    names = " ".join(r.name for r in decode)
    for part in ("delta net: in-projections", "experts: gate and up", "attention", "head"):
        assert part in names
    assert "blk." not in names and all(r.seconds > 0 for r in rows)
    assert {r.phase for r in rows} == {"decode", "prefill"}
    with pytest.raises(DesksideError, match="depth of 200"):
        profile(target.llm, 200)


@pytest.mark.parametrize("preset", ["tiny-dense", "tiny-qwen3moe", "tiny-llama"])
def test_every_architecture_has_names_for_its_steps(preset: str) -> None:
    target = InProcess(tiny(preset), sha=False, ctx=64, threads=1)
    rows = profile(target.llm, 8)
    work = Work.of(target.llm.tape).decode(8, "f16")
    assert sum(r.nbytes or 0 for r in rows if r.phase == "decode") == pytest.approx(work["bytes"])
    assert not any(".weight" in r.name for r in rows), [r.name for r in rows]


# the command


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """A workload's file, and a place for the record."""
    path = tmp_path / "w.toml"
    items = [f'{{ name = "i{i}", prompt = {30 + i}, generate = 8 }}' for i in range(6)]
    path.write_text(f'name = "w"\nitems = [{", ".join(items)}]\n')
    yield path, tmp_path / "out.json"


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return inside("bench", "-m", tiny(), "-t", "1", "--no-report", *arguments)


def test_bench_writes_a_record_and_a_table(files: tuple[Path, Path]) -> None:
    workload, out = files
    done = bench("-w", workload, "--out", out, "--runs", "2", "--temp", "0", "--profile")
    assert done.returncode == 0, done.stderr
    assert b"this process may use" not in done.stderr
    record = Record.load(out)
    assert len(record.runs) == 12 and all(r.ok for r in record.runs)
    assert record.workload["sampling"]["temperature"] == 0 and record.profile
    assert record.runs[0].ceiling.bandwidth and record.targets["A"].files[0].sha256
    for part in ("TTFT s", "TG tok/s", "i0 (cold)", "µs/token"):
        assert part in done.stdout.decode()
    again = bench("-w", workload, "--out", out)
    assert again.returncode == 2 and b"--force" in again.stderr
    assert Record.load(out) == record
    done = inside("bench", "--resume", out, "--no-report")
    assert done.returncode == 0 and Record.load(out) == record


def test_threads_beyond_the_cores_are_told(files: tuple[Path, Path]) -> None:
    workload, out = files
    done = bench("-w", workload, "--out", out, "-t", "4096", "--max-tokens", "2")
    assert done.returncode == 0 and b"-t 4096: this process may use" in done.stderr


def test_resume_after_kill_9(files: tuple[Path, Path]) -> None:
    workload, out = files
    arguments = ["bench", "-m", str(tiny()), "-t", "1", "--no-report", "-w", str(workload)]
    arguments += ["--runs", "15", "--out", str(out)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.DEVNULL)
    while not (out.exists() and len(Record.load(out).runs) >= 5):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = Record.load(out)
    assert 5 <= len(before.runs) < 90
    done = inside("bench", "--resume", out, "--no-report")
    assert done.returncode == 0, done.stderr
    after = Record.load(out)
    assert after.runs[: len(before.runs)] == before.runs
    assert [r.index for r in after.runs] == list(range(90))


def test_failed_runs_are_an_exit_code(
    files: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workload, out = files
    generate, calls = InProcess.run, itertools.count()

    def breaks_once(self: InProcess, *args: Any, **options: Any) -> Any:
        if next(calls) == 2:
            raise DesksideError("it broke")
        return generate(self, *args, **options)

    monkeypatch.setattr(InProcess, "run", breaks_once)
    asked = Request(
        model=tiny(),
        workload=str(workload),
        options={"threads": 1},
        no_hash=True,
        no_report=True,
    )
    assert command.main(dataclasses.replace(asked, out=out)) == 1
    said = capsys.readouterr()
    assert "i2 failed: it broke" in said.out and "1 of 6 runs failed; --resume" in said.err
    assert command.main(Request(resume=out, no_hash=True, no_report=True)) == 0
    assert sorted(r.index for r in Record.load(out).runs) == list(range(6))


def test_ctrl_c_says_how_to_go_on(files: tuple[Path, Path]) -> None:
    workload, out = files
    arguments = ["bench", "-m", str(tiny()), "-t", "1", "--no-report", "-w", str(workload)]
    arguments += ["--runs", "40", "--out", str(out)]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE)
    while not (out.exists() and len(Record.load(out).runs) >= 2):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate()
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert f"--resume {out} continues".encode() in stderr
    assert len(Record.load(out).runs) >= 2


def test_the_bundled_model_gets_what_it_holds(tmp_path: Path) -> None:
    items = [f'{{ name = "i{i}", prompt = {n}, generate = 8 }}' for i, n in enumerate((30, 12_000))]
    path, out = tmp_path / "long.toml", tmp_path / "out.json"
    path.write_text(f'name = "long"\nitems = [{", ".join(items)}]\n')
    done = inside("bench", "-w", path, "-c", "600", "--out", out, "--no-report")
    assert done.returncode == 0 and b"workload long runs at --scale 0.04" in done.stderr
    record = Record.load(out)
    assert record.workload["scale"] == 0.04 and record.runs[1].prompt_tokens == 480
    said = "the model's context is 8192; shrink the workload with --scale 0.68"
    refused("bench", "-m", demo_model(), "-w", path, part=said)
    refused("bench", "-w", path, "--scale", "0.9", part="with --scale 0.675 or --max-prompt")


def test_replay_repeats_the_same_runs(files: tuple[Path, Path], tmp_path: Path) -> None:
    workload, out = files
    bench("-w", workload, "--out", out, "--seed", "9", "-c", "100", "--scale", "0.9")
    again = tmp_path / "again.json"
    done = inside("bench", "--replay", out, "--out", again, "--no-report")
    assert done.returncode == 0, done.stderr
    first, second = Record.load(out), Record.load(again)
    assert [r.output for r in first.runs] == [r.output for r in second.runs]
    assert first.workload == second.workload and second.targets["A"].n_ctx == 100
    refused("bench", "--replay", out, "-t", "2", part="--threads cannot be combined")
    # another file under the same name
    record = json.loads(out.read_text())
    record["targets"]["A"]["files"][0]["sha256"] = "0" * 64
    out.write_text(json.dumps(record))
    refused("bench", "--replay", out, part="is not the file that was measured")
    named = tmp_path / "named.json"
    done = inside("bench", "--replay", out, "-m", tiny(), "--out", named, "--no-report")
    assert done.returncode == 0, done.stderr


def test_bad_command_lines(files: tuple[Path, Path], tmp_path: Path) -> None:
    workload, _ = files
    model = tiny()
    refused("bench", "-m", model, "-w", "none", part="--workload none")
    refused("bench", "-m", model, "-w", workload, "-c", "20", part="item 'i0'")
    refused("bench", "-m", model, "--endpoint", "http://x", part="-m and --endpoint")
    refused("bench", "--endpoint", "localhost:80", part="http://HOST:PORT")
    refused("bench", "--endpoint", "http://127.0.0.1:9", "-t", "2", part="--threads")
    refused("bench", "-m", model, "--warmup", "some", part="--warmup some")
    refused("bench", "-m", model, "--runs", "0", part="--runs 0")
    refused("bench", "-m", model, "--scale", "3", part="--scale 3")
    refused("bench", "-m", model, "--text", tmp_path / "none", "-w", workload, part="--text")
    refused("bench", "-m", model, "-w", workload, "--temp", "nan", part="temperature")
    refused("bench", "-m", tmp_path / "none.gguf", "-w", workload, part="none.gguf")
    refused("bench", "--resume", tmp_path / "none.json", part="none.json")
    (tmp_path / "bad.json").write_text('{"schema": 1}')
    refused("bench", "--resume", tmp_path / "bad.json", part="bad.json")
    refused("bench", "--resume", "a", "--replay", "b", part="--resume")
    where = tmp_path / "none" / "x.json"
    refused("bench", "-m", model, "-w", workload, "--out", where, part=str(where))
    refused("bench", "-m", model, "--out", tmp_path / "x.md", part="expected NAME.json")
    refused("bench", "-m", model, "--timeout", "nan", part="--timeout nan")
    refused("bench", "-m", model, "-s", "-1", part="-s -1")
    (tmp_path / "bad.json").write_text('{"schema": 1, "workload": {"name": "x", "items": []}}')
    refused("bench", "--replay", tmp_path / "bad.json", part="bad.json: field 'targets' is missing")
    assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".json") == ["bad.json"]


def test_the_shipped_workloads_are_listed() -> None:
    done = inside("bench", "--list")
    assert done.returncode == 0
    for name in ("article", "sweep", "chat", "agent", "code-ingest"):
        assert name in done.stdout.decode()


def test_a_key_is_not_recorded() -> None:
    from deskside.bench.command import _command

    assert _command(["bench", "--api-key", "s3", "-c", "1"]) == [
        "bench",
        "--api-key",
        "…",
        "-c",
        "1",
    ]
    assert _command(["bench", "--api-key=s3"]) == ["bench", "--api-key=…"]


def test_the_command_line_imports_only_the_request_of_bench() -> None:
    code = "import deskside.cli.app, sys; print(*(m for m in sys.modules if '.bench.' in m))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert done.stdout.split() == [b"deskside.bench.request"]


def test_the_bar_ends_full(target: InProcess, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    measure.characterise(
        SMALL, {"A": target}, tmp_path / "r.json", progress=lambda *now: seen.append(now)
    )
    assert seen[0][1] == 0 and seen[-1][1] == seen[-1][2] > 0
    assert all(0 <= done <= total for _, done, total in seen)
