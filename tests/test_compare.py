"""The comparison's arithmetic and bookkeeping: no peers, no timing."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine import rates
from deskside.models import build_tape
from deskside.tape.cost import Experts, Work, limit
from tests.models import tiny
from tools.compare import machine, measure, peers, plan, prepare, record, report
from tools.kernels import instructions

GB = 10**9
TESTS = [t for s in plan.stages(quick=False, rounds=5) for t in s.tests]


def samples(*rates: float) -> dict[str, float]:
    return {str(r): rate for r, rate in enumerate(rates)}


# memory


def test_engines_stay_loaded_while_memory_holds_their_copies() -> None:
    copies = [1, 1, 0, 1]
    needed = machine.memory_needed(5 * GB, copies)
    assert needed == 5 * GB + 15 * GB + 4 * machine.WORK_BYTES
    assert machine.loading(5 * GB, copies, needed + machine.RESERVE) == "all"
    assert machine.loading(5 * GB, copies, needed + machine.RESERVE - 1) == "one"
    assert machine.loading(11 * GB, copies, 24 * GB) == "one"
    assert machine.loading(25 * GB, copies, 24 * GB) is None


def test_the_copy_holds_the_files_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CHUNK", 1000)
    contents = [bytes(range(250)) * 10, bytes(range(100)) * 33]
    paths = [tmp_path / "a", tmp_path / "b"]
    for path, data in zip(paths, contents, strict=True):
        path.write_bytes(data)
    copier = machine.Copier([str(p) for p in paths], 5000)
    assert copier.copied() == 5000
    for parts in (1, 2, 5):
        target = bytearray(5000)
        for part in range(parts):
            copier._copy(memoryview(target), part, parts)
        assert bytes(target) == b"".join(contents)[:5000]
    assert copier.seconds(2) > 0


# work


def test_bytes_of_a_token() -> None:
    file = GGUF.open(tiny())
    work = Work.of(build_tape(file))
    sizes = {name: info.nbytes for name, info in file.tensors.items()}
    routed = sum(n for name, n in sizes.items() if "_exps." in name)
    table = sizes["token_embd.weight"]
    assert work.dense_bytes == sum(sizes.values()) - routed - table
    assert work.row_bytes == file.tensors["token_embd.weight"].row_bytes
    # tiny-moe chooses 4 of 32 experts
    one = work.weight_bytes(1)
    assert one == pytest.approx(work.dense_bytes + work.row_bytes + routed * 4 / 32)
    assert work.weight_bytes(10_000) == pytest.approx(
        work.dense_bytes + 10_000 * work.row_bytes + routed
    )


def test_bytes_of_states() -> None:
    work = Work.of(build_tape(GGUF.open(tiny())))
    # of 4 layers one has attention: 2 heads of 64, keys and values
    f16, q8_0 = ((work.state_bytes(1000, kv) - work.state_bytes(500, kv)) for kv in ("f16", "q8_0"))
    assert f16 == 500 * 2 * 2 * 64 * 2
    assert q8_0 == 500 * 2 * 2 * (64 // 32 * 34)
    # three delta nets: 8 matrices of 64 x 64 and 3 inputs of (2 * 4 + 8) heads, read and written
    recurrent = 3 * 4 * (8 * 64 * 64 + 3 * 16 * 64)
    assert work.state_bytes(0, "f16") == 2 * recurrent
    four = work.decode(100, "f16", 4)["bytes"]
    assert four == pytest.approx(work.weight_bytes(4) / 4 + work.state_bytes(100, "f16"))


def test_multiply_adds_of_a_token() -> None:
    file = GGUF.open(tiny())
    work = Work.of(build_tape(file))
    vectors = ("norm.weight", "conv1d.weight", "ssm_a", "ssm_dt.bias", "token_embd.weight")
    macs = {
        name: info.row_len * info.n_rows * (4 / 32 if "_exps." in name else 1)
        for name, info in file.tensors.items()
        if not name.endswith(vectors)
    }
    head = macs.pop("output.weight")
    expected = sum(macs.values())
    assert work.head_macs == head
    assert work.macs == expected
    assert work.prefill(512)["macs"] == pytest.approx(expected + head / 512)


def test_experts_that_tokens_share_are_read_once() -> None:
    layer = Experts(nbytes=100, used=1, total=2)
    assert [layer.read(n) for n in (0, 1, 2, 3)] == [0, 50, 75, 87.5]


def test_the_limit_is_the_lower_bound() -> None:
    work = {"bytes": 2.0, "macs": 10.0}
    assert limit(work, 100, 1000, prefill=True) == (50, "bandwidth")
    assert limit(work, 100, 100, prefill=True) == (10, "compute")
    assert limit(work, 100, None, prefill=False) == (50, "bandwidth")
    assert limit(work, 100, None, prefill=True) is None
    assert limit(work, None, 100, prefill=False) is None


# plan


def test_every_test_has_its_context() -> None:
    for quick in (False, True):
        for stage in plan.stages(quick=quick, rounds=5):
            for test in stage.tests:
                context = stage.context(test)
                if test.kind == "prefill":
                    assert test.tokens <= context.n_ctx
                elif test.kind == "batch":
                    used = plan.PROMPT + plan.WARM_STEPS + 5 * test.tokens
                    assert used * context.n_seq <= context.n_ctx
                elif context.depth:
                    # one token a round is taken twice, see Deskside.decode
                    steps = plan.WARM_STEPS + 1 + 5 * (test.tokens + 1)
                    assert context.depth + steps <= context.n_ctx
    assert len({t.name for t in TESTS}) == len(TESTS)


def test_a_short_context_leaves_tests_out() -> None:
    stages = plan.stages(quick=False, rounds=5)
    fitting, left = plan.within(stages, 2048)
    assert [t.name for s in fitting for t in s.tests if t.kind == "prefill"][-1] == "prefill 2048"
    assert left == ["decode, depth 4096, f16 KV", "decode, depth 4096, q8_0 KV"]


def test_the_order_turns() -> None:
    engines = plan.ENGINES[:3]
    orders = [[e.name for e in measure.turned(engines, r)] for r in range(4)]
    assert orders[0] == orders[3] == [e.name for e in engines]
    assert {order[0] for order in orders} == {e.name for e in engines}


def test_the_peers_are_pinned() -> None:
    assert [r.split("==")[0] for r in prepare.requirements(plan.PEERS)] == [
        "xllamacpp",
        "ik-llama-cpp-python",
    ]


def test_a_slice_that_does_not_fit_the_disk_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: type("", (), {"free": 10**9})())
    said = prepare.model_file(prepare.SLICES[0], tmp_path, print)
    assert isinstance(said, str) and "4.9 GB of disk are needed" in said and "1.0 GB" in said
    assert not list(tmp_path.iterdir())


# record


def entry(**changes: Any) -> dict[str, Any]:
    return {**record.new_file(Path("/m/a.gguf"), 5 * GB, "all", 2), **changes}


def test_a_record_survives_the_disk(tmp_path: Path) -> None:
    kept = record.new({"threads": 2, "engines": []}, {"commit": "abc"})
    kept["files"]["a.gguf"] = entry()
    record.add(kept["files"]["a.gguf"], "prefill 32", plan.OURS, 1, 12.5)
    path = tmp_path / "new" / "peers-1.json"
    record.save(kept, path)
    assert record.load(path) == kept
    assert record.latest(path.parent) == path
    assert [p.name for p in path.parent.iterdir()] == ["peers-1.json"]
    assert record.resume(path, {"threads": 2, "engines": []}, "abc")["files"] == kept["files"]


@pytest.mark.parametrize(
    ("settings", "commit", "said"),
    [({"threads": 4, "engines": []}, "abc", "threads was 2"), (None, "def", "commit was abc")],
)
def test_other_settings_do_not_resume(
    tmp_path: Path, settings: dict[str, Any] | None, commit: str, said: str
) -> None:
    made = {"threads": 2, "engines": []}
    path = tmp_path / "r.json"
    record.save(record.new(made, {"commit": "abc"}), path)
    with pytest.raises(DesksideError, match=said):
        record.resume(path, settings or made, commit)


def test_a_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    for text in ("{", "[]", '{"version": 0}'):
        (tmp_path / "r.json").write_text(text)
        with pytest.raises(DesksideError, match="not a record"):
            record.load(tmp_path / "r.json")
    with pytest.raises(DesksideError, match="no record to resume"):
        record.latest(tmp_path)


def test_what_is_missing() -> None:
    file = entry(samples={"x": {"a": samples(1, 2), "b": samples(1)}})
    record.leave_out(file, "c", ["x"], "it died")
    assert record.missing(file, ["a", "b", "c"], ["x"], 0) == []
    assert record.missing(file, ["a", "b", "c"], ["x"], 1) == ["b"]
    assert record.missing(file, ["a", "b"], ["x", "y"], 0) == ["a", "b"]


def test_half_a_round_is_forgotten() -> None:
    file = entry(samples={"x": {"a": samples(1, 2), "b": samples(1)}})
    record.leave_out(file, "c", ["x"], "it died")
    record.drop_parts(file, ["a", "b", "c"])
    assert file["samples"] == {"x": {"a": {"0": 1}, "b": {"0": 1}}}


# report


def measured() -> dict[str, Any]:
    """A record as JSON gives it."""
    test = "decode, depth 0"
    file = entry(
        work={test: {"bytes": 1e9, "macs": 1e9}, "prefill 512": {"bytes": 1e7, "macs": 1e9}},
        samples={
            test: {
                "deskside": samples(38, 37),
                "llama.cpp": samples(30, 30),
                "ik_llama.cpp": samples(31, 31),
                "ik_llama.cpp -rtr": samples(36, 36),
            },
            "prefill 512": {"deskside": samples(100, 100)},
        },
        bandwidth=[39e9, 40e9, 41e9],
        systems={"deskside": "avx2", "llama.cpp": "CPU : AVX2 = 1 | AVX512 = 0 | FMA = 1 |"},
        copy={"bytes": 5 * GB, "seconds": {"1": [2.0, 2.2], "2": [1.0, 1.2]}},
        load={"deskside": {"0": 1.4}},
        rss={"deskside": {"anonymous": 5 * GB, "file": 10**8}},
        python={test: {"0": 0.004, "1": 0.006}},
        idle={"llama.cpp": 0.3, "ik_llama.cpp": 0.0},
        left_out={"llama.cpp": {"prefill 512": "it died"}},
    )
    kept = record.new(
        {"threads": 2, "quick": False, "rounds": 2, "engines": []},
        {"cpu": "A CPU", "commit": "0123456789abcdef", "changed": False},
    )
    kept["versions"] = {"deskside": "0.1"}
    kept["files"]["a.gguf"] = file
    loaded: dict[str, Any] = json.loads(json.dumps(kept))
    return loaded


def test_the_table() -> None:
    out = Console(file=io.StringIO(), width=200, color_system=None)
    report.show(measured(), TESTS, out)
    text = out.file.getvalue()  # type: ignore[attr-defined]
    row = next(line for line in text.splitlines() if "decode, depth 0" in line)
    cells = [c.strip() for c in row.strip("│ ").split("│")]
    assert cells[:4] == ["decode, depth 0", "37.5", "30", "1.25 (1.23..1.27) / 1.25 pass"]
    # the faster of ik_llama.cpp's two
    assert cells[4:6] == ["36 r", "1.04 (1.03..1.06) / 1.05 FAIL"]
    assert cells[6:] == ["40", "94% of bandwidth / 93% pass"]
    row = next(line for line in text.splitlines() if "prefill 512" in line)
    assert [c.strip() for c in row.strip("│ ").split("│")][1:] == ["100", *["-"] * 6]
    for line in (
        "Python's share of decode: 0.50% (decode, depth 0) / 1% pass",
        "1.40 of the copy / 1.5 pass",
        "llama.cpp has AVX2 FMA",
        "llama.cpp left out prefill 512: it died",
        "llama.cpp used 30% of a core",
        "read bandwidth: 40.0 GB/s (39.0..41.0, 3 samples)",
    ):
        assert line in text
    assert "ik_llama.cpp used" not in text


def test_q8_0_is_held_to_f16() -> None:
    name = "decode, depth 4096, {} KV"
    file = entry(
        samples={
            name.format("f16"): {"deskside": samples(10, 10)},
            name.format("q8_0"): {"deskside": samples(9, 9)},
        }
    )
    notes = list(report.notes(file, TESTS))
    assert notes[0] == "decode, depth 4096, q8_0 KV over f16: 0.90 (0.90..0.90) / 1 FAIL"


# command line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["no-such.gguf"], "no-such.gguf is not there"),
        ([__file__, "--engines", "deskside"], "not a GGUF file"),
        (["--show", "no-such.json"], "no-such.json: No such file"),
        ([__file__, "--resume", "no-such.json"], "no-such.json: No such file"),
        ([__file__, "--llama-lib", "no-such.so"], "no-such.so is not there"),
    ],
)
def test_errors_are_one_line(
    arguments: list[str],
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("sys.argv", ["bench-peers", *arguments])
    with pytest.raises(SystemExit) as stopped:
        peers.main()
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("bench-peers: error: ") and error.count("\n") == 1 and said in error


def test_a_run_of_deskside_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All stages on a tiny model, interrupted after the first and taken up again."""
    monkeypatch.setattr(rates, "bandwidth", lambda threads: 40e9)
    out = tmp_path / "r.json"
    common = [str(tiny()), "--quick", "--rounds", "1", "--threads", "2", "--engines", "deskside"]

    rounds = measure.Run._rounds

    def interrupted(self: measure.Run, stage: plan.Stage, *rest: Any) -> None:
        if stage.tests[0].kind == "batch":
            raise KeyboardInterrupt
        rounds(self, stage, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(measure.Run, "_rounds", interrupted)
        peers.run(peers.arguments([*common, "--json", str(out)]))
    before = record.load(out)["files"][tiny().name]
    assert "decode, depth 0" in before["samples"]
    assert "decode, 4 sequences" not in before["samples"]

    peers.run(peers.arguments([*common, "--resume", str(out)]))
    after = record.load(out)["files"][tiny().name]
    tests = [t.name for s in plan.stages(quick=True, rounds=1) for t in s.tests]
    assert sorted(after["samples"]) == sorted(tests)
    assert not after["left_out"]
    for test in before["samples"]:
        assert after["samples"][test] == before["samples"][test]


# instructions


def test_instructions_are_summed_by_object() -> None:
    profile = """\
ob=(1) /lib/a.so
fn=(1) f
0 10
+3 5
cob=(2) /lib/b.so
cfn=(2) g
calls=1 0
0 100
ob=(2)
fn=(2) g
0 100
ob=(1)
* 1
"""
    assert instructions.objects(profile.splitlines(keepends=True)) == {
        "/lib/a.so": 16,
        "/lib/b.so": 100,
    }
