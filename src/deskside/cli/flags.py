"""Flags that several commands share, under llama.cpp's names."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, get_args, get_origin, get_type_hints

from typer import Option

from deskside.engine.config import EngineConfig
from deskside.engine.sampler import SamplingParams

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Flags by the field of EngineConfig or SamplingParams that they set. The field gives type and
# default.
OPTIONS: dict[str, Any] = {
    "ctx": Option(
        "-c",
        "--ctx-size",
        help="context in tokens; 0 = the model's own",
        show_default="4096, or the model's own if less",
    ),
    "threads": Option("-t", "--threads", help="threads; 0 = one per usable core"),
    "threads_batch": Option(
        "-tb", "--threads-batch", help="threads while a prompt is computed; 0 = as -t"
    ),
    "ubatch": Option("-ub", "--ubatch-size", help="most tokens to compute at once in prefill"),
    "batch": Option("-b", "--batch-size", help="a limit of -ub", show_default="none"),
    "parallel": Option("-np", "--parallel", help="most sequences at the same time"),
    "ctk": Option("-ctk", "--cache-type-k", help="type of cached keys: f16, q8_0, f32"),
    "ctv": Option("-ctv", "--cache-type-v", help="type of cached values: f16, q8_0, f32"),
    "isa": Option("--isa", help="use this instruction set"),
    "numa": Option(
        "--numa", help="memory of the weights: none, or interleave = spread over all NUMA nodes"
    ),
    "huge_pages": Option(
        "--huge-pages",
        help="pages of the weights: auto (transparent), off, or reserved 2MiB or 1GiB",
    ),
    "backend": Option("--backend", help="cpu, or reference (NumPy, slow)"),
    "devices": Option(
        "-dev",
        "--device",
        metavar="NAME[:SIZE],…",
        help="GPUs to use, such as cuda0:96GiB,emu0:8GiB; none = the CPU alone",
    ),
    "override_tensor": Option(
        "-ot",
        "--override-tensor",
        metavar="REGEX=DEVICE,…",
        help="device of matching tensors; may be repeated",
    ),
    "cpu_moe": Option("-cmoe", "--cpu-moe", help="put all routed experts on the CPU"),
    "n_cpu_moe": Option(
        "-ncmoe", "--n-cpu-moe", help="put routed experts of the first N layers on the CPU"
    ),
    "gpu_layers": Option(
        "-ngl",
        "--gpu-layers",
        "--n-gpu-layers",
        metavar="N|all|auto",
        help="put the last N layers on GPUs, the head counting as one",
    ),
    "tensor_split": Option(
        "-ts", "--tensor-split", metavar="A,B,…", help="share of the layers of each GPU"
    ),
    "main_gpu": Option("-mg", "--main-gpu", help="the GPU that gets the head, from 0"),
    "margin": Option(
        "--margin",
        help="memory to leave free on every device",
        show_default="256MiB on the CPU, 1GiB on a GPU",
    ),
    "stream_experts": Option(
        "--stream-experts",
        metavar="N|auto|off",
        help="copy the CPU's experts to a GPU for prompts of N tokens or more",
        show_default="off",
    ),
    "expert_cache": Option(
        "--expert-cache", metavar="SIZE", help="GPU memory for the CPU's most often chosen experts"
    ),
    "no_mmap": Option(
        "--no-mmap", help="read the embedding into memory, too, instead of mapping it"
    ),
    "mlock": Option("--mlock", help="keep everything in physical memory"),
    "max_tokens": Option(
        "-n", "--predict", "--n-predict", help="most tokens to answer; -1 = no limit"
    ),
    "temperature": Option("--temp", "--temperature", help="temperature; 0 = greedy"),
    "top_k": Option("--top-k", help="0 = off"),
    "top_p": Option("--top-p", help="1 = off"),
    "min_p": Option("--min-p", help="0 = off"),
    "repeat_penalty": Option("--repeat-penalty", help="1 = off"),
    "repeat_last_n": Option(
        "--repeat-last-n", help="tokens that the penalties look back on; -1 = all"
    ),
    "presence_penalty": Option("--presence-penalty", help="0 = off"),
    "frequency_penalty": Option("--frequency-penalty", help="0 = off"),
    "seed": Option("-s", "--seed", help="-1 = random"),
    "logit_bias": Option(
        "-l", "--logit-bias", metavar="ID(+/-)BIAS", help="e.g. 15043+1 or 29905-inf"
    ),
    "ignore_eos": Option("--ignore-eos", help="never choose a token that ends the answer"),
    "stop": Option(
        "-r", "--stop", "--reverse-prompt", help="end the answer at this text; may be repeated"
    ),
}
ENGINE = EngineConfig()
SAMPLING = SamplingParams(seed=-1)

# Flags for the signatures of commands.
Threads = Annotated[int, OPTIONS["threads"]]
Ubatch = Annotated[int, OPTIONS["ubatch"]]
Isa = Annotated[str | None, OPTIONS["isa"]]
TensorTypes = Annotated[
    list[str] | None, Option("--tensor-type", metavar="REGEX=TYPE", help="may be repeated")
]

Given = dict[str, Any]  # fields that a group of flags sets, and their values
Group = list[inspect.Parameter]


def flags(
    source: DataclassInstance,
    *names: str,
    unset: bool = False,
    options: Mapping[str, Any] = OPTIONS,
    **changes: Mapping[str, Any],
) -> Group:
    """Make flags for the fields `names` of `source`. Their defaults are the fields' values.

    unset: make flags without a default.
    options: the flag of each field.
    changes: by field, attributes of the flag that differ for this command, such as {"help": "…"}.
    """
    hints = get_type_hints(type(source))
    group = []
    for name in names:
        kind, default = _kind(hints[name]), getattr(source, name)
        if unset or get_origin(kind) is list:
            default = False if kind is bool else None
        option = copy.copy(options[name])
        vars(option).update(changes.get(name, {}))
        shown: Any = Annotated[kind if default is not None else kind | None, option]
        group.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=shown
            )
        )
    return group


def spelled(option: Any) -> list[str]:
    """The names of an option, such as -c and --ctx-size, in their order."""
    # Until typer builds the command, it stores the first name as the default.
    names = [option.default, *(option.param_decls or ())]
    return [name.partition("/")[0] for name in dict.fromkeys(names) if isinstance(name, str)]


def _kind(hint: Any) -> Any:
    """The type of a field's flag: a list of texts, a text, or the type of the field."""
    kinds = get_args(hint | None)
    if any(get_origin(kind) for kind in kinds):
        return list[str]
    return str if str in kinds else kinds[0]


def takes(**groups: Group) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A decorator that replaces parameters of a command by groups of flags.

    groups: flags by the name of the parameter that they replace. The parameter gets a dict with the
    flags that differ from their default. The command may take keyword arguments only.
    """

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        own = inspect.signature(command, eval_str=True)
        shown = [
            flag
            for parameter in own.parameters.values()
            for flag in groups.get(parameter.name, [parameter])
        ]

        @functools.wraps(command)
        def run(**given: Any) -> Any:
            for name, group in groups.items():
                values = [(flag, given.pop(flag.name)) for flag in group]
                given[name] = {flag.name: v for flag, v in values if v != flag.default}
            return command(**given)

        run.__signature__ = own.replace(parameters=shown)  # type: ignore[attr-defined]
        run.__annotations__ = {flag.name: flag.annotation for flag in shown}
        return run

    return decorate
