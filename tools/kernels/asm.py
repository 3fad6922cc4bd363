"""Counts the instructions of the AVX-512 kernels' inner loops in their machine code.

    python -m tools.kernels.asm

Compiles native/isa/matmul.cpp with the flags of CMakeLists.txt. In the disassembly, the number of
vpdpbusd identifies each kernel's loop over blocks of 32 weights. Counts are for 512 products: a
block of 16 rows by one row of activations.

"moves in" only load memory into a register. "operands" are memory operands of vpdpbusd and of other
vector instructions. "spills" access the stack with a zmm register. Inner loops without
multiplications are left out. Needs g++ and binutils.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from deskside.errors import DesksideError
from deskside.gguf.quants import BY_NAME

ROOT = Path(__file__).resolve().parents[2]
# Types whose product with one row of activations is counted.
ONE_ROW = (
    *("Q2_K", "Q3_K", "Q4_K", "Q6_K", "Q6_0", "Q8_0", "IQ4_NL", "MXFP4"),
    *("IQ4_K", "IQ5_K", "IQ6_K", "IQ4_KS", "IQ5_KS", "IQ4_KSS"),
)
# has_min and halves of the tile's Numbers, as the disassembly shows them. Q2_K alone has both.
TILES = {"": "{}", " min": "{true}", " halves": "{false, true}"}
# What is printed, the functions that may hold it (a function called once is part of its caller) and
# the number of vpdpbusd in the loop over blocks.
HOT = (
    *(
        (f"dot_tile<2, 6>{name}", rf"::dot_tile<.*Numbers{re.escape(shown)}, 2, 6>", 8 * 2 * 6)
        for name, shown in TILES.items()
    ),
    *(
        (
            f"dot_direct<{name}, 1>",
            r"::(dot_direct<\(deskside::Type\){0}, 1>|multiply<.*Type\){0}>)".format(
                BY_NAME[name].id
            ),
            8,
        )
        for name in ONE_ROW
    ),
)
COLUMNS = ("vpdpbusd", "moves in", "vector", "spills", "prefetch", "scalar", "total", "operands")


class Instruction(NamedTuple):
    address: int
    name: str
    operands: str


def flags(cmake: str) -> list[str]:
    """The compiler flags for avx512 in CMakeLists.txt."""
    patterns = (
        r'set\(CMAKE_CXX_FLAGS_RELEASE "([^"]*)"\)',
        r"target_compile_options\(kernels_\$\{isa\} PRIVATE \$\{WARNINGS\} ([^$]*)\$\{ARGN\}\)",
        r"set\(AVX2 ([^)]*)\)",
        r"deskside_kernels\(avx512 \$\{AVX2\}([^)]*)\)",
    )
    found = [re.search(pattern, cmake) for pattern in patterns]
    if None in found:
        raise DesksideError("the flags in CMakeLists.txt are not where they were")
    own = ["-std=gnu++20", "-fPIC", "-DDESKSIDE_X86", "-DDESKSIDE_ISA=avx512"]
    own += [f"-I{ROOT / 'native' / folder}" for folder in ("", "isa", "weights")]
    return own + " ".join(match[1] for match in found if match).split()


def disassemble(into: Path) -> list[str]:
    compiler = os.environ.get("CXX", "g++")
    for tool in (compiler, "objdump"):
        if shutil.which(tool) is None:
            raise DesksideError(f"{tool} is missing (Debian, Ubuntu: apt-get install g++ binutils)")
    command = [compiler, *flags((ROOT / "CMakeLists.txt").read_text()), "-o", str(into)]
    if subprocess.run([*command, "-c", str(ROOT / "native/isa/matmul.cpp")]).returncode:
        raise DesksideError(f"{compiler} failed")
    show = ["objdump", "-d", "-C", "-M", "intel", "--no-show-raw-insn", str(into)]
    return subprocess.run(show, capture_output=True, text=True, check=True).stdout.splitlines()


def functions(lines: Iterable[str]) -> dict[str, list[Instruction]]:
    found: dict[str, list[Instruction]] = {}
    for line in lines:
        if match := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = found[match[1]] = []
        elif match := re.match(r" *([0-9a-f]+):\t(\S+) *(.*)", line):
            body.append(Instruction(int(match[1], 16), match[2], match[3]))
    return found


def loops(body: list[Instruction]) -> list[list[Instruction]]:
    """Innermost loops with a vpdpbusd, without the loops inside them that have none."""
    ends: dict[int, int] = {}
    for at, name, operands in body:
        match = re.match(r"([0-9a-f]+) <", operands)
        target = int(match[1], 16) if match and name.startswith("j") else -1
        if body[0].address <= target <= at:
            ends[target] = max(at, ends.get(target, 0))

    def within(i: Instruction, span: tuple[int, int]) -> bool:
        return span[0] <= i.address <= span[1]

    full = [s for s in ends.items() if any(within(i, s) for i in body if i.name == "vpdpbusd")]
    empty = [s for s in ends.items() if s not in full]
    inner = [s for s in full if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in full)]
    rest = [i for i in body if not any(within(i, s) for s in empty)]
    return [[i for i in rest if within(i, s)] for s in sorted(inner)]


def count(loop: list[Instruction], stack: str) -> Counter[str]:
    found: Counter[str] = Counter(total=len(loop))
    for _, name, operands in loop:
        source = "[" in operands.partition(",")[2]
        if "zmm" in operands and re.search(rf"\[({stack})\b", operands):
            kind = "spills"
        elif source and re.match(r"vmov|vp?broadcast", name):
            kind = "moves in"
        elif name.startswith("v"):
            kind = "vpdpbusd" if name == "vpdpbusd" else "vector"
            found["operands"] += source
        else:
            kind = "prefetch" if name.startswith("prefetch") else "scalar"
        found[kind] += 1
    return found


def rows(lines: Iterable[str]) -> Iterator[tuple[str, Counter[str]]]:
    known = functions(lines)
    for title, pattern, dots in HOT:
        found = []
        for body in (known[name] for name in known if re.search(pattern, name)):
            stack = "rsp|rbp" if any(i.operands == "rbp,rsp" for i in body) else "rsp"
            counts = [count(loop, stack) for loop in loops(body)]
            found += [c for c in counts if c["vpdpbusd"] == dots]
        if not found:
            raise DesksideError(f"there is no loop with {dots} vpdpbusd for {title}")
        yield from ((title, c) for c in found)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0]).parse_args()
    try:
        with tempfile.TemporaryDirectory() as folder:
            table = list(rows(disassemble(Path(folder) / "matmul.o")))
    except DesksideError as error:
        print(f"asm: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{'per 512 products':29}" + "".join(f"{c:>12}" for c in COLUMNS))
    for title, counts in table:
        scale = 8 / counts["vpdpbusd"]  # which multiplies 64 pairs
        print(f"{title:29}" + "".join(f"{counts[c] * scale:12.2f}" for c in COLUMNS))


if __name__ == "__main__":
    main()
