"""Extrapolation from slices: the fit, its interval, the choice of slices, a tiny run end to end."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from deskside.bench.predict import choose as choosing
from deskside.bench.predict import extrapolate as ex
from deskside.bench.predict import measure as predicting
from deskside.bench.predict.choose import Choice, choose
from deskside.bench.predict.measure import PredictOptions, predict
from deskside.bench.predict.slices import Slice, full, write
from deskside.cli import app as cli
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine import rates
from deskside.machine.watch import WORK_BYTES
from deskside.models import build_tape
from deskside.tape.cost import Work
from tests.commands import refused

GB = 10**9
HEAD, LAYER, DEPTH = 8e-3, 1.5e-3, 40
TRUE = HEAD + DEPTH * LAYER
NOWHERE = Path("/nonexistent")


def rounds(
    rng: np.random.Generator, layers: list[int], n: int, noise: float, misfit: float = 0.0
) -> list[list[float]]:
    """Times of n rounds: each slice has an error of its own, and each round another one."""
    of_slice = 1 + misfit * rng.standard_normal((len(layers), 1))
    of_round = 1 + noise * rng.standard_normal((len(layers), n))
    times = (HEAD + LAYER * np.array(layers)[:, None]) * of_slice * of_round
    return times.tolist()


# the line


def test_exact_times_give_head_and_layer() -> None:
    samples = [[HEAD + LAYER * n] * 3 for n in (4, 8, 12)]
    e = ex.extrapolate([4, 8, 12], samples, DEPTH, paired=True)
    assert (e.head, e.layer) == pytest.approx((HEAD, LAYER))
    assert (e.low, e.seconds, e.high) == pytest.approx((TRUE, TRUE, TRUE))
    assert e.misfit == pytest.approx(0, abs=1e-9)


def test_noise_moves_them_little() -> None:
    rng = np.random.default_rng(1)
    found = [
        ex.extrapolate([4, 8, 12], rounds(rng, [4, 8, 12], 7, 0.01), DEPTH, paired=True)
        for _ in range(50)
    ]
    assert np.mean([e.head for e in found]) == pytest.approx(HEAD, rel=0.02)
    assert np.mean([e.layer for e in found]) == pytest.approx(LAYER, rel=0.02)
    assert np.median([(e.high - e.low) / 2 / TRUE for e in found]) < 0.06


def test_weights_are_those_of_relative_errors() -> None:
    x, y = np.array([4.0, 8, 12]), np.array([1.0, 2.2, 2.8])
    a = np.stack([np.ones(3), x], axis=1) / y[:, None]  # each equation divided by its time
    want = np.linalg.lstsq(a, np.ones(3), rcond=None)[0]
    assert ex.fit(x, y) == pytest.approx(want)


@pytest.mark.parametrize(
    ("layers", "noise", "misfit", "min_share"),
    [
        ([4, 8, 12], 0.02, 0.0, 0.95),
        ([4, 8, 12], 0.02, 0.01, 0.93),
        ([4, 8, 12], 0.01, 0.02, 0.75),  # slices off by twice the scatter: seen, in part
        ([4, 8], 0.02, 0.0, 0.88),
    ],
)
def test_the_interval_covers(
    layers: list[int],
    noise: float,
    misfit: float,
    min_share: float,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(ex, "RESAMPLES", 1000)
    rng = np.random.default_rng(2)
    found = [
        ex.extrapolate(layers, rounds(rng, layers, 5, noise, misfit), DEPTH, paired=True)
        for _ in range(200)
    ]
    assert np.mean([e.low <= TRUE <= e.high for e in found]) >= min_share


def test_two_slices_cannot_show_a_misfit_and_three_do() -> None:
    bent = [[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]]
    assert ex.extrapolate([4, 8], bent[:2], DEPTH, paired=True).misfit is None
    e = ex.extrapolate([4, 8, 12], bent, DEPTH, paired=True)
    assert e.misfit == pytest.approx(1)  # 8 and 12 layers say that 4 take no time
    assert e.low < e.seconds < e.high  # without any scatter between rounds


def test_no_model_is_faster_than_its_slice() -> None:
    e = ex.extrapolate([4, 8], [[2.0, 2.0], [1.0, 1.0]], DEPTH, paired=True)
    assert e.layer < 0 and e.seconds == e.low == e.high == 1.0


def test_pairs_cancel_what_all_slices_share() -> None:
    slow = np.array([1, 1.3, 0.9, 1.1, 1.5])
    samples = [((HEAD + LAYER * n) * slow).tolist() for n in (4, 8)]
    paired = ex.extrapolate([4, 8], samples, DEPTH, paired=True)
    alone = ex.extrapolate([4, 8], samples, DEPTH, paired=False)
    assert alone.high - alone.low > paired.high - paired.low


# the choice


def layers_of(choice: Choice) -> list[int]:
    return [s.layers for s in choice.slices]


def test_a_slice_knows_its_file_before_it_is_written(tmp_path: Path) -> None:
    s = Slice("tiny-moe", 4, 8)
    path = write(s, tmp_path)
    assert s.nbytes == pytest.approx(path.stat().st_size, rel=0.02)
    assert s.work == Work.of(build_tape(GGUF.open(path)))
    assert path.name == "tiny-moe-4l-8e.gguf"


def test_auto_takes_three_slices_of_whole_periods() -> None:
    choice = choose("qwen3.5-35b-a3b", memory=23 * GB, disk=50 * GB, folder=NOWHERE)
    assert layers_of(choice) == [4, 8, 12] and choice.slices[0].experts is None
    assert choice.groups == ((0, 1, 2),) and choice.together and "interleaved" in choice.order


def test_more_memory_makes_deeper_slices_and_the_model_ends_them() -> None:
    choice = choose("qwen3.5-35b-a3b", memory=256 * GB, disk=500 * GB, folder=NOWHERE)
    assert layers_of(choice) == [12, 24, 36]


def test_less_memory_takes_turns_then_drops_experts() -> None:
    turns = choose("qwen3.5-35b-a3b", memory=10 * GB, disk=50 * GB, folder=NOWHERE)
    assert layers_of(turns) == [4, 8, 12] and turns.slices[0].experts is None
    assert len(turns.groups) > 1 and not turns.together and "in turn" in turns.order
    fewer = choose("qwen3.5-397b-a17b", memory=23 * GB, disk=50 * GB, folder=NOWHERE)
    assert layers_of(fewer) == [4, 8, 12] and fewer.slices[0].experts == 128


def test_two_slices_where_the_model_or_the_memory_has_no_third() -> None:
    assert layers_of(choose("tiny-moe", folder=NOWHERE, memory=9 * GB, disk=GB)) == [4, 8]
    smallest = choose("qwen3.5-397b-a17b", memory=int(6.4 * GB), disk=50 * GB, folder=NOWHERE)
    assert layers_of(smallest) == [4, 8] and smallest.slices[0].experts == 32


def test_a_check_has_a_group_of_its_own_where_memory_is_short() -> None:
    choice = choose(
        "qwen3.5-35b-a3b", (4, 8, 12), check=24, memory=23 * GB, disk=50 * GB, folder=NOWHERE
    )
    assert choice.groups == ((0, 1, 2), (3,)) and choice.together
    assert choice.check == Slice("qwen3.5-35b-a3b", 24)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"layers": (4,)}, "--layers 4: give two or more"),
        ({"layers": (4, 4)}, "give two or more"),
        ({"layers": (4, 6)}, "--layers 6: .* periods of 4"),
        ({"layers": (4, 44)}, "--layers 44: .* 40 layers"),
        ({"layers": (4, 8), "check": 10}, "--check 10"),
        ({"layers": "many"}, "--layers many"),
        ({"layers": (4, 8), "memory": 5 * GB}, "8l needs .* GB of memory, 3.0 GB can be had"),
        ({"layers": (4, 8), "disk": 5 * GB}, "need 8.0 GB of disk, 5.0 GB are free"),
        ({"memory": 3 * GB}, "does not fit"),
        ({"disk": GB}, "does not fit"),
    ],
)
def test_what_does_not_fit_is_said(arguments: dict[str, Any], said: str) -> None:
    room = {"memory": 23 * GB, "disk": 50 * GB, "folder": NOWHERE}
    with pytest.raises(DesksideError, match=said):
        choose("qwen3.5-35b-a3b", **{**room, **arguments})


def test_left_out_experts_are_made_up_for_by_bytes() -> None:
    scale = predicting._scale(Slice("qwen3.5-397b-a17b", 4, 128), PredictOptions(), 512)
    cut = Slice("qwen3.5-397b-a17b", 8, 128).work.decode(528, "f16")["bytes"]
    router = 4 * 4096 * (512 - 128)  # float32 rows that are missing in a layer
    whole = full("qwen3.5-397b-a17b").work.decode(528, "f16")["bytes"]
    assert 1 + router / (cut / 8) * 0.5 < scale < 1 + router / (cut / 8) * 2
    head = 2 * Slice("qwen3.5-397b-a17b", 4, 128).work.decode(528, "f16")["bytes"] - cut
    assert head + 60 * (cut - head) / 8 * scale == pytest.approx(whole, rel=1e-6)
    assert predicting._scale(Slice("qwen3.5-397b-a17b", 4), PredictOptions(), 512) == 1


# a run

QUICK = PredictOptions(depths=(16, 40), generate=6, repeats=2, threads=1)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setattr(rates, "bandwidth", lambda threads: 1e10)
    monkeypatch.setattr(rates, "compute", lambda threads, isa: 1e11)
    yield tmp_path / "cache"


def test_a_prediction_end_to_end(folder: Path, tmp_path: Path) -> None:
    said: list[str] = []
    p = predict("tiny-llama", (1, 2, 3), check=4, options=QUICK, folder=folder, say=said.append)
    assert [f.kind for f in p.figures] == ["prefill of 16", "decode at 16", "decode at 40"]
    assert [len(s) for m in p.slices for s in m.seconds.values()] == [2] * 12
    for f in p.figures:
        assert 0 < f.low <= f.rate <= f.high and f.scale == 1
        assert f.measured == pytest.approx(f.tokens / p.slices[3].median(f.kind))
        assert f.check_rate and f.measured
        assert f.error == pytest.approx(f.check_rate / f.measured - 1)
    assert any("tiny-llama-3l: 0.00 GB, to be written" in line for line in said)
    assert len(list(folder.iterdir())) == 4
    p.save(tmp_path / "p.json")
    saved = json.loads((tmp_path / "p.json").read_text())
    assert saved["figures"][1]["estimate"]["layer"] == p.figures[1].estimate.layer


def test_files_that_were_there_stay(folder: Path) -> None:
    kept = write(Slice("tiny-llama", 1), folder)
    predict("tiny-llama", (1, 2), options=QUICK, folder=folder, keep=False)
    assert list(folder.iterdir()) == [kept]


def test_in_turn_every_slice_is_measured_in_both_directions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = choosing.RESERVE + Slice("tiny-llama", 2).weights + WORK_BYTES
    monkeypatch.setattr(choosing, "available_memory", lambda: room)
    labels: list[str] = []
    options = PredictOptions(depths=(16,), generate=4, repeats=3, threads=1)
    p = predict(
        "tiny-llama", (1, 2), options=options, folder=folder,
        progress=lambda label, *_: labels.append(label),
    )  # fmt: skip
    order = [label.split()[1] for label in labels if label.startswith("measuring")]
    assert order == ["1", "1", "2", "2", "2", "1"]
    assert not p.choice.together and "in turn" in p.choice.order


def test_fewer_experts_are_noted(folder: Path) -> None:
    p = predict("tiny-moe", "auto", experts=8, options=QUICK, folder=folder)
    assert all(m.slice.experts == 8 for m in p.slices)
    assert p.figures[1].scale > 1 and any("8 experts a layer" in note for note in p.notes)


def test_the_command(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESKSIDE_BENCH_DIR", str(folder))
    quick = ["--depths", "16", "--generate", "4", "--repeats", "2", "-t", "1", "--no-keep"]
    out = tmp_path / "p.json"
    arguments = ["predict", "tiny-llama", "--layers", "1,2,3", "--check", "4", "--out", str(out)]
    done = CliRunner().invoke(cli.app, [*arguments, *quick])
    assert done.exit_code == 0, done.output
    for part in (
        *("share of ceiling", "check: 4 layers", "95 % interval", "decode at 16", "error"),
        "head, of a token's bytes",
    ):
        assert part in done.stdout
    assert json.loads(out.read_text())["choice"]["check"]["layers"] == 4
    assert not list(folder.iterdir())


def test_bad_input_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESKSIDE_BENCH_DIR", str(tmp_path / "cache"))
    refused("predict", "no-such-preset", part="no-such-preset")
    refused("predict", "tiny-moe", "--layers", "four", part="--layers four")
    refused("predict", "tiny-moe", "--layers", "4", part="--layers 4")
    refused("predict", "tiny-moe", "--depths", "9000", part="tiny-moe has a context of 8192")
    refused("predict", "tiny-moe", "--out", tmp_path / "no" / "x", part="--out")
    assert not (tmp_path / "cache").exists()


def test_bench_with_a_preset_predicts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DESKSIDE_BENCH_DIR", str(folder))
    arguments = ["bench", "--preset", "tiny-llama", "--layers", "1,2", "--runs", "2", "-t", "1"]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0 and "predicted" in done.stdout, done.output
    refused("bench", "--preset", "no-such-preset", part="no-such-preset")
    refused("bench", "--layers", "1,2", part="--preset")
    refused("bench", "--preset", "tiny-llama", "--vs", "http://x", part="--vs")
    refused("bench", "--preset", "tiny-llama", "-ctk", "f16", "-ctv", "q8_0", part="one type")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"depths": (64, 70)}, "--depths 64,70"),
        ({"depths": (0,)}, "--depths 0"),
        ({"depths": ()}, "--depths 0"),
        ({"repeats": 1}, "--repeats 1"),
        ({"generate": 1}, "--generate 1"),
        ({"kv": "q3"}, "--kv q3"),
        ({"isa": "z80"}, "--isa z80"),
        ({"threads": -2}, "-t/threads is -2"),
    ],
)
def test_options_are_checked(values: dict[str, Any], said: str) -> None:
    with pytest.raises(DesksideError, match=said):
        PredictOptions(**values)
