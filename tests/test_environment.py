"""What a record says of the system around an engine; what is not known is said to be unknown."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskside.bench.record import Record
from deskside.bench.report import environment as report
from deskside.machine import environment, watch
from deskside.machine.environment import Gpu, Modules
from tests.records import make_record

REPORTS = Path(__file__).parents[1] / "docs" / "reports"


def udev(*devices: dict[str, object]) -> str:
    lines = ["I:1", "E:ID_VENDOR=A vendor"]
    for i, device in enumerate(devices):
        lines += [f"E:MEMORY_DEVICE_{i}_{key}={value}" for key, value in device.items()]
    return "\n".join([*lines, "E:MEMORY_ARRAY_NUM_DEVICES=4", ""])


def test_memory_modules_are_read_from_udev(tmp_path: Path) -> None:
    def module(channel: str) -> dict[str, object]:
        return {
            "SIZE": 64 << 30,
            "TYPE": "DDR5",
            "SPEED_MTS": 6400,
            "CONFIGURED_SPEED_MTS": 6000,
            "BANK_LOCATOR": f"P0 CHANNEL {channel}",
            "LOCATOR": "DIMM 0",
        }

    path = tmp_path / "id"
    path.write_text(udev(module("A"), module("B"), {"SIZE": "", "TYPE": "Unknown"}, module("B")))
    assert environment.modules(path) == Modules(3, 192 << 30, "DDR5", 6000, 2)
    path.write_text(udev({"SIZE": 16 << 30}))
    assert environment.modules(path) == Modules(1, 16 << 30, None, None, None)
    path.write_text(udev())
    assert environment.modules(path) is None
    assert environment.modules(tmp_path / "none") is None


@given(st.text())
def test_any_udev_file_is_read(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("udev") / "id"
    path.write_text(f"E:MEMORY_DEVICE_0_SIZE=1\nE:MEMORY_DEVICE_{text}", encoding="utf-8")
    found = environment.modules(path)
    assert found is None or found.count >= 1


def test_a_container_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    assert environment.container(tmp_path) == "none seen"
    (tmp_path / ".dockerenv").touch()
    assert environment.container(tmp_path) == "docker, image unknown"
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.containerenv").touch()
    assert environment.container(tmp_path) == "podman, image unknown"
    (tmp_path / "run/.containerenv").write_text('engine="podman-5"\nimage="docker.io/x:1"\n')
    assert environment.container(tmp_path) == "podman, image docker.io/x:1"


def test_the_commit_is_that_of_the_package_alone(tmp_path: Path) -> None:
    """A virtual environment in a checkout of something else has another commit than the package."""
    git = ("git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=b")
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert environment.commit(package) is None
    (tmp_path / "other").write_text("")
    for words in (("init", "-q"), ("add", "other"), ("commit", "-q", "-m", "x")):
        subprocess.run([*git, *words], check=True)
    assert environment.commit(package) is None
    for words in (("add", "."), ("commit", "-q", "-m", "y")):
        subprocess.run([*git, *words], check=True)
    head = environment.commit(package)
    assert head is not None and len(head) == 40
    (package / "__init__.py").write_text("1")
    assert environment.commit(package) == f"{head} (changed)"


def test_this_machine_is_described() -> None:
    host = watch.describe()
    assert host.cpu and host.memory > 0 and host.container
    again = Record(workload={}, targets={}, machine=host)
    assert json.loads(json.dumps(report.table(again).rows))


def rows(record: Record) -> dict[str, str]:
    return {row[0]: row[1] for row in report.table(record).rows}


def test_the_table_says_all_that_is_known() -> None:
    record = make_record()
    record.commit, record.compiler = "ab" * 20, "GCC 14"
    record.machine.gpus = [Gpu("A card", "nvidia 580", 96 << 30), Gpu("AMD 0x1", None)]
    record.machine.modules = Modules(12, 768_000_000_000, "DDR5", 6400, 12)
    record.machine.distribution, record.machine.container = "Debian 13", "none seen"
    found = rows(record)
    assert found["memory modules"] == "12, 768.00 GB together, DDR5, 6,400 MT/s, 12 channels"
    assert found["GPU"] == "A card, 103.08 GB, AMD 0x1"
    assert found["GPU driver"] == "nvidia 580, unknown"
    assert (
        found["runtime"].startswith("deskside 0.1.0, commit abab") and "GCC 14" in found["runtime"]
    )
    assert found["quant types"] == "IQ4_NL 4.00 GB, Q8_0 800.00 MB"
    assert found["context"] == "32,768 tokens" and "slice.gguf" in found["command line"]
    record.machine.gpus = []
    assert rows(record)["GPU"] == rows(record)["GPU driver"] == "none"


def test_what_old_records_do_not_tell_is_unknown() -> None:
    for path in REPORTS.glob("*.json"):
        if "runs" in json.loads(path.read_text()):
            found = rows(Record.load(path))
            assert found["memory modules"] == found["GPU"] == found["container"] == "unknown"
            assert "commit unknown" in found["runtime"] and found["CPU"] != "unknown"


def test_each_side_has_rows_of_its_own() -> None:
    found = rows(make_record(sides=("A", "B")))
    assert {"engine, A", "engine, B", "quant types, A", "context, B"} <= found.keys()
