"""Tabulates the resources of the GPU kernels: every kernel, compiled for every target.

    python -m tools.kernels.triton_report [--few] [--json FILE] [--write]

Needs the extra `gpu` and no GPU; takes about a minute, then Triton's cache has the results.
--write puts the table into docs/TRITON.md.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import track

from tools.kernels.triton_aot import Compiled, compile_all, pairs, rows

DOC = Path(__file__).resolve().parents[2] / "docs" / "TRITON.md"
BEGIN, END = "<!-- made by python -m tools.kernels.triton_report --write -->", "<!-- end -->"


def table(compiled: Sequence[Compiled]) -> str:
    """A Markdown table: one row per kernel, one group of columns per target."""
    targets = list(dict.fromkeys(c.target for c in compiled))
    columns = ["registers", "stack", "shared", "occupancy", "/ weight"]
    lines = [
        "| kernel | warps | bytes a CTA | "
        + " | ".join(f"{t} {c}" for t in targets for c in columns)
        + " |",
        "|---" * (3 + len(targets) * len(columns)) + "|",
    ]
    by_name: dict[str, list[Compiled]] = {}
    for c in compiled:
        by_name.setdefault(c.name, []).append(c)
    for name, found in by_name.items():
        cells = [name, str(found[0].warps), f"{found[0].traffic:,}"]
        for c in found:
            cells += [str(c.registers), str(c.stack), f"{c.shared:,}"]
            cells += [f"{c.occupancy:.0%} ({c.limit})"]
            cells += ["-" if c.per_weight is None else f"{c.per_weight:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(path: Path, text: str) -> None:
    """Replace the text between the marks."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--write", action="store_true", help=f"put the table into {DOC.name}")
    parser.add_argument("--few", action="store_true", help="the selection of the tests")
    args = parser.parse_args()
    if args.few and args.write:
        parser.error("the table has all kernels: --write without --few")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit(
            "triton_report: error: unset TRITON_INTERPRET, which disables the compiler"
        )
    work = pairs(few=args.few)
    done = compile_all(work)
    compiled = list(track(done, "compiling", len(work), console=Console(stderr=True)))
    if args.json:
        args.json.write_text(json.dumps(rows(compiled), indent=1), encoding="utf-8")
    if args.write:
        write(DOC, table(compiled))
    else:
        print(table(compiled))


if __name__ == "__main__":
    main()
