"""What commands have in common: options by their llama.cpp names, and those that do nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Option

Model = Annotated[
    Path | None, Option("-m", "--model", help="GGUF file; without it the bundled demo model")
]
Threads = Annotated[int, Option("-t", "--threads", help="threads; 0 = one per usable core")]
Ubatch = Annotated[
    int, Option("-ub", "--ubatch-size", help="most tokens computed at once in prefill")
]
CacheK = Annotated[
    str, Option("-ctk", "--cache-type-k", help="type of cached keys: f16, q8_0, f32")
]
CacheV = Annotated[
    str, Option("-ctv", "--cache-type-v", help="type of cached values: f16, q8_0, f32")
]
Isa = Annotated[str | None, Option("--isa", help="force an instruction set")]
Numa = Annotated[
    str, Option("--numa", help="memory of the weights: none, or interleave over all NUMA nodes")
]
HugePages = Annotated[
    str,
    Option(
        "--huge-pages", help="for the weights: auto (transparent), off, or reserved 2MiB or 1GiB"
    ),
]
TensorTypes = Annotated[
    list[str] | None, Option("--tensor-type", metavar="REGEX=TYPE", help="may be repeated")
]

# llama.cpp's flags that have no meaning here (yet): accepted, so that a command line for
# llama-cli starts deskside unchanged, with a note that they did nothing.
_NO_GPU = "deskside runs on the CPU; nothing to place"
IGNORED = {
    "-ngl/--n-gpu-layers": _NO_GPU,
    "-ot/--override-tensor": _NO_GPU,
    "-cmoe/--cpu-moe": _NO_GPU,
    "-ncmoe/--n-cpu-moe": _NO_GPU,
    "-dev/--device": _NO_GPU,
    "-ts/--tensor-split": _NO_GPU,
    "-fa/--flash-attn": "attention is always computed in tiles",
    "--jinja": "the file's template is always used",
    "--no-mmap": "weights are always mapped",
    "-b/--batch-size": "-ub decides how many tokens are computed at once",
    "-tb/--threads-batch": "prefill uses -t as well",
}
ON_OFF = ("on", "off", "auto", "1", "0")
_TAKES_VALUE = {"-ngl", "-ot", "-ncmoe", "-dev", "-ts", "-fa", "-b", "-tb"}


def strip_ignored(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Arguments without the flags of IGNORED, and a note for each of those."""
    notes, kept = [], []
    spelled = {s: names for names in IGNORED for s in names.split("/")}
    takes_value = {s for s, names in spelled.items() if names.split("/")[0] in _TAKES_VALUE}
    i = 0
    while i < len(arguments):
        flag, equals, _ = arguments[i].partition("=")
        i += 1
        if arguments[i - 1] == "--":
            kept += arguments[i - 1 :]
            break
        if flag not in spelled:
            kept.append(arguments[i - 1])
            continue
        notes.append(f"{flag} is accepted and does nothing: {IGNORED[spelled[flag]]}")
        if flag in takes_value and not equals and i < len(arguments):
            # -fa may stand alone.
            if flag in ("-fa", "--flash-attn") and arguments[i] not in ON_OFF:
                continue
            i += 1
    return kept, notes
