"""Prepares a run: builds or installs the peers, and writes the model files."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deskside.bench.predict.slices import Slice, cache_folder, write
from deskside.errors import DesksideError
from tools.compare.plan import IK, LLAMA, ROOT

Say = Callable[[str], None]

PACKAGES = {LLAMA: "xllamacpp", IK: "ik-llama-cpp-python"}
# Where llama.cpp's CMakeLists.txt is in the source distribution.
SOURCES = {LLAMA: "thirdparty/llama.cpp", IK: "vendor/ik_llama.cpp"}
OFF = ("TESTS", "EXAMPLES", "TOOLS", "SERVER", "COMMON")
OPTIONS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DGGML_NATIVE=ON",
    "-DBUILD_SHARED_LIBS=ON",
    "-DLLAMA_CURL=OFF",
    *(f"-DLLAMA_BUILD_{part}=OFF" for part in OFF),
)
# GCC before 12.4 and 13.3 assumes that _tile_loadconfig reads 8 of its 64 bytes, and drops the
# other stores. Then llama.cpp's AMX code crashes (GCC bug 114098).
AMX_HEADER = """\
#if defined(__AMX_TILE__) && !defined(__clang__)
#include <immintrin.h>
#define _tile_loadconfig(p) __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])(p)))
#endif
"""


__all__ = ["cache_folder", "model_file", "native_library", "peers_python", "requirements"]

SLICES = (Slice("qwen3.5-35b-a3b", 8), Slice("qwen3.5-397b-a17b", 4, 320))
# Much larger than the caches, but small enough for a run of a few minutes.
QUICK_SLICE = Slice("qwen3.5-35b-a3b", 4, 128)


def model_file(slice_: Slice, folder: Path, say: Say) -> Path | str:
    """The slice's file, written if missing; or a sentence that says why it cannot be."""
    path = slice_.file(folder)
    if not path.exists():
        say(f"writing {path} ({slice_.nbytes / 1e9:.1f} GB)")
    try:
        return write(slice_, folder)
    except DesksideError as error:
        return f"{slice_.name} is skipped: {error}"


def requirements(peers: Sequence[str]) -> list[str]:
    """The pinned requirements of the peers, the same as for the tests."""
    with open(ROOT / "pyproject.toml", "rb") as stream:
        pinned = tomllib.load(stream)["project"]["optional-dependencies"]["oracles"]
    return [r for r in pinned for peer in peers if r.startswith(PACKAGES[peer] + "==")]


def peers_python(venv: Path, peers: Sequence[str], say: Say) -> Path:
    """The interpreter of a virtual environment with the peers' wheels and NumPy."""
    python, done = venv / "bin" / "python", venv / "installed.txt"
    wanted = [*requirements(peers), "numpy"]
    have = done.read_text(encoding="utf-8").splitlines() if done.exists() else []
    if python.exists() and set(wanted) <= set(have):
        return python
    say(f"installing {', '.join(wanted)} in {venv}")
    if not python.exists():
        _run([sys.executable, "-m", "venv", venv], "no peers: their environment cannot be made")
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "install"]
    _run([*pip, *wanted], "no peers: their wheels cannot be installed")
    done.write_text("\n".join(sorted({*wanted, *have})) + "\n", encoding="utf-8")
    return python


def native_library(peer: str, folder: Path, python: Path, threads: int, say: Say) -> Path:
    """libllama.so of the peer, built for this CPU from its source distribution."""
    (requirement,) = requirements([peer])
    home = folder / "native" / requirement.replace("==", "-")
    found = _library(home / "build")
    if found:
        return found
    if shutil.which("cmake") is None:
        raise DesksideError("NATIVE=1 needs cmake; install it, or leave NATIVE out")
    source = home / "source"
    if not source.exists():
        say(f"downloading the source of {requirement}")
        _unpack(requirement, home, python)
    say(f"building {requirement} for this CPU (some minutes)")
    header = home / "amx_fix.h"
    header.write_text(AMX_HEADER, encoding="utf-8")
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    what = f"{requirement} does not build"
    configure = ["cmake", *generator, "-S", source / SOURCES[peer], "-B", home / "build", *OPTIONS]
    _run([*configure, f"-DCMAKE_CXX_FLAGS=-include {header}"], what)
    build = ["cmake", "--build", home / "build", "--target", "llama", "--parallel", str(threads)]
    _run(build, what)
    found = _library(home / "build")
    if found is None:
        raise DesksideError(f"{what}: there is no libllama.so in {home / 'build'}")
    return found


def _library(folder: Path) -> Path | None:
    return next(iter(sorted(folder.rglob("libllama.so"))), None)


def _unpack(requirement: str, home: Path, python: Path) -> None:
    home.mkdir(parents=True, exist_ok=True)
    name = requirement.split("==")[0]
    # By name, not :all:, because pip may use wheels to read the metadata of the sdist.
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps"]
    _run(
        [*pip, "--no-binary", name, "--dest", home, requirement],
        f"the source of {requirement} cannot be downloaded",
    )
    (archive,) = home.glob("*.tar.gz")
    temporary = home / "unpacked"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.unpack_archive(archive, temporary)
    (root,) = temporary.iterdir()
    root.rename(home / "source")
    temporary.rmdir()
    archive.unlink()


def _run(command: Sequence[Any], what: str) -> None:
    """Run a command. DesksideError says `what`, and the last line that the command wrote."""
    try:
        done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    except OSError as error:
        raise DesksideError(f"{what}: {error}") from None
    if done.returncode:
        lines = (done.stderr.strip() or done.stdout.strip()).splitlines() or ["no output"]
        errors = [line for line in lines if "error" in line.lower()]
        raise DesksideError(f"{what}: {(errors or lines)[-1].strip()}")
