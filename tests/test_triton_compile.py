"""The Triton kernels, compiled for GPUs that are not there: nothing spills, nothing outgrows them.

In processes of their own, for this one has Triton's interpreter. About a minute, then cached.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.oracles import need

need.packages("torch", "triton")

from tools.kernels import triton_aot, triton_report  # noqa: E402

TARGETS = {t.name: t for t in triton_aot.TARGETS}
# The first test waits for all of the compiling.
pytestmark = [pytest.mark.external, pytest.mark.timeout(900)]


def compiling(*args: str) -> subprocess.CompletedProcess[str]:
    """Python with these arguments, Triton's compiler on."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[triton_aot.Compiled]:
    path = tmp_path_factory.mktemp("triton") / "compiled.json"
    done = compiling("-m", "tools.kernels.triton_report", "--few", "--json", str(path))
    assert done.returncode == 0, done.stderr[-2000:]
    print(done.stdout)
    return [triton_aot.Compiled(**c) for c in json.loads(path.read_text())]


def test_every_kernel_is_compiled(compiled: list[triton_aot.Compiled]) -> None:
    names = {v.name for v in triton_aot.variants()}
    asked = [(v.name, t.name) for v, t in triton_aot.pairs(few=True)]
    assert [(c.name, c.target) for c in compiled] == asked
    assert {n for n, t in asked if t == "sm_120"} == names
    assert {n for n, t in asked if t == "sm_90"} >= {n for n in names if n.startswith("IQ4_NL")}
    assert len(triton_aot.pairs()) == len(names) * len(TARGETS)


def test_nothing_spills(compiled: list[triton_aot.Compiled]) -> None:
    assert [(c.name, c.target, c.stack) for c in compiled if c.stack] == []


def test_shared_memory_is_there(compiled: list[triton_aot.Compiled]) -> None:
    """A CTA may have all of a multiprocessor's but what the system takes."""
    for c in compiled:
        assert c.shared <= TARGETS[c.target].shared - TARGETS[c.target].reserved, c


# Registers, then instructions a weight: a little above the kernels as they are, so that a compiler
# or an edit that makes them worse is seen (55 a weight was a tile that every warp decoded anew).
LIMITS = {
    "1 row": (208, 20), "2 rows": (255, 21), "3 to 16 rows": (208, 24),
    "16-row tiles": (216, 26), "64-row tiles": (255, 29),
}  # fmt: skip


@pytest.mark.parametrize("kind", LIMITS)
def test_limits_of_matrix_products(compiled: list[triton_aot.Compiled], kind: str) -> None:
    found = [c for c in compiled if c.name.endswith(kind)]
    assert len(found) >= 4
    registers, per_weight = LIMITS[kind]
    for c in found:
        assert c.registers <= registers, c
        # float32 is multiplied as three tf32 products
        assert c.per_weight is not None
        assert c.per_weight <= (60 if c.name.startswith("F32") else per_weight), c


@pytest.mark.parametrize(
    "name,registers",
    [
        ("gated delta net step", 80),
        ("decode attention, f16 cache", 128),
        ("decode attention, q8_0 cache", 216),
        ("attention merge", 128),
    ],
)
def test_limits_of_the_others(
    compiled: list[triton_aot.Compiled], name: str, registers: int
) -> None:
    found = [c for c in compiled if c.name == name]
    assert len(found) == len(TARGETS)
    assert max(c.registers for c in found) <= registers


def test_a_spill_is_seen() -> None:
    """So that no stack means no spill: eight rows of gate and up in one warp cannot fit."""
    code = """
from dataclasses import replace
from tools.kernels import triton_aot as aot
v = next(v for v in aot.variants() if v.name == "IQ4_NL experts gate+up, 1 row")
print(aot.compile_variant(replace(v, constants=v.constants | {"BLOCK_N": 8}), aot.TARGETS[0]).stack)
"""
    done = compiling("-c", code)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 100


def test_the_table_in_the_docs_is_of_these_kernels() -> None:
    """Figures may differ with the compiler's version, kernels and targets may not."""
    text = triton_report.DOC.read_text(encoding="utf-8")
    inside = text.split(triton_report.BEGIN)[1].split(triton_report.END)[0]

    header, _, *lines = inside.strip().splitlines()
    names = [line.split("|")[1].strip() for line in lines]
    assert names == [v.name for v in triton_aot.variants()]
    assert all(f"| {t} registers |" in header for t in TARGETS)


def test_occupancy() -> None:
    sm_90, sm_120 = triton_aot.TARGETS
    assert triton_aot.occupancy_of(sm_90, 32, 0, 4) == (1.0, "threads")
    # 168 registers: 3 CTAs of 4 warps, 12 of 64 warps
    assert triton_aot.occupancy_of(sm_90, 168, 0, 4) == (12 / 64, "registers")
    # 40 KiB and the system's 1: two CTAs in 100 KiB, 8 of 48 warps
    assert triton_aot.occupancy_of(sm_120, 32, 40 << 10, 4) == (8 / 48, "shared memory")
    assert triton_aot.occupancy_of(sm_90, 32, 0, 1) == (32 / 64, "CTAs")


def test_the_main_loop_is_found() -> None:
    sass = """
.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E R2, [R4.64] ;
        /*0020*/                   FFMA R3, R2, R2, R3 ;
        /*0030*/              @P0  BRA `(.L_x_1) ;
        /*0040*/                   EXIT ;
.L_x_2:
        /*0050*/                   BRA `(.L_x_2);
        /*0060*/                   NOP;
"""
    assert triton_aot.loop_instructions(sass) == 3
    assert triton_aot.loop_instructions(sass.replace("`(.L_x_1)", "`(.L_x_3)")) == 0


def test_write_replaces_only_the_table(tmp_path: Path) -> None:
    doc = tmp_path / "doc.md"
    doc.write_text(f"before\n{triton_report.BEGIN}\nold\n{triton_report.END}\nafter\n")
    triton_report.write(doc, "new")
    assert doc.read_text() == f"before\n{triton_report.BEGIN}\nnew\n{triton_report.END}\nafter\n"


def test_the_interpreter_cannot_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(sys, "argv", ["triton_report"])
    with pytest.raises(SystemExit, match="unset TRITON_INTERPRET"):
        triton_report.main()
