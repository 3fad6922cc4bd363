"""What commands have in common: options by their llama.cpp names, and those that do nothing."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args

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

# Where tensors go, by their names in EngineConfig; commands have them by `placeable`.
PLACING: dict[str, Any] = {
    "devices": Annotated[
        list[str] | None,
        Option(
            "-dev",
            "--device",
            metavar="NAME[:SIZE],…",
            help="GPUs to use, such as cuda0:96GiB,emu0:8GiB; none: the CPU alone",
        ),
    ],
    "override_tensor": Annotated[
        list[str] | None,
        Option("-ot", "--override-tensor", metavar="REGEX=DEVICE,…", help="may be repeated"),
    ],
    "cpu_moe": Annotated[bool, Option("-cmoe", "--cpu-moe", help="all routed experts on the CPU")],
    "n_cpu_moe": Annotated[
        int | None, Option("-ncmoe", "--n-cpu-moe", help="those of the first N layers")
    ],
    "gpu_layers": Annotated[
        str | None,
        Option(
            "-ngl",
            "--gpu-layers",
            "--n-gpu-layers",
            metavar="N|all|auto",
            help="the last N layers on GPUs, the head counting as one",
        ),
    ],
    "tensor_split": Annotated[
        str | None,
        Option("-ts", "--tensor-split", metavar="A,B,…", help="layers' shares of the GPUs"),
    ],
    "main_gpu": Annotated[
        int | None, Option("-mg", "--main-gpu", help="the GPU that takes the head, from 0")
    ],
    "margin": Annotated[
        str | None,
        Option(
            "--margin",
            help="memory to leave free on every device",
            show_default="256MiB on the CPU, 1GiB on a GPU",
        ),
    ],
    "stream_experts": Annotated[
        str | None,
        Option(
            "--stream-experts",
            metavar="N|auto|off",
            help="prompts of N tokens or more have the CPU's experts pass through a GPU",
            show_default="off",
        ),
    ],
    "expert_cache": Annotated[
        str | None,
        Option("--expert-cache", metavar="SIZE", help="of a GPU, for often chosen CPU experts"),
    ],
    "no_mmap": Annotated[
        bool, Option("--no-mmap", help="read the embedding, too, instead of mapping it")
    ],
    "mlock": Annotated[bool, Option("--mlock", help="keep everything in physical memory")],
}


def placeable(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command with the flags of PLACING; its parameter `placing` gets those that were given."""
    own = inspect.signature(command, eval_str=True)
    kept = [p for p in own.parameters.values() if p.name != "placing"]
    more = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=False if get_args(annotation)[0] is bool else None,
            annotation=annotation,
        )
        for name, annotation in PLACING.items()
    ]

    @functools.wraps(command)
    def run(**given: Any) -> Any:
        flags = {name: given.pop(name) for name in PLACING}
        given["placing"] = {n: v for n, v in flags.items() if v is not None and v is not False}
        return command(**given)

    shown = own.replace(parameters=[*kept, *more])
    run.__signature__ = shown  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in shown.parameters.values()}
    return run


# llama.cpp's flags that have no meaning here: accepted, so that a command line for llama-cli starts
# deskside unchanged, with a note that they did nothing.
IGNORED = {
    "-fa/--flash-attn": "attention is always computed in tiles",
    "--jinja": "the file's template is always used",
    "-b/--batch-size": "-ub decides how many tokens are computed at once",
    "-tb/--threads-batch": "prefill uses -t as well",
}
ON_OFF = ("on", "off", "auto", "1", "0")
_TAKES_VALUE = {"-fa", "-b", "-tb"}


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
