"""A plan is what runs: options and flags over emulated devices, and what is said of bad ones."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deskside import LLM, SamplingParams
from deskside.backends.native.program import CpuBackend
from deskside.engine.config import EngineConfig
from deskside.engine.placing import place
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.gguf.roles import Role, role
from deskside.lowering.sections import cut_by_device, hops
from deskside.machine import pages
from deskside.machine.descriptions import this_machine
from deskside.models import build_tape
from tests.commands import deskside, refused
from tests.models import PRESETS, tiny
from tests.torch_devices import PlacedBackend

pytestmark = pytest.mark.external

TWO = "emu0:300MiB,emu1:300MiB"
GREEDY = SamplingParams(max_tokens=10, temperature=0, ignore_eos=True)
EXACT: dict[str, Any] = {"ctk": "f32", "ctv": "f32", "ubatch": 32}
# The article's launch: layers dealt to two GPUs by regex, the experts that are left on the CPU.
ARTICLE = [r"blk\.(0|1)\.ffn_.*_exps\.=CUDA0", r"blk\.(2)\.ffn_.*_exps\.=CUDA1,exps=CPU"]


def emulated(rules: list[str]) -> list[str]:
    return [r.replace("CUDA", "EMU") for r in rules]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "options",
    [
        {"devices": "emu0:300MiB"},
        {"devices": TWO, "gpu_layers": "all", "tensor_split": "3,1"},
        {"devices": [*TWO.split(",")], "gpu_layers": 2, "main_gpu": 1},
        {"devices": TWO, "override_tensor": [r"blk\.1\.=emu1", "norm=emu0"]},
    ],
    ids=["auto", "split", "two layers", "rules"],
)
def test_any_plan_gives_the_tokens_of_the_cpu(preset: str, options: dict[str, Any]) -> None:
    path = tiny(preset, "F32")
    expected = LLM(path, **EXACT).generate("It was a dark night", GREEDY)
    llm = LLM(path, **options, **EXACT)
    assert llm.plan is not None and isinstance(llm.backend, PlacedBackend)
    assert llm.generate("It was a dark night", GREEDY).tokens == expected.tokens


def test_the_article_runs_as_it_was_typed() -> None:
    path = tiny("tiny-moe", "F32")
    options: dict[str, Any] = {"gpu_layers": 99, "override_tensor": emulated(ARTICLE)}
    llm = LLM(path, devices=TWO, **options, **EXACT)
    assert llm.plan is not None
    placement = llm.plan.placement
    assert placement["blk.1.ffn_up_exps.weight"] == "emu0"
    assert placement["blk.2.ffn_down_exps.weight"] == "emu1"
    assert placement["blk.3.ffn_gate_exps.weight"] == "cpu"
    expected = LLM(path, **EXACT).generate("a b c", GREEDY).tokens
    assert llm.generate("a b c", GREEDY).tokens == expected


@pytest.mark.parametrize("kv", ["f16", "q8_0"])
@pytest.mark.parametrize("options", [{"cpu_moe": True}, {}, {"gpu_layers": 2}])
def test_devices_hold_what_the_plan_says(kv: str, options: dict[str, Any]) -> None:
    llm = LLM(tiny("tiny-moe"), devices=TWO, ctx=512, ubatch=64, ctk=kv, ctv=kv, **options)
    assert llm.plan is not None and isinstance(llm.backend, PlacedBackend)
    usage = {u.device.name: u for u in llm.plan.usage}
    for name in llm.plan.used:
        if name == "cpu":
            continue
        meter = llm.backend.devices[name].meter
        gc.collect()
        kept = usage[name].held - usage[name].buffers
        assert meter.live == pytest.approx(kept, rel=0.02)
        meter.peak = meter.live
    llm.generate("word " * 200, GREEDY)
    for name in llm.plan.used:
        if name != "cpu":
            assert llm.backend.devices[name].meter.peak <= usage[name].held


def test_experts_stream_and_are_cached_as_the_plan_says() -> None:
    path = tiny("tiny-moe", "F32")
    expected = LLM(path, **EXACT).generate("word " * 90, GREEDY).tokens
    options: dict[str, Any] = {"devices": "emu0:300MiB", "cpu_moe": True, **EXACT}
    assert LLM(path, stream_experts="auto", **options).ubatch > EXACT["ubatch"]  # its chunk
    llm = LLM(path, stream_experts=24, expert_cache="2MiB", **options)
    assert llm.plan is not None and isinstance(llm.backend, PlacedBackend)
    assert llm.ubatch == EXACT["ubatch"]
    usage = llm.plan.usage[1]
    assert usage.reserved > 2 << 20
    meter = llm.backend.devices["emu0"].meter
    gc.collect()
    meter.peak = meter.live
    assert llm.generate("word " * 90, GREEDY).tokens == expected
    metrics = llm.backend.expert_metrics
    assert metrics.streamed > 0 and 0 < metrics.hit_rate < 1 and metrics.promotions > 0
    assert meter.peak <= usage.held
    assert llm.offload_metrics() == metrics


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"stream_experts": "auto"}, "--stream-experts does nothing: no routed expert"),
        ({"expert_cache": "1MiB"}, "--expert-cache does nothing: no routed expert"),
        ({"cpu_moe": True, "stream_experts": "auto", "ctx": 8}, "no batch of up to 8 tokens"),
    ],
)
def test_an_offload_that_helps_nobody_is_noted(options: dict[str, Any], part: str) -> None:
    llm = LLM(tiny(), devices="emu0:300MiB", **options)
    assert part in llm.notes[0] and llm.plan is not None
    assert not any(u.reserved for u in llm.plan.usage)


@pytest.mark.parametrize("layers", [99, "all"])
def test_all_layers_means_as_much_as_fits(layers: int | str) -> None:
    """The article's third command line: -ngl 99, whatever the card holds."""
    tape = build_tape(GGUF.open(tiny("tiny-moe")))
    launch = place(tape, EngineConfig(devices="emu0:4MiB", gpu_layers=layers), 512, 64)
    assert launch.plan is not None and f"-ngl {layers}: not all" in launch.notes[0]
    for name, device in launch.plan.placement.items():
        if device == "cpu" and role(name) is not Role.EMBEDDING:
            assert str(launch.plan.kinds[name]) in launch.notes[0]
    roomy = place(tape, EngineConfig(devices="emu0:1GiB", gpu_layers=layers), 512, 64)
    assert not roomy.notes and roomy.plan is not None
    on_cpu = {role(name) for name, d in roomy.plan.placement.items() if d == "cpu"}
    assert on_cpu == {Role.EMBEDDING}


def test_a_plan_hops_as_often_as_it_reckons() -> None:
    """The search counts changes of device along the tape; sections are what runs."""
    tape = build_tape(GGUF.open(tiny("tiny-moe")))
    config = EngineConfig(devices="emu0:300MiB", cpu_moe=True)
    plan = place(tape, config, 512, 64).plan
    assert plan is not None
    count, _ = hops(cut_by_device(tape, plan.placement), lambda v: 4 * v.width)
    layers = 1 + max(op.layer for op in tape.ops)
    assert count == 2 * layers + 1


def test_the_cpu_alone_stays_the_native_backend(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))  # no measured machine with a GPU
    monkeypatch.setenv("PATH", str(tmp_path))  # nor an nvidia-smi
    for options in ({}, {"devices": "none"}, {"override_tensor": "exps=CPU"}, {"cpu_moe": True}):
        llm = LLM(tiny(), **options)
        assert isinstance(llm.backend, CpuBackend) and llm.plan is None and not llm.notes
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        llm = LLM(tiny(), gpu_layers=99, tensor_split="1", main_gpu=0)
    [note] = llm.notes
    assert note.endswith("these change nothing: -ngl, --tensor-split, --main-gpu")
    llm = LLM(tiny(), override_tensor=["blk.0=CUDA0,blk.1=CPU"])
    assert llm.notes == ["there is no GPU to use; these change nothing: -ot blk.0=cuda0"]


def test_gpus_that_the_driver_tells_of_are_planned_for(tmp_path: Path, monkeypatch: Any) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 24000\necho 0\necho 96000\n")
    tool.chmod(0o755)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin")
    assert this_machine(2).gpus == ()  # hidden, as for all tests
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    found = this_machine(2)
    assert [(d.name, d.memory) for d in found.gpus] == [
        ("cuda0", 24000 << 20), ("cuda1", 96000 << 20),
    ]  # fmt: skip
    tape = build_tape(GGUF.open(tiny()))
    assert not place(tape, EngineConfig(margin="1MiB"), 512, 64).over_devices
    assert place(tape, EngineConfig(gpu_layers=99), 512, 64).over_devices
    with pytest.raises(DesksideError, match="torch sees 0 CUDA devices"):
        LLM(tiny(), gpu_layers=99)


LOCKED = """
import sys
from deskside import LLM
def field(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(l for l in lines if l.startswith(name)).split()[1])
llm = LLM(sys.argv[1], ctx=512, mlock=True)
print(field("VmLck"), llm.backend.nbytes, llm.generate("a b", __import__("deskside").SamplingParams(
    max_tokens=4, temperature=0)).tokens)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may lock this much everywhere")
def test_mlock_locks_what_the_model_takes() -> None:
    path = tiny()
    done = subprocess.run(
        [sys.executable, "-c", LOCKED, str(path)], capture_output=True, text=True, timeout=120
    )
    if "the system refuses" in done.stderr:
        pytest.skip("a container without CAP_IPC_LOCK")
    assert done.returncode == 0, done.stderr
    locked, held, tokens = done.stdout.split(maxsplit=2)
    assert int(locked) >= int(held)
    params = SamplingParams(max_tokens=4, temperature=0)
    assert tokens.strip() == str(LLM(path, ctx=512).generate("a b", params).tokens)


def test_what_may_not_be_locked_is_refused_before_it_is_read(monkeypatch: Any) -> None:
    monkeypatch.setattr(pages, "memlock_limit", lambda: 1 << 20)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(GGUF, "check_values", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(DesksideError, match=r"--mlock: .* may lock 1,048,576; raise"):
        LLM(tiny(), mlock=True)


def test_no_mmap_reads_the_embedding_and_counts_it() -> None:
    mapped, read = (LLM(tiny(), devices="none", no_mmap=no) for no in (False, True))
    prompt = mapped.tokenize("one two three")
    assert (mapped.logits(prompt) == read.logits(prompt)).all()
    assert isinstance(read.file.raw("token_embd.weight").base, type(None))
    tape, config = read.tape, read.config
    for no in (False, True):
        plan = place(tape, replace(config, no_mmap=no), 512, 64).plan
        assert plan is not None
        assert (plan.usage[0].mapped == 0) == no


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"override_tensor": "nothing=CPU"}, "-ot nothing=cpu: matches no tensor"),
        ({"override_tensor": "(=CPU"}, "-ot (: not a regex"),
        ({"override_tensor": "exps=EMU0"}, "there is no device emu0"),
        ({"devices": "emu0:1GiB", "override_tensor": "exps=CUDA0"}, "the devices are cpu, emu0"),
        ({"devices": "emu0:1GiB", "gpu_layers": "some"}, "-ngl some"),
        ({"devices": "emu0:1GiB", "n_cpu_moe": -1}, "--n-cpu-moe -1"),
        ({"devices": "emu0:1GiB", "margin": "2GiB"}, "nothing is left"),
        ({"devices": "emu0:4MiB", "gpu_layers": 3}, "emu0 lacks"),
        ({"devices": "emu0:1GiB", "backend": "reference"}, "--backend reference"),
        ({"devices": "emu0:1GiB", "stream_experts": "0"}, "--stream-experts 0"),
        ({"devices": "emu0:1GiB", "stream_experts": "x"}, "--stream-experts x"),
        ({"devices": "emu0:1GiB", "expert_cache": "x"}, "--expert-cache 'x'"),
        ({"devices": "emu0:1GiB", "cpu_moe": True, "expert_cache": "1KiB"}, "holds no expert"),
        ({"devices": "emu0:1GiB", "cpu_moe": True, "expert_cache": "2GiB"}, "emu0 lacks"),
        ({"devices": 3}, "devices is 3"),
        ({"cpu_moe": 1}, "cpu_moe is 1"),
        ({"n_cpu_moe": True}, "n_cpu_moe is True"),
        ({"placement": {}}, "unknown option placement"),
    ],
)
def test_bad_options_are_refused_before_a_weight_is_read(
    options: dict[str, Any], part: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(GGUF, "check_values", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(DesksideError, match=re.escape(part)) as caught:
        LLM(tiny(), **options)
    assert "\n" not in str(caught.value)


# ---- the command line ---------------------------------------------------------------------------


def test_run_over_devices_answers_as_the_cpu_does() -> None:
    flags = ["run", "-m", str(tiny("tiny-moe", "F32")), "-p", "Once upon", "--no-chat", "-n", "8"]
    flags += ["--temp", "0", "--ignore-eos", "-ctk", "f32", "-ctv", "f32"]
    alone = deskside(*flags)
    spread = deskside(*flags, "-dev", "emu0:300MiB", "-cmoe", "-ngl", "99")
    assert alone.returncode == spread.returncode == 0, spread.stderr
    assert spread.stdout == alone.stdout


def test_run_shows_what_became_of_offloaded_experts() -> None:
    done = deskside(
        *("run", "-m", str(tiny()), "-p", "word " * 90, "--no-chat", "-n", "8", "--ignore-eos"),
        *("-dev", "emu0:300MiB", "-cmoe", "--stream-experts", "24", "--expert-cache", "2MiB"),
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rb"offloaded experts: \d+ % of decode's, \d+ streamed", done.stderr)


def test_run_says_what_a_rule_lacks() -> None:
    model = ["run", "-m", str(tiny()), "-p", "x"]
    refused(*model, "-ot", "nope=CPU", part="matches no tensor")
    refused(*model, "-dev", "emu0:4MiB", "-ngl", "3", part="emu0 lacks")
    refused(*model, "--device", "vulkan0", part="--device vulkan0")
