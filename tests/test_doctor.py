"""`deskside doctor`: it measures, shows, advises, and keeps figures for the planner."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from deskside.cli import doctor
from deskside.machine import limits as measured
from deskside.machine import pages, rates
from deskside.machine.descriptions import machine_file, store, this_machine
from deskside.machine.devices import Efficiency, Figure, Machine, assumed_gpu
from deskside.machine.limits import CpuLimits, as_measured, measure_cpu, thread_counts
from deskside.machine.pages import Node
from deskside.machine.system import usable_cores
from tests.commands import command

MiB = 1 << 20


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Little is read, and this machine's own file is left alone."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(rates, "bandwidth_bytes", lambda free: 16 * MiB)
    monkeypatch.setattr(measured, "BARRIER_SECONDS", 0.01)


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    return command(capsys, "doctor", *words)


def limits(**changes: Any) -> CpuLimits:
    rates = {"off": {1: 10e9, 2: 18e9, 4: 19e9}, "auto": {1: 12e9, 2: 24e9, 4: 24.5e9}}
    return replace(CpuLimits(4, rates, 4e11, 1e11, 1e-6, "avx2", 1 << 30), **changes)


def test_it_tells_measures_and_stores(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys)
    assert code == 0
    for part in (
        "kernels chosen", "scalar", "memory", "cores", "NUMA nodes", "huge pages",
        "read bandwidth in GB/s", "4 KiB pages", "transparent pages", "%*",
        "decode ceiling", "prefill ceiling", "float32", "barrier", "GPUs",
        "recommended", "locked memory", "kept for `deskside plan` in",
    ):  # fmt: skip
        assert part in out, part
    known = this_machine(usable_cores())
    assert known.cpu.bandwidth.measured and known.cpu.compute.measured
    assert known.cpu.handshake.measured and known.cpu.sustained == 1
    assert f"{usable_cores()} thread" in known.cpu.bandwidth.source
    assert "huge pages" in known.cpu.bandwidth.source
    # its shares rest on the rate that is assumed
    assert not known.cpu.float_compute.measured


def test_json_is_json_and_nothing_is_stored_unasked(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--json", "--quick", "--no-store", "-t", "1")
    values = json.loads(out)
    assert code == 0 and values["version"] == 1 and values["stored"] is None
    assert values["threads"] == 1 and list(values["bandwidth"]) == ["auto"]
    assert values["bandwidth"]["auto"]["1"] == values["planner"]["bandwidth"] > 0
    assert values["compute"] > 0 and values["float_compute"] > 0 and values["barrier"] > 0
    assert not machine_file().exists()


def test_what_other_tools_kept_stays(capsys: pytest.CaptureFixture[str]) -> None:
    base = this_machine(usable_cores())
    floats = Figure(5e10, "measured by hand")
    cpu = replace(base.cpu, float_compute=floats, bandwidth=Figure(1e9, "measured once"))
    gpu = replace(assumed_gpu("cuda0", 8 << 30), bandwidth=Figure(1e12, "measured once"))
    shares = {"dense": Efficiency(0.9, 0.5)}
    store(Machine(base.name, base.cores, (cpu, gpu), shares, "measured here"))
    code, out, _ = run(capsys, "--json", "--quick")
    known = this_machine(usable_cores())
    assert code == 0 and json.loads(out)["stored"] == str(machine_file())
    assert known.efficiency == shares and known.efficiency_source == "measured here"
    assert known.cpu.float_compute == floats and known.gpus[0].bandwidth == gpu.bandwidth
    assert known.cpu.bandwidth.value == json.loads(out)["planner"]["bandwidth"]


@pytest.mark.parametrize("damaged", [False, True])
def test_ctrl_c_leaves_the_old_file_whole(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    path = store(this_machine(1))
    if damaged:
        path.write_text("{")
    before = path.read_text()

    def interrupted(*_: Any, **__: Any) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(rates, "compute", interrupted)
        code, _, _ = run(capsys, "--quick")
    assert code == 130
    assert path.read_text() == before and [p.name for p in path.parent.iterdir()] == [path.name]
    code, _, err = run(capsys, "--quick")  # a damaged one is no reason to measure in vain
    assert code == 0 and ("a new one is written" in err) == damaged
    assert this_machine(usable_cores()).cpu.bandwidth.measured


def test_a_cache_folder_that_cannot_be_written_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    code, out, err = run(capsys, "--quick")
    assert code == 2 and "read bandwidth" in out  # what was measured is shown in any case
    assert len([line for line in err.splitlines() if "error" in line]) == 1


def test_no_memory_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "bandwidth_bytes", lambda free: 1 << 50)
    code, out, err = run(capsys, "--quick")
    assert code == 2 and not out and "too little free memory to measure" in err


def test_thread_counts() -> None:
    assert [thread_counts(n) for n in (1, 2, 3, 4, 6, 16)] == [
        [1], [1, 2], [1, 2, 3], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16]
    ]  # fmt: skip


def test_pages_that_are_not_there_are_named() -> None:
    """Reserved pages are measured where the system has enough of them, and else skipped."""
    said: list[tuple[str, int, int]] = []
    found = measure_cpu(2, nbytes=16 * MiB, progress=lambda *step: said.append(step))
    assert {"off", "auto"} <= found.bandwidth.keys()
    assert found.bandwidth.keys() | found.skipped.keys() == {"off", "auto", "2MiB", "1GiB"}
    assert all(list(rates) == [1, 2] for rates in found.bandwidth.values())
    assert found.taken == found.bandwidth["auto"][2] <= found.best
    done = [d for _, d, _ in said]
    total = said[-1][2]
    assert done == sorted(done) and done[-1] == total == said[0][2]


def test_nodes_are_measured_in_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Node 4095 is not there: its memory cannot be had, its threads can (they are node 0's)."""
    cpu = min(os.sched_getaffinity(0))
    nodes = [Node(0, (cpu,), 1 << 40), Node(4095, (cpu,), 1 << 40)]
    monkeypatch.setattr(pages, "nodes", lambda: nodes)
    before = os.sched_getaffinity(0)
    found = measure_cpu(1, nbytes=16 * MiB)
    assert os.sched_getaffinity(0) == before
    if not found.nodes:
        pytest.skip("this system does not bind memory to nodes")
    assert found.nodes.keys() == {(0, 0), (4095, 0)}
    nodes[0] = replace(nodes[0], free=0)
    assert not measure_cpu(1, nbytes=16 * MiB).nodes


def test_advice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "SYS", tmp_path)
    monkeypatch.setattr(pages, "PROC", tmp_path)
    pool = tmp_path / "kernel/mm/hugepages/hugepages-2048kB"
    pool.mkdir(parents=True)
    for name, count in (("nr", 5), ("free", 3), ("resv", 1)):
        (pool / f"{name}_hugepages").write_text(f"{count}\n")
    thp = tmp_path / "kernel/mm/transparent_hugepage/enabled"
    thp.parent.mkdir(parents=True)
    thp.write_text("always madvise [never]\n")
    text = "\n".join(doctor.advice(limits(skipped={"2MiB": "few"})))
    assert "-t 2: the fewest threads that read 97 %" in text
    assert "as root: echo madvise > " in text
    assert "echo 515 > " in text and "hugepages-2048kB" in text  # 512, and 3 in use

    thp.write_text("[always] madvise never\n")
    rates = {**limits().bandwidth, "2MiB": {1: 13e9, 2: 26e9, 4: 30e9}}
    text = "\n".join(doctor.advice(limits(bandwidth=rates, other_cpu=0.5, huge_share=0.4)))
    assert "other programs kept 0.5 cores busy" in text and "-t 2" not in text
    assert "are on (always); 29 % faster than 4 KiB" in text
    assert "--huge-pages 2MiB: 22 % faster" in text
    assert "only 40 % of the memory came in huge pages" in text

    monkeypatch.setattr(pages, "nodes", lambda: [Node(0, (0,), 1), Node(1, (1,), 1)])
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/numa_balancing").write_text("1\n")
    slow = {"auto": {1: 1e9, 4: 4e9}}
    text = "\n".join(doctor.advice(limits(bandwidth=slow)))
    assert "-t 4 (the default)" in text
    assert "--numa interleave" in text and "echo 0 > /proc/sys/kernel/numa_balancing" in text


def test_a_disturbed_measurement_says_so_in_the_plan() -> None:
    base = this_machine(4)
    quiet, busy = (as_measured(base, limits(other_cpu=n)).cpu for n in (0.02, 1.3))
    assert "other programs" not in quiet.bandwidth.source
    assert busy.bandwidth.source.startswith("measured ")
    assert "4 threads while other programs kept 1.3 cores busy" in busy.compute.source


def test_last_caches_of_all_cores_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every core of some CPUs has a last cache of its own; they are all to be exceeded."""
    for cpu in range(4):
        for index, (level, size, shared) in enumerate(
            ((1, "48K", f"{cpu}"), (3, "32M", f"{cpu // 2 * 2}-{cpu // 2 * 2 + 1}"))
        ):
            folder = tmp_path / f"cpu{cpu}/cache/index{index}"
            folder.mkdir(parents=True)
            for name, value in (("level", level), ("size", size), ("shared_cpu_list", shared)):
                (folder / name).write_text(f"{value}\n")
    monkeypatch.setattr(rates, "CPUS", tmp_path)
    assert rates.last_level_cache() == 64 * MiB
    monkeypatch.setattr(rates, "CPUS", tmp_path / "nothing")
    assert rates.last_level_cache() == 0


# --- devices of torch -----------------------------------------------------------------------------


@pytest.mark.external
def test_a_device_of_torch_is_measured_and_kept(capsys: pytest.CaptureFixture[str]) -> None:
    """On torch's own CPU device: no GPU has seen this."""
    torch = pytest.importorskip("torch")
    from deskside.machine.torch_limits import as_device, cuda_devices, measure_device

    found = measure_device("cuda0", torch.device("cpu"), 8 * MiB)
    for rate in (found.bandwidth, found.pinned, found.pageable, found.back, found.hand_over):
        assert 0 < rate < float("inf")
    device = as_device(found)
    assert device.bandwidth.measured and device.transfer.measured and device.handshake.measured
    assert not device.compute.measured and device.memory == found.memory
    known = as_measured(this_machine(4), limits(), [device])
    store(known)
    again = this_machine(4)
    assert [d.name for d in again.devices] == ["cpu", "cuda0"]
    assert again.gpus[0].transfer.value == pytest.approx(found.pinned)
    assert again.gpus[0].sustained == 1
    if not torch.cuda.is_available():
        assert cuda_devices() == []


@pytest.mark.external
def test_measured_gpus_are_shown_and_stored(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from deskside.machine import torch_limits

    monkeypatch.setattr(doctor, "DRIVERS", ("/",))
    here = torch.device("cpu")
    monkeypatch.setattr(torch_limits, "cuda_devices", lambda: [("cuda0", here), ("cuda1", here)])

    def measure(name: str, device: Any) -> Any:
        if name == "cuda1":
            raise RuntimeError("out of memory\nin detail")
        return real(name, device, 8 * MiB)

    real = torch_limits.measure_device
    monkeypatch.setattr(torch_limits, "measure_device", measure)
    code, out, err = run(capsys, "--quick")
    assert code == 0 and "cuda0" in out and "hand-over" in out
    assert "cuda1 was not measured: out of memory\n" in err
    assert [d.name for d in this_machine(usable_cores()).gpus] == ["cuda0"]
