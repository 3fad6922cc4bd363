"""Counts the instructions of one decode step of the bundled model with valgrind's callgrind.

    python -m tools.kernels.instructions

Counts do not drift as times do. For one build they agree within a thousandth, and those of the
kernels within a few instructions. The result is the difference of two runs with different numbers
of steps, so loading and the prompt do not count. It uses one thread and AVX2, because valgrind
lacks AVX-512. Needs valgrind.
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
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path

from deskside.errors import DesksideError

FEW = 4
PROMPT = "What does os.path.join do?"


def decode(model: str, steps: int, isa: str) -> None:
    """The work to count: a prompt, then `steps` steps."""
    from deskside import LLM, SamplingParams

    llm = LLM(model, ctx=256, threads=1, isa=isa)
    params = SamplingParams(max_tokens=steps + 1, temperature=0, ignore_eos=True)
    done = llm.generate(PROMPT, params)
    if len(done.tokens) != steps + 1:
        raise DesksideError(f"{len(done.tokens)} tokens were generated")


def objects(lines: Iterable[str]) -> Counter[str]:
    """Instructions by object file, from a callgrind profile. A call counts for the callee."""
    names: dict[str, str] = {}
    found: Counter[str] = Counter()
    current, skip = "", False
    for line in lines:
        # "ob=(3) /path" names an object and numbers it, "ob=(3)" refers to it; "cob=" is a callee's
        match = re.match(r"(c?)ob=\((\d+)\)(?: (.+))?", line)
        if match:
            callee, number, name = match.groups()
            name = names.setdefault(number, name or "?")
            current = current if callee else name
        elif line.startswith("calls="):
            skip = True  # the next line repeats the callee's cost
        elif line[:1].isdigit() or line[:1] in "+-*":
            if not skip:
                found[current] += int(line.split()[1])
            skip = False
    return found


def count(model: Path, steps: int, isa: str) -> Counter[str]:
    """Instructions by object file of a whole process that decodes `steps` steps."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "callgrind"
        command = ["valgrind", "--tool=callgrind", f"--callgrind-out-file={out}"]
        child = [sys.executable, "-m", "tools.kernels.instructions", "--child", str(steps)]
        done = subprocess.run(
            [*command, *child, "--model", str(model), "--isa", isa],
            env={**os.environ, "PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise DesksideError(f"valgrind failed: {(done.stderr.splitlines() or ['?'])[-1]}")
        with out.open(encoding="utf-8", errors="replace") as stream:
            return objects(stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--model", type=Path, default=Path(str(files("deskside") / "data/demo.gguf"))
    )
    parser.add_argument("--steps", type=int, default=10, help="steps that are counted")
    parser.add_argument("--isa", default="avx2")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        decode(str(args.model), args.child, args.isa)
        return
    try:
        if shutil.which("valgrind") is None:
            raise DesksideError("valgrind is not installed")
        few, many = (count(args.model, n, args.isa) for n in (FEW, FEW + args.steps))
    except DesksideError as error:
        print(f"instructions: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    many.subtract(few)
    total = sum(many.values())
    print(f"{total / args.steps:,.0f} instructions a token ({args.model.name}, {args.isa})")
    for name, n in many.most_common(6):
        if n > total / 1000:
            print(f"{n / args.steps:14,.0f}  {n / total:6.1%}  {Path(name).name}")


if __name__ == "__main__":
    main()
