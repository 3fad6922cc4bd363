"""Times the matrix kernels: every quant type, 1 to 512 rows of activations.

    python -m tools.kernels.matmul --threads 2 --types IQ4_NL Q8_0 --json kernels.json

The native program times one linear op, without Python. For up to 8 rows, the matrix is larger than
the caches: compare GB/s with the machine's read bandwidth. For more rows, the matrix fits the
caches, and GMAC/s counts. Bytes are those of the weights as the kernels hold them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from deskside import _native
from deskside.backends.native.program import KERNEL_TYPES
from deskside.gguf.quants import BY_NAME, FLOAT_TYPES, QuantType
from deskside.machine import rates, watch
from deskside.machine.system import usable_cores
from tools.compare import machine

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
STREAMED = 8  # most rows of activations for which the matrix is larger than the caches
WIDTH = 2048
SMALL = 8 << 20  # weights of the matrix for many rows


def random_rows(t: QuantType, rows: int, n: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Random blocks with finite scales. They repeat one sample, which is quick to make.

    rows: rounded up to whole samples.
    """
    count = min(rows, 512)
    if t.block == 1:
        x = rng.standard_normal((count, n)).astype(np.float32)
        if t.name == "BF16":
            sample = (x.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)
        else:
            sample = x.astype({"F32": np.float32, "F16": np.float16}[t.name]).view(np.uint8)
    else:
        sample = rng.integers(0, 256, (count, t.row_bytes(n)), np.uint8)
        blocks = sample[:, t.row_header :].reshape(count, -1, t.block_bytes)
        for at in t.scales:
            d = rng.uniform(-1e-2, 1e-2, blocks.shape[:2]).astype("<f2")
            blocks[:, :, at : at + 2] = d[..., None].view(np.uint8)
        if t.row_header:
            sample[:, :4] = rng.uniform(1e-5, 1e-4, (count, 1)).astype("<f4").view(np.uint8)
    return np.tile(sample, (-(-rows // count), 1))


class Linear:
    """A matrix as the kernels hold it. Only this class knows how to make a program."""

    def __init__(self, w: NDArray[np.uint8], t: QuantType, n: int, threads: int) -> None:
        panel = _native.panel_bytes(t.id, n)
        self.nbytes = -(-len(w) // _native.PANEL_ROWS) * panel
        self._arena = _native.Arena(self.nbytes)
        self._weights = self._arena.from_array(w, t.id, n, 1, 0, panel, threads)
        self._type, self._n, self._threads, self.rows = t, n, threads, len(w)

    def seconds(self, m: int, isa: str, repeats: int, rng: np.random.Generator) -> float:
        """The least seconds of one product with m rows of activations."""
        n, f32 = self._n, BY_NAME["F32"]
        record = _native.record_bytes(n) // 4
        # offset, width, distance of rows
        floats, records = (0, n, n), (-(-m * n // 16) * 16, record, record)
        program = _native.Program(self._threads, m, records[0] + m * record, isa)
        x = rng.standard_normal((m, n)).astype(np.float32)
        program.begin("rows")
        program.embed(x.view(np.uint8), f32.id, n, floats)
        if self._type.name not in FLOAT_TYPES:
            program.quantize(floats, records)
        program.begin("tasks")
        part = (self._weights, (0, self.rows, self.rows), True, None, None)
        program.linear(floats, records, False, [part])
        program.finish()
        out = np.empty((m, self.rows), np.float32)
        tokens = np.arange(m, dtype=np.int32)
        segments = np.array([(0, 0, m)], np.int32)
        times = [program.run(tokens, segments, tokens, out, True)[-1] for _ in range(repeats + 1)]
        return min(times[1:]) / 1e6


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for every type and number of rows."""
    rng = np.random.default_rng(0)
    for name in args.types:
        t = BY_NAME[name]
        linear: Linear | None = None
        for m in args.rows:
            big = m <= STREAMED
            if linear is None or (not big and linear.rows * WIDTH > SMALL):
                rows = args.megabytes * 10**6 // t.row_bytes(WIDTH) if big else SMALL // WIDTH
                linear = None  # free its memory before the next
                linear = Linear(random_rows(t, rows, WIDTH, rng), t, WIDTH, args.threads)
            seconds = linear.seconds(m, args.isa, args.repeats, rng)
            yield {
                "type": name,
                "m": m,
                "bytes": linear.nbytes,
                "seconds": seconds,
                "GB/s": linear.nbytes / seconds / 1e9,
                "GMAC/s": m * linear.rows * WIDTH / seconds / 1e9,
            }


def cycles_per_second() -> float | None:
    """The clock that Linux reports. It is often nominal, so figures per cycle are rough."""
    clocks = watch.megahertz()
    return clocks[0] * 1e6 if clocks else None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--isa", default="", help="default: the fastest here")
    parser.add_argument("--types", nargs="+", default=sorted(KERNEL_TYPES), choices=KERNEL_TYPES)
    parser.add_argument("--rows", nargs="+", type=int, default=ROWS, help="rows of activations")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--megabytes",
        type=int,
        default=max(256 << 20, 2 * rates.last_level_cache()) // 10**6,
        help="size of the matrix for up to 8 rows; default: twice the last cache",
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.rows = sorted(args.rows)
    isa = _native.choose(args.isa)
    bandwidth, clock = rates.bandwidth(args.threads), cycles_per_second()
    table = Table(title=f"{isa}, {args.threads} threads, {bandwidth / 1e9:.1f} GB/s of bandwidth")
    for column in ("type", "M", "GB/s", "of bandwidth", "bytes/cycle/thread", "GMAC/s"):
        table.add_column(column, justify="left" if column == "type" else "right")
    console = Console(highlight=False)
    found = []
    with console.status("measuring") as status:
        for row in measure(args):
            found.append(row)
            status.update(f"{row['type']}, {row['m']} rows")
            streamed = row["m"] <= STREAMED
            rate = row["GB/s"] * 1e9
            table.add_row(
                row["type"],
                str(row["m"]),
                f"{row['GB/s']:.1f}",
                f"{rate / bandwidth:.0%}" if streamed else "",
                f"{rate / clock / args.threads:.2f}" if clock else "-",
                f"{row['GMAC/s']:.1f}",
            )
    console.print(table)
    if args.json:
        result = {
            "machine": machine.describe(),
            "isa": isa,
            "threads": args.threads,
            "bandwidth": bandwidth,
            "compute": rates.compute(args.threads),
            "rows": found,
        }
        args.json.write_text(json.dumps(result, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
