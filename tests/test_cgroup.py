"""Limits of control groups, on trees of our own in a temporary folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskside.machine import cgroup, system

GIB = 1 << 30


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(cgroup, "ROOT", tmp_path / "root")
    monkeypatch.setattr(cgroup, "SELF", tmp_path / "self")
    (tmp_path / "root").mkdir()
    return tmp_path / "root"


def put(folder: Path, **files: object) -> None:
    """Files of a group; `memory_max` is memory.max."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{text}\n")


def limited(folder: Path) -> None:
    put(folder, cpu_max="150000 100000", memory_max=2 * GIB, memory_current=GIB)
    put(folder, memory_stat="anon 1\nfile 300\nshmem 100")


def unlimited(folder: Path) -> None:
    put(folder, cpu_max="max 100000", memory_max="max", memory_high="max", memory_current=1)


def within(tree: Path, lines: str) -> None:
    (tree.parent / "self").write_text(lines)


@pytest.mark.parametrize(
    ("limits", "path"),
    [
        ("", "/"),  # a container's own view
        ("system.slice/desk.service", "/system.slice/desk.service"),
        ("user.slice", "/user.slice/user-1000.slice/run-1.scope"),
        ("", "/docker/0123"),  # a path of the host that the container does not see
    ],
)
def test_v2_own_group_and_all_above(tree: Path, limits: str, path: str) -> None:
    if "scope" in path:
        unlimited(tree / path.strip("/"))
    limited(tree / limits)
    within(tree, f"0::{path}\n")
    assert cgroup.cpu_quota() == 1.5
    assert cgroup.free_memory() == GIB + 200  # shared memory is not free


def test_the_tightest_limit_counts(tree: Path) -> None:
    limited(tree / "a")
    put(tree / "a/b", cpu_max="50000 100000", memory_max="max", memory_high=3 * GIB)
    put(tree / "a/b", memory_current=2 * GIB + GIB // 2)
    within(tree, "0::/a/b\n")
    assert cgroup.cpu_quota() == 0.5
    assert cgroup.free_memory() == GIB // 2
    assert system.usable_cores() == 1
    assert system.available_memory() <= GIB // 2


def test_v1_has_a_tree_for_every_controller(tree: Path) -> None:
    put(tree / "cpu/x", cpu_cfs_quota_us=250000, cpu_cfs_period_us=100000)
    put(tree / "cpu", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100000)
    put(tree / "memory", memory_limit_in_bytes=(1 << 63) - 4096, memory_usage_in_bytes=9 * GIB)
    put(tree / "memory/y", memory_limit_in_bytes=2 * GIB, memory_usage_in_bytes=2 * GIB)
    put(tree / "memory/y", memory_stat="cache 7\ntotal_cache 500\ntotal_shmem 200")
    within(tree, "5:memory:/y/z\n4:cpu,cpuacct:/x\n1:name=systemd:/q\n0::/u\n")
    assert cgroup.cpu_quota() == 2.5
    assert cgroup.free_memory() == 300


def test_more_used_than_allowed_is_none_free(tree: Path) -> None:
    put(tree, memory_max=GIB, memory_current=2 * GIB, memory_stat="file 10\nshmem 20")
    within(tree, "0::/\n")
    assert cgroup.free_memory() == 0


@pytest.mark.parametrize("text", ["", "garbage", "0::", "::::\n\n", "0::/../..\n"])
def test_without_limits_there_is_none(tree: Path, text: str) -> None:
    unlimited(tree / "elsewhere")
    within(tree, text)
    assert cgroup.cpu_quota() is None
    assert cgroup.free_memory() is None
