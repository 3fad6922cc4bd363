"""How memory for weights is taken: page sizes and NUMA nodes as options, and what they refuse."""

from __future__ import annotations

import errno
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deskside import _native
from deskside.cli import app as cli
from deskside.engine import LLM
from deskside.engine.config import EngineConfig
from deskside.errors import DesksideError
from deskside.machine import pages
from deskside.machine.pages import Node
from tests.models import tiny

IDS = list(range(100, 120))


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Files of a kernel with 10 reserved pages of 2 MiB, 6 of them free, and of two nodes."""
    monkeypatch.setattr(pages, "SYS", tmp_path)
    monkeypatch.setattr(pages, "PROC", tmp_path)
    files = {
        "kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "10",
        "kernel/mm/hugepages/hugepages-2048kB/free_hugepages": "8",
        "kernel/mm/hugepages/hugepages-2048kB/resv_hugepages": "2",
        "kernel/mm/transparent_hugepage/enabled": "always [madvise] never",
        "devices/system/node/has_memory": "0-1,4",
        "devices/system/node/node0/cpulist": "0-3,8-11",
        "devices/system/node/node0/meminfo": "Node 0 MemTotal: 8 kB\nNode 0 MemFree: 7 kB",
        "devices/system/node/node4/cpulist": "",
        "self/status": "Name:\tx\nMems_allowed_list:\t0,2-7",
        "sys/kernel/numa_balancing": "1",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return tmp_path


def test_what_the_kernel_tells_is_read(system: Path) -> None:
    pool = pages.reserved("2MiB")
    assert pool is not None and (pool.size, pool.total, pool.free) == (2 << 20, 10, 6)
    assert pages.reserved("1GiB") is None
    assert pages.nodes() == [Node(0, (0, 1, 2, 3, 8, 9, 10, 11), 7 << 10), Node(4, (), 0)]
    assert pages.transparent() == "madvise" and pages.numa_balancing() is True
    assert pages.spread("interleave") == ([0, 4], "") and pages.spread("none") == ([], "")
    (system / "devices/system/node/has_memory").write_text("0\n")
    numbers, note = pages.spread("interleave")
    assert not numbers and "one NUMA node" in note
    (system / "devices/system/node/has_memory").unlink()
    assert "no NUMA nodes" in pages.spread("interleave")[1] and pages.nodes() == []


def test_a_system_that_tells_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(pages, "SYS", tmp_path)
    monkeypatch.setattr(pages, "PROC", tmp_path)
    assert pages.reserved("2MiB") is None and pages.nodes() == []
    assert pages.transparent() == "" and pages.numa_balancing() is None


def test_missing_pages_say_what_to_write_where(system: Path) -> None:
    pages.need_reserved("2MiB", 6 * (2 << 20))
    says = "pages needed: 7, free: 6; as root: echo 11 > "
    with pytest.raises(DesksideError, match=says + r".*hugepages-2048kB/nr_hugepages$"):
        pages.need_reserved("2MiB", 6 * (2 << 20) + 1)
    with pytest.raises(DesksideError, match="this system has no pages of that size"):
        pages.need_reserved("1GiB", 1)
    large = system / "kernel/mm/hugepages/hugepages-1048576kB"
    large.mkdir()
    for name in ("nr", "free", "resv"):
        (large / f"{name}_hugepages").write_text("0\n")
    with pytest.raises(DesksideError, match=r"echo 3 > .*boot with hugepagesz=1G hugepages=3$"):
        pages.need_reserved("1GiB", (2 << 30) + 1)
    with pytest.raises(DesksideError, match=r"--huge-pages 2MiB: pages needed: "):
        LLM(tiny("tiny-dense", "F32"), huge_pages="2MiB")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"huge_pages": "2mib"}, "--huge-pages 2mib: choose one of auto, off, 2MiB, 1GiB"),
        ({"huge_pages": None}, "huge_pages is None; expected text"),
        ({"numa": "distribute"}, "--numa distribute: choose one of none, interleave"),
        ({"numa": 1}, "numa is 1; expected text"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(DesksideError, match=re.escape(says)):
        EngineConfig(**options)


def test_no_option_changes_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tiny()
    plain = LLM(path).logits(IDS)
    np.testing.assert_array_equal(LLM(path, huge_pages="off").logits(IDS), plain)
    # as on a machine of two nodes: the kernel takes what there is of them
    monkeypatch.setattr(pages, "nodes", lambda: [Node(0, (0,), 1), Node(1, (1,), 1)])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if _native.Arena(1, "auto", [0, 1]).nodes_error else "error")
        np.testing.assert_array_equal(LLM(path, numa="interleave").logits(IDS), plain)


@pytest.mark.parametrize("name", list(pages.RESERVED))
def test_reserved_pages(name: str) -> None:
    """Where an administrator has reserved some: the same logits, and all are given back."""
    pool = pages.reserved(name)
    if pool is None or pool.free * pool.size < 16 << 20:
        pytest.skip(f"no {name} pages are reserved here")
    llm = LLM(tiny(), huge_pages=name)
    during = pages.reserved(name)
    assert during is not None and during.free < pool.free
    np.testing.assert_array_equal(llm.logits(IDS), LLM(tiny()).logits(IDS))
    del llm
    assert pages.reserved(name) == pool


def test_pages_that_are_refused_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look and the taking others may have had them."""
    monkeypatch.setattr(pages, "need_reserved", lambda *_: None)
    pool = pages.reserved("1GiB")
    if pool is not None and pool.free:
        pytest.skip("they are there")
    with pytest.raises(DesksideError, match=r"the reserved pages are not there \(--huge-pages 1G"):
        LLM(tiny(), huge_pages="1GiB")


def test_a_forbidden_policy_is_a_note(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert "CAP_SYS_NICE" in pages.not_spread(errno.EPERM)
    assert "no NUMA" in pages.not_spread(errno.ENOSYS)
    assert "EINVAL" in pages.not_spread(errno.EINVAL)
    monkeypatch.setattr(pages, "nodes", lambda: [Node(0, (0,), 1), Node(4095, (), 1)])
    if _native.Arena(1, "auto", [4095]).nodes_error:
        monkeypatch.setattr(pages, "nodes", lambda: [Node(4094, (0,), 1), Node(4095, (), 1)])
        with pytest.warns(UserWarning, match="memory is taken as usual"):
            LLM(tiny(), numa="interleave").logits(IDS)
    monkeypatch.setattr(pages, "nodes", lambda: [Node(0, (0,), 1)])
    words = ["run", "-m", str(tiny()), "-p", "x", "-n", "2", "--numa", "interleave"]
    monkeypatch.setattr(sys, "argv", ["deskside", *words])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 0
    note = "note: --numa interleave: there is one NUMA node; memory is taken as usual\n"
    assert note in capfd.readouterr().err


def test_native_arguments_are_checked() -> None:
    for bad in (
        lambda: _native.Arena(1, "4KiB"),
        lambda: _native.Arena(1, "auto", [-1]),
        lambda: _native.Arena(1, "auto", [4096]),
        lambda: _native.Reader(1 << 20, 0),
        lambda: _native.Reader(1, 1),
        lambda: _native.Reader(1 << 20, 1, "auto", [], [-1]),
        lambda: _native.Reader(1 << 20, 1).read(1, 0),
        lambda: _native.barrier_seconds(0),
        lambda: _native.barrier_seconds(1, float("nan")),
        lambda: _native.compute_limit(0, floats=True),
    ):
        with pytest.raises(ValueError, match=r"\S"):
            bad()
    cores = os.sched_getaffinity(0)
    assert _native.Reader(1 << 20, 2, "off").read(2, 1, sorted(cores)) > 0
    assert os.sched_getaffinity(0) == cores
    for isa, supported in _native.instruction_sets():
        if supported:
            assert _native.compute_limit(1, isa, 1, True) > 0


def test_options_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    """What is not reserved is left out, with the reason."""
    from tools import memory_options

    words = [str(tiny("tiny-dense", "F32")), "--rounds", "1", "--tokens", "3", "--threads", "1"]
    assert memory_options.main(words) == 0
    out = capsys.readouterr().out
    assert "| auto | none |" in out.splitlines()[2] and "| off | none |" in out
    assert "+0.0 %" in out.splitlines()[2]
