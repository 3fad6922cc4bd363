"""Counting instructions in a listing made up here: no compiler."""

from __future__ import annotations

from pathlib import Path

from tools.kernels import asm

# A loop over blocks at 10..30 with a prefetching loop at 14..18 in it, in a loop over rows from 8.
LISTING = """
0000000000000000 <other()>:
   0:\tret

0000000000000004 <f()>:
   4:\tmov    rbp,rsp
   8:\tvmovaps zmm0,zmm1
  10:\tvpbroadcastd zmm2,DWORD PTR [rdi+rbx*1]
  14:\tprefetcht1 BYTE PTR [rdx]
  18:\tjne    14 <f()+0x10>
  1a:\tvpdpbusd zmm3,zmm2,ZMMWORD PTR [rax]
  1c:\tvpdpbusd zmm4,zmm2,zmm5
  1e:\tvmovdqu64 ZMMWORD PTR [rbp-0x40],zmm4
  20:\tvfmadd231ps zmm6,zmm7,DWORD PTR [r9]{1to16}
  24:\tvmovups ZMMWORD PTR [r8],zmm6
  28:\tadd    rax,0x40
  30:\tjne    10 <f()+0xc>
  34:\tjne    8 <f()+0x4>
"""


def test_the_innermost_loop_that_multiplies_is_counted() -> None:
    (loop,) = asm.loops(asm.functions(LISTING.splitlines())["f()"])
    expected = {"moves in": 1, "vpdpbusd": 2, "spills": 1, "vector": 2, "scalar": 2}
    assert asm.count(loop, "rsp|rbp") == {**expected, "total": 8, "operands": 2}
    assert asm.count(loop, "rsp")["spills"] == 0


def test_flags_are_those_of_the_build() -> None:
    flags = asm.flags((Path(__file__).parent.parent / "CMakeLists.txt").read_text())
    assert {"-O3", "-mavx512vnni", "-mfma", "-fvisibility=hidden", "-DDESKSIDE_AVX512"} <= set(
        flags
    )
    assert not any("$" in flag or "EMULATE" in flag for flag in flags)
