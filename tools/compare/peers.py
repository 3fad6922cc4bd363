"""Compares deskside, llama.cpp and ik_llama.cpp on this machine, paired in one run.

    make bench-peers                       both slices, with the peers' wheels
    make bench-peers QUICK=1               a small slice, under five minutes
    make bench-peers FILES="a.gguf" NATIVE=1 THREADS=8
    python -m tools.compare.peers --help

The record is written as JSON after every round. --resume continues it after an interruption.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from deskside import _native
from deskside.errors import DesksideError
from deskside.gguf import GGUF
from deskside.machine.system import available_memory, usable_cores
from deskside.models import build_tape
from deskside.tape.cost import Work
from tools.compare import machine, prepare, record, report
from tools.compare.measure import Run
from tools.compare.plan import ENGINES, OURS, PEERS, ROOT, Engine, amounts, stages, within

REPORTS = ROOT / "reports"


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bench-peers", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("files", nargs="*", type=Path, help="GGUF files; default: two slices")
    parser.add_argument("--quick", action="store_true", help="a small slice, fewer tests")
    parser.add_argument("--threads", type=int, default=0, help="default: one a core")
    parser.add_argument(
        "--rounds",
        type=int,
        help="default: 5, or 3 with --quick and where engines are loaded in turn",
    )
    parser.add_argument(
        "--engines",
        nargs="+",
        choices=[e.name for e in ENGINES],
        default=[e.name for e in ENGINES],
    )
    parser.add_argument(
        "--isa",
        default="",
        help="deskside's instruction set, such as avx2, to meet the peers' wheels on equal terms",
    )
    parser.add_argument("--native", action="store_true", help="build the peers for this CPU")
    parser.add_argument("--llama-lib", type=Path, help="a libllama.so of llama.cpp to use")
    parser.add_argument("--ik-lib", type=Path, help="a libllama.so of ik_llama.cpp to use")
    parser.add_argument("--cache", type=Path, default=prepare.cache_folder(), help="for slices")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-peers", help="for the peers")
    parser.add_argument(
        "--loading",
        choices=("all", "one"),
        help="default: all engines at once if memory holds them",
    )
    parser.add_argument("--json", type=Path, help="the record; default: reports/peers-DATE.json")
    parser.add_argument(
        "--resume",
        nargs="?",
        type=Path,
        const=Path(),
        help="continue this record, or the newest one in reports/",
    )
    parser.add_argument("--show", type=Path, help="only show this record")
    args = parser.parse_args(argv)
    args.threads = args.threads or usable_cores()
    try:
        _native.choose(args.isa)
    except ValueError as error:
        parser.error(f"--isa {args.isa}: {error}")
    if args.threads < 1 or (args.rounds is not None and args.rounds < 1):
        parser.error("--threads and --rounds must be at least 1")
    return args


def say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def models(args: argparse.Namespace) -> list[Path]:
    """The files to run. Files that cannot be made are named and left out."""
    if args.files:
        return list(args.files)
    found = []
    for each in (prepare.QUICK_SLICE,) if args.quick else prepare.SLICES:
        if machine.loading(each.nbytes, [0], available_memory()) is None:
            say(skipped(each.name, each.nbytes))
            continue
        path = prepare.model_file(each, args.cache, say)
        if isinstance(path, Path):
            found.append(path)
        else:
            say(path)
    return found


def skipped(name: str, nbytes: int) -> str:
    needed = (nbytes + machine.WORK_BYTES + machine.RESERVE) / 1e9
    free = available_memory() / 1e9
    return f"{name} is skipped: it needs {needed:.1f} GB of memory, {free:.1f} GB are free"


def run(args: argparse.Namespace) -> None:
    engines = [e for e in ENGINES if e.name in args.engines]
    peers = [p for p in PEERS if any(e.peer == p for e in engines)]
    own = {name: lib for name, lib in zip(PEERS, (args.llama_lib, args.ik_lib), strict=True) if lib}
    for path in (*own.values(), *args.files):
        if not path.is_file():
            raise DesksideError(f"{path} is not there")
    libraries = {name: lib.resolve() for name, lib in own.items() if name in peers}
    settings = {
        "quick": args.quick,
        "native": args.native,
        "threads": args.threads,
        "isa": args.isa,
        "rounds": args.rounds,
        "engines": [e.name for e in engines],
        "libraries": {name: str(path) for name, path in libraries.items()},
    }
    described = machine.describe()
    # Check the record before models are written, because it may refuse the settings.
    if args.resume is not None:
        out = record.latest(REPORTS) if args.resume == Path() else args.resume
        kept = record.resume(out, settings, described["commit"])
        say(f"taking up {out}")
    else:
        out = args.json or REPORTS / f"peers-{datetime.now(UTC):%Y%m%d-%H%M%S}.json"
        kept = record.new(settings, described)
    python = prepare.peers_python(args.venv, peers, say) if peers else None
    if args.native and python is not None:
        for peer in peers:
            if peer not in libraries:
                libraries[peer] = prepare.native_library(
                    peer, args.cache, python, args.threads, say
                )
    kept["versions"] = versions(peers, libraries)
    files = {path: GGUF.open(path) for path in models(args)}
    if not files:
        raise DesksideError("no model is left to run")
    tests = [t for s in stages(quick=args.quick, rounds=1) for t in s.tests]
    try:
        measured = sum(
            measure_file(args, file, kept, engines, python, libraries, out)
            for file in files.values()
        )
        if not measured:
            raise DesksideError("memory holds none of the models")
    except KeyboardInterrupt:
        say("interrupted; --resume continues")
    finally:
        if kept["files"]:
            record.save(kept, out)
            report.show(kept, tests)
            say(f"the record is {out}")


def measure_file(
    args: argparse.Namespace,
    file: GGUF,
    kept: dict[str, Any],
    engines: Sequence[Engine],
    python: Path | None,
    libraries: dict[str, Path],
    out: Path,
) -> bool:
    """Run the tests of one file into the record. Returns False if memory does not hold it."""
    nbytes = sum(path.stat().st_size for path in file.paths)
    name = file.path.name
    loading = machine.loading(nbytes, [e.copies for e in engines], available_memory())
    if loading is None:
        say(skipped(name, nbytes))
        return False
    loading = args.loading or loading
    entry = kept["files"].get(name)
    if entry is None:
        rounds = args.rounds or (3 if args.quick or loading == "one" else 5)
        entry = record.new_file(file.path, nbytes, loading, rounds)
        kept["files"][name] = entry
    arch = file.metadata["general.architecture"]
    n_ctx = int(file.metadata[f"{arch}.context_length"])
    rounds = entry["rounds"]
    fitting, too_long = within(stages(quick=args.quick, rounds=rounds), n_ctx)
    if too_long:
        say(f"{name}: its context of {n_ctx} tokens is too short for {', '.join(too_long)}")
    work = Work.of(build_tape(file))
    entry["work"] = {t.name: amounts(work, s, t, rounds) for s in fitting for t in s.tests}
    say(f"{name}: {nbytes / 1e9:.1f} GB, {loading} of {len(engines)} engines loaded at a time")
    one = Run(
        file=file,
        entry=entry,
        stages=fitting,
        engines=engines,
        threads=args.threads,
        isa=args.isa,
        python=python,
        libraries=libraries,
        save=lambda: record.save(kept, out),
        say=say,
    )
    one.copy()
    if entry["loading"] == "all":
        one.all_loaded()
    else:
        one.one_at_a_time()
    return True


def versions(peers: Sequence[str], libraries: dict[str, Path]) -> dict[str, str]:
    """The versions that are compared, and where they come from."""
    pinned = dict(zip(peers, (prepare.requirements([p])[0] for p in peers), strict=True))
    found = {OURS: importlib.metadata.version("deskside")}
    for peer in peers:
        where = f", built here: {libraries[peer]}" if peer in libraries else ", prebuilt wheel"
        found[peer] = pinned[peer] + where
    return found


def main() -> None:
    args = arguments()
    try:
        if args.show:
            kept = record.load(args.show)
            shown = stages(quick=kept["settings"]["quick"], rounds=1)
            report.show(kept, [t for s in shown for t in s.tests])
        else:
            run(args)
    except DesksideError as error:
        print(f"bench-peers: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
