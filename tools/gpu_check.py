#!/usr/bin/env python3
"""Checks what only a GPU can show: correct results, then speed. Takes at most eight minutes.

    python3 tools/gpu_check.py                # at the root of the working tree, all parts
    python3 tools/gpu_check.py models decode  # only these; --list shows all

If deskside is not installed, it is built offline. Each part runs in its own process, because a CUDA
error destroys the context. The last output is one table; gpu_check.json and gpu_check.log go to
$OUT (or ./reports). Exit code 1 means that a check failed.

Without a CUDA device, parts that need one are skipped, and the others run on an emulated device. CI
runs this file that way.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

from gpu_check_parts import OUT, PARTS, ROOT, SLICES, WORK, add_row, launches

NEED_SLICES = {"decode", "stream", "threads"}
TOTAL = 470  # seconds for all parts: ten minutes, minus a margin


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("parts", nargs="*", help="default: all, in their order")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--part", help=argparse.SUPPRESS)  # the child
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there is {', '.join(PARTS)}")
    if args.list:
        for name, p in PARTS.items():
            print(f"{name:10} at most {p.limit:3} s{', needs a GPU' if p.needs_gpu else ''}")
        return 0
    if args.part:
        PARTS[args.part].run()
        return 0
    return parent(args.parts or list(PARTS))


def parent(names: list[str]) -> int:
    began = time.monotonic()
    for folder in (OUT, WORK):
        folder.mkdir(parents=True, exist_ok=True)
    rows_file = WORK / "rows.jsonl"
    rows_file.unlink(missing_ok=True)
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(
            [str(WORK / "site"), str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
        ),
        "TRITON_INTERPRET": "0",  # compile; a conftest would turn the interpreter on
        "TRITON_CACHE_DIR": str(WORK / "triton"),
        "PYTHONUNBUFFERED": "1",
        "GPU_CHECK_WORK": str(WORK),
        "GPU_CHECK_SLICES": str(slice_folder()),
    }
    with (OUT / "gpu_check.log").open("w") as log:
        build(log, env)
        gpu = cuda(env)
        if not gpu:  # matrices are tiny, so a second thread would only add waiting
            env |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        synth = None
        for name in names:
            if synth is None and name != "machine" and gpu and NEED_SLICES & set(names):
                synth = start_synth(env, log)  # while parts without slices run
            p, left = PARTS[name], TOTAL - (time.monotonic() - began)
            if p.needs_gpu and not gpu:
                add_row(name, "skipped: no CUDA device", None)
            elif left < min(20, p.limit):
                add_row(name, f"skipped: {left:.0f} s left", None)
            else:
                run_part(name, min(p.limit, left), log, env)
        if synth is not None and synth.poll() is None:
            synth.terminate()
            synth.wait()
    rows = [json.loads(line) for line in rows_file.read_text().splitlines()]
    seconds = time.monotonic() - began
    (OUT / "gpu_check.json").write_text(json.dumps({"seconds": seconds, "rows": rows}, indent=1))
    return show(rows, seconds)


def run_part(name: str, limit: float, log: Any, env: dict[str, str]) -> None:
    """Run a part. A quick part that fails runs again with synchronous launches.

    Then the log shows the failing launch instead of the next call that waits.
    """
    print(f"-- {name} (at most {limit:.0f} s)", flush=True)
    log.write(f"\n======== {name}\n")
    log.flush()
    command = [sys.executable, __file__, "--part", name]
    began = time.monotonic()
    try:
        done = subprocess.run(
            command, env=env, cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
            timeout=limit,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        add_row(name, f"stopped after {limit:.0f} s", False)
        return
    spent = time.monotonic() - began
    if done.returncode and name not in ("sanitize", "machine") and spent < 45:
        log.write("\n-------- again, blocking\n")
        log.flush()
        with contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, env=env | {"CUDA_LAUNCH_BLOCKING": "1", "GPU_CHECK_AGAIN": "1"}, cwd=ROOT,
                stdout=log, stderr=log, stdin=subprocess.DEVNULL, timeout=60,
            )  # fmt: skip
    add_row(name, f"exit code {done.returncode}", done.returncode == 0, spent, "s")


def build(log: Any, env: dict[str, str]) -> None:
    """Build deskside and install it into a folder.

    A new virtual environment would not see the packages of this one, and there is no registry to
    install them from.
    """
    need_packages(env)
    probe = [sys.executable, "-c", "import deskside._native"]
    if subprocess.run(probe, env=env, cwd=WORK, capture_output=True).returncode == 0:
        add_row("build", "as installed", None)
        return
    began = time.monotonic()
    command = [
        sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-build-isolation",
        "--no-deps", "--no-compile", "--no-cache-dir", "--upgrade", "--target", WORK / "site", ROOT,
    ]  # fmt: skip
    done = subprocess.run(command, stdout=log, stderr=log, timeout=240)
    add_row("build", "pip --no-index --target", done.returncode == 0, time.monotonic() - began, "s")
    if done.returncode:
        raise SystemExit(f"the build failed: {OUT / 'gpu_check.log'}")


def need_packages(env: dict[str, str]) -> None:
    """Exit with one line if the interpreter lacks a package that deskside imports."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = [re.split("[><=!~; ]", entry)[0] for entry in project["dependencies"]]
    probe = (
        f"from importlib.util import find_spec; print(*(n for n in {names} if not find_spec(n)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], env=env, cwd=WORK, capture_output=True, text=True
    )
    if missing := done.stdout.split():
        raise SystemExit(
            f"{sys.executable} lacks {', '.join(missing)}: install them, or unpack their wheels "
            "into a folder and name it in PYTHONPATH"
        )


def cuda(env: dict[str, str]) -> bool:
    probe = "import torch, sys; sys.exit(not torch.cuda.is_available())"
    done = subprocess.run([sys.executable, "-c", probe], env=env, cwd=WORK, capture_output=True)
    return done.returncode == 0


def slice_folder() -> Path:
    """The folder for slices: in memory if they fit, because a disk may take a minute longer."""
    memory = Path("/dev/shm")
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    roomy = total > 110e9 and memory.is_dir() and shutil.disk_usage(memory).free > 45e9
    return memory if roomy else WORK


def start_synth(env: dict[str, str], log: Any) -> subprocess.Popen[bytes]:
    """Start writing the slices, while parts run that do not need them."""
    code = f"""
import os, shutil, time
from pathlib import Path
from deskside.convert.synth import estimate, synth_file
from deskside.machine.system import available_memory
for preset, layers in {SLICES!r}:
    path = Path({env["GPU_CHECK_SLICES"]!r}) / f"{{preset}}-{{layers}}.gguf"
    size = estimate(preset, layers=layers)
    room = shutil.disk_usage(path.parent).free - size, available_memory() - 2.5 * size
    if path.exists() or min(room) < 2e9:
        print("not written:", path, "room beside it", room, flush=True)
        continue
    began = time.monotonic()
    synth_file(preset, path.with_suffix(".part"), layers=layers)
    os.rename(path.with_suffix(".part"), path)
    print(path, time.monotonic() - began, "s", flush=True)
"""
    return subprocess.Popen([sys.executable, "-c", code], env=env, cwd=WORK, stdout=log, stderr=log)


def show(rows: list[dict[str, Any]], seconds: float) -> int:
    """Print figures and failures, and the number of passed checks. Returns the exit code."""
    passed, wrong = ([r for r in rows if r["ok"] is ok] for ok in (True, False))
    for r in rows:
        if r["ok"] is not True or r["case"].startswith("exit code"):
            value = "" if r["value"] is None else f"{r['value']:.4g} {r['unit']}"
            mark = "WRONG" if r["ok"] is False else ""
            print(f"{r['part']:9} {r['case'][:56]:56} {value:>16} {r['beside'][:30]:>30} {mark}")
    print(f"{len(passed)} passed, {len(wrong)} failed, {seconds:.0f} s")
    return bool(wrong)


if __name__ == "__main__":
    if sys.argv[1:] == ["--part", "launches"]:
        launches()
        sys.exit(0)
    sys.exit(main())
