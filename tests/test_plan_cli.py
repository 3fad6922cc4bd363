"""`deskside plan` as a command: its outputs, what it emits, its refusals."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskside.errors import DesksideError
from deskside.machine import descriptions as machines
from deskside.machine.descriptions import load_machine, store, this_machine
from deskside.machine.devices import Efficiency, Figure, Machine
from deskside.plan import Plan, make_plan
from deskside.plan.emit import KINDS, emit
from deskside.plan.rules import Rules, parse_gpu_layers, parse_overrides, parse_split
from tests.commands import command
from tests.models import tiny
from tests.plans import machine, memory_of, options, tape_of

BOX = "epyc-9175f-1x96gb"


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return command(capsys, "plan", *words)


def test_the_table_of_the_reference_box(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--preset", "qwen3.5-397b-a17b", "--machine", BOX, "--cpu-moe", "-c", "16384")
    code, out, _ = run(capsys, *words, "--tensor-type", "^output=Q8_0")
    assert code == 0
    assert "blk.*.ffn_*_exps -> cpu: --cpu-moe" in out
    assert re.search(r"22\.5 tok/s published .* 27 % of this plan's roofline", out)
    assert re.search(r"decode at 0 +\d+\.\d +82\.6", out)
    assert "assumed" in out


def test_json_says_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(
        capsys, "-m", str(tiny()), "--device", "emu0:8MiB,emu1:6MiB", "--json", "-c", "256"
    )
    values = json.loads(out)
    assert code == 0 and values["fits"] and values["version"] == 1
    assert [d["name"] for d in values["devices"]] == ["cpu", "emu0", "emu1"]
    for d in values["devices"]:
        parts = sum(d["weights"].values()) + d["kv"] + d["recurrent"] + d["buffers"] + d["margin"]
        parts += d["offloaded_experts"]
        assert parts == d["total"] == d["memory"] - d["free"]
    assert set(values["placement"].values()) <= {"cpu", "emu0", "emu1"}
    assert sum(g["count"] for g in values["groups"]) == len(values["placement"])


def test_the_picture_is_xml_with_all_devices(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    svg = tmp_path / "plan.svg"
    code, _, _ = run(
        capsys, "--preset", "qwen3.5-397b-a17b", "--machine", "epyc-9175f-2x96gb", "--svg", str(svg)
    )
    root = ET.parse(svg).getroot()
    fills = {e.get("fill") for e in root.iter("{http://www.w3.org/2000/svg}rect")}
    assert code == 0 and {"#8a8f98", "#0072b2", "#e69f00"} <= fills
    assert "prefers-color-scheme: dark" in svg.read_text() and "http" not in svg.read_text()[60:]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("-m", "none.gguf"), "none.gguf: cannot be read: No such file"),
        (("-m", "a", "--preset", "b"), "give one of them"),
        (("--preset", "gpt"), "choose from"),
        (("--machine", "mars"), "epyc-9175f-1x96gb"),
        (("--device", "cuda0"), "say how much memory"),
        (("--device", "cuda0:0"), "more than 0"),
        (("--device", "tpu0:1GiB"), "expected cudaN"),
        (("--device", "cuda0:1GiB,cuda0:2GiB"), "twice"),
        (("--device", "emu0:1MiB", "--margin", "2MiB"), "nothing is left"),
        (("--emit", "docker"), "podman"),
        (("--out", "x"), "give --emit"),
        (("-c", "999999999"), "more than the model's context"),
        (("-ctk", "q3"), "one of"),
        (("--parallel", "0"), "at least 1"),
        (("-ot", "exps=CUDA0"), "no device cuda0; the devices are cpu"),
        (("-ot", "nix=CPU"), "matches no tensor"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    code, out, err = run(capsys, *words)
    assert code == 2 and not out
    assert says in err and len([x for x in err.splitlines() if "error" in x]) == 1


def test_a_refusal_names_ways_out(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--preset", "qwen3.5-397b-a17b", "--machine", BOX, "-ngl", "40")
    code, out, err = run(capsys, *words)
    assert code == 2 and not out and err.count("enough would be") == 3
    assert re.search(r"cuda0 lacks [\d,]+ bytes", err)
    flags = re.search(r"enough would be: (--n-cpu-moe \d+)", err)
    assert flags is not None
    assert run(capsys, *words, *flags[1].split())[0] == 0
    code, out, _ = run(capsys, *words, "--json")
    assert code == 2 and not json.loads(out)["fits"] and len(json.loads(out)["ways_out"]) == 3


# --- machines -----------------------------------------------------------------------------------


def test_a_measured_machine_is_stored_and_read(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plain = this_machine(2)
    assert not plain.cpu.bandwidth.measured and not plain.efficiency
    from dataclasses import replace

    cpu = replace(plain.cpu, bandwidth=Figure(31e9, "measured 2026-11-24"))
    path = store(Machine(plain.name, 2, (cpu,), {"dense": Efficiency(0.9, 0.5)}, "measured here"))
    assert path == tmp_path / "deskside" / "machine.json"
    again = this_machine(2)
    assert again.cpu.bandwidth == Figure(31e9, "measured 2026-11-24")
    assert again.efficiency == {"dense": Efficiency(0.9, 0.5)}
    assert not again.cpu.compute.measured  # what was assumed is not stored as if it were known
    assert not this_machine(1).cpu.bandwidth.measured  # rates of other threads
    monkeypatch.setattr(machines, "cpu_name", lambda: "another")
    assert not this_machine(2).cpu.bandwidth.measured
    path.write_text("{")
    with pytest.raises(DesksideError, match=r"machine\.json: not JSON"):
        this_machine(2)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[cpu]\ncores = 0", "cpu.cores is 0"),
        ("[cpu]\nbandwidth_gb = -1", "bandwidth_gb is -1"),
        ("[cpu]\nspeed = 1", "cpu: unknown field 'speed'"),
        ("cores = 1", "unknown field 'cores'; the fields are name, cpu"),
        ("[[gpu]]\nname = 'cuda0'", "cuda0.memory is missing"),
        ("[[gpu]]\nname = 'x'\nmemory = '1GB'", "not cudaN"),
        ("[[gpu]]\nmemory = 'much'", "no size"),
        ("[efficiency.dense]\nbytes = 1", "efficiency[...]: field 'macs' is missing"),
        ("[[published]]\npreset = 'x'", "published[0]: field 'engine' is missing"),
        ("x = [", "not TOML"),
    ],
)
def test_bad_machine_files(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "m.toml"
    path.write_text(text)
    with pytest.raises(DesksideError, match=re.escape(says)):
        load_machine(str(path))


# --- what is emitted ----------------------------------------------------------------------------


def flags_of(text: str) -> dict[str, list[str]]:
    words = shlex.split(re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).replace("\\\n", " "))
    found: dict[str, list[str]] = {}
    for flag, value in zip(words[1:], [*words[2:], "-"], strict=True):
        if flag.startswith("-") and not re.fullmatch(r"-\d+", flag):
            found.setdefault(flag, []).append("" if re.match(r"--?[a-z]", value) else value)
    return found


def emitted_rules(text: str) -> Rules:
    flags = flags_of(text)
    return Rules(
        parse_overrides(flags.get("-ot", [])),
        gpu_layers=parse_gpu_layers(flags["-ngl"][0]),
        tensor_split=parse_split(flags.get("--tensor-split", [None])[0]),
    )


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["tiny-moe", "tiny-dense", "tiny-qwen3moe", "tiny-llama"]),
    st.lists(st.floats(2, 20), min_size=1, max_size=3),
    st.sampled_from([(), ("exps=CPU",), (r"blk\.[13]\.ffn=CUDA0", "attn_k=CPU"), ("output=CPU",)]),
)
def test_emitted_rules_give_the_same_placement(
    preset: str, gpus: list[float], override: tuple[str, ...]
) -> None:
    tape, box = tape_of(preset), machine(100, *gpus)
    try:
        plan = make_plan(
            tape, box, Rules(parse_overrides(override)), options(256), memory_of(preset)
        )
    except DesksideError:
        return
    for kind in ("llama-server", "ik-llama-server"):
        text = emit(plan, kind, "/models/a b.gguf")[""]
        again = make_plan(tape, box, emitted_rules(text), options(256), memory_of(preset))
        assert again.placement == plan.placement
        assert all("," not in rule for rule in flags_of(text).get("-ot", []))


def reference_plan(**more: object) -> Plan:
    rules = Rules(cpu_moe=True)
    return make_plan(
        tape_of("qwen3.5-397b-a17b"),
        load_machine("epyc-9175f-2x96gb"),
        rules,
        options(4096, **more),
    )


def test_emitted_lines_are_readable() -> None:
    found = flags_of(emit(reference_plan(parallel=2), "llama-server", "m.gguf")[""])
    assert found["-ot"] == ["ffn_(gate|up|down)_exps=CPU"]
    assert found["-c"] == ["8192"] and found["-np"] == ["2"] and found["-ngl"] == ["61"]
    assert found["--device"] == ["CUDA0,CUDA1"]


def test_emulated_devices_are_ours_alone() -> None:
    from deskside.machine.devices import choose_devices

    box = choose_devices(machine(100), ["emu0:20MiB"], 0)
    plan = make_plan(tape_of("tiny-moe"), box, Rules(), options(64))
    with pytest.raises(DesksideError, match="deskside only"):
        emit(plan, "llama-server", "m.gguf")


def test_the_systemd_unit_is_valid(tmp_path: Path) -> None:
    tool = shutil.which("systemd-analyze")
    if tool is None:
        pytest.skip("systemd-analyze is not installed")
    (text,) = emit(reference_plan(), "systemd", "/models/100% $mine.gguf").values()
    assert "deskside serve` comes with a later version" in text
    unit = tmp_path / "deskside.service"
    unit.write_text(text.replace("/usr/local/bin/deskside", "/bin/true"))
    result = subprocess.run(
        [tool, "verify", str(unit)], capture_output=True, text=True, check=False
    )
    own = [x for x in result.stderr.splitlines() if "deskside" in x]
    assert result.returncode == 0 and not own, result.stderr


def test_the_quadlet_is_valid(tmp_path: Path) -> None:
    (unit,) = emit(reference_plan(), "podman", "/models/m.gguf").values()
    for line in (
        "AddDevice=nvidia.com/gpu=all", "Volume=/models:/models:ro,z", "ShmSize=8g",
        "PublishPort=127.0.0.1:8080:8080",
    ):  # fmt: skip
        assert line in unit.splitlines()
    (health,) = (x for x in unit.splitlines() if x.startswith("HealthCmd="))
    assert not health.endswith('"')  # quadlet takes it off
    tool = next(
        (p for p in map(Path, ("/usr/libexec/podman/quadlet", "/usr/lib/podman/quadlet"))
         if p.exists()), None,
    )  # fmt: skip
    if tool is None:
        pytest.skip("podman's quadlet generator is not installed")
    (tmp_path / "deskside.container").write_text(unit)
    result = subprocess.run(
        [str(tool), "-dryrun", "-user"], capture_output=True, text=True, check=False,
        env={"QUADLET_UNIT_DIRS": str(tmp_path)},
    )  # fmt: skip
    assert result.returncode == 0 and "podman run" in result.stdout, result.stderr
    (started,) = (x for x in result.stdout.splitlines() if x.startswith("ExecStart="))
    words = shlex.split(started)
    assert f"HealthCmd={words[words.index('--health-cmd') + 1]}" == health


def test_everything_is_emitted(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for kind in KINDS:
        code, out, _ = run(
            capsys, "--preset", "qwen3.5-397b-a17b", "--machine", BOX, "--emit", kind
        )
        assert code == 0 and "qwen3.5-397b-a17b.gguf" in out
    run(capsys, "--preset", "tiny-moe", "--emit", "podman", "--out", str(tmp_path))
    assert {p.name for p in tmp_path.iterdir()} == {"deskside.container"}
