"""Turns the user's rules of placement, in llama.cpp's flags, into tensor -> device.

The first rule that names a tensor decides. The order is: `-ot` as typed, then `--cpu-moe` or
`--n-cpu-moe`, then `-ngl`. The planner places what no rule names.

`-ot REGEX=DEVICE[,REGEX=DEVICE...]`: the regex is searched in the tensor's name. A rule ends at
`=NAME` before a comma or the end, so a regex may hold commas (`{1,2}`) and equals signs. A regex
with `=WORD,` inside must write that comma as `\\x2c`. Names hold no white space, so white space
around a regex or a device means nothing. A rule may end with a line; a backslash continues one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from deskside.errors import DesksideError
from deskside.gguf.roles import Role, role
from deskside.machine.devices import CPU, canonical

_ENTRY = re.compile(
    r"\s*(?P<regex>\S.*?)\s*=[ \t]*(?P<device>[A-Za-z]\w*)[ \t]*(?:,|\r?\n|\s*$)", re.DOTALL
)
_CONTINUED = re.compile(r"\\\r?\n\s*")
_LAYER = re.compile(r"blk\.(\d+)\.")
ALL_LAYERS = 10**6


@dataclass(frozen=True)
class Override:
    """One REGEX=DEVICE of `-ot`."""

    regex: str
    device: str

    def __str__(self) -> str:
        return f"-ot {self.regex}={self.device}"


@dataclass(frozen=True)
class Rules:
    """The flags that restrict a placement.

    gpu_layers: of `-ngl`, counted from the last, with the head as one more layer. None leaves them
    to the planner. main_gpu: index of the GPU for the head and for tensors outside the layers.
    """

    overrides: tuple[Override, ...] = ()
    cpu_moe: bool = False
    n_cpu_moe: int | None = None
    gpu_layers: int | None = None
    tensor_split: tuple[float, ...] = ()
    main_gpu: int | None = None


@dataclass(frozen=True)
class Pinned:
    """What rules decided. devices, reasons: by tensor name.

    layer_gpu: the GPU of each layer, and of the head as one more; None without `--tensor-split`.
    """

    devices: Mapping[str, str] = field(default_factory=dict)
    reasons: Mapping[str, str] = field(default_factory=dict)
    layer_gpu: tuple[str, ...] | None = None
    head_gpu: str | None = None


def parse_overrides(arguments: Sequence[str]) -> tuple[Override, ...]:
    """The rules of all `-ot` arguments. DesksideError for a bad rule or regex."""
    found = []
    for argument in arguments:
        text, at = _CONTINUED.sub("", argument), 0
        while text[at:].strip():
            entry = _ENTRY.match(text, at)
            if entry is None:
                bad = " ".join(text[at:].split())
                raise DesksideError(f"-ot {bad}: expected REGEX=DEVICE, such as exps=CPU")
            regex = entry["regex"]
            try:
                re.compile(regex)
            except re.error as error:
                raise DesksideError(f"-ot {regex}: not a regex: {error}") from None
            found.append(Override(regex, canonical(entry["device"])))
            at = entry.end()
        if not text.strip():
            raise DesksideError("-ot: expected REGEX=DEVICE, such as exps=CPU")
    return tuple(found)


def parse_gpu_layers(text: str | None) -> int | None:
    """`-ngl`: a number, "all" or "auto". "auto", like no -ngl, leaves it to the planner: None.

    DesksideError for any other text.
    """
    if text is None or text.lower() in ("auto", "-1"):
        return None
    if text.lower() == "all":
        return ALL_LAYERS
    if not text.isascii() or not text.isdigit():
        raise DesksideError(f"-ngl {text}: expected a number of layers, all or auto")
    return min(int(text), ALL_LAYERS)


def parse_split(text: str | None) -> tuple[float, ...]:
    """`--tensor-split 3,1`: shares of the layers, one per GPU. DesksideError for a bad share."""
    if text is None:
        return ()
    try:
        shares = tuple(float(part) for part in re.split(r"[,/]", text))
    except ValueError:
        raise DesksideError(f"--tensor-split {text}: expected numbers such as 3,1") from None
    if not all(0 <= s < 1e9 for s in shares) or not sum(shares) > 0:
        raise DesksideError(f"--tensor-split {text}: expected shares of at least 0, not all 0")
    return shares


def layer_of(name: str) -> int | None:
    """The layer in a tensor's name; None if it belongs to no layer."""
    found = _LAYER.match(name)
    return int(found[1]) if found else None


def apply(
    rules: Rules,
    names: Sequence[str],
    n_layers: int,
    gpus: Sequence[str],
    sources: Mapping[str, str] = MappingProxyType({}),
) -> Pinned:
    """Apply the rules to the tensors `names` of a model of `n_layers` layers.

    sources: of tensors that are rows of another one in the file, that one's name. A rule may mean
    them by it.

    DesksideError for a device that does not exist, for a rule that decides nothing, and for rules
    that contradict each other.
    """
    _check_devices(rules, gpus)
    devices: dict[str, str] = {}
    reasons: dict[str, str] = {}

    def pin(name: str, device: str, reason: str) -> None:
        if name not in devices:
            devices[name], reasons[name] = device, reason

    for rule in rules.overrides:
        matching = [
            n for n in names if any(re.search(rule.regex, s) for s in (n, sources.get(n, n)))
        ]
        free = [n for n in matching if n not in devices]
        if not matching:
            raise DesksideError(f"{rule}: matches no tensor of this model, such as {names[-1]}")
        if not free and any(devices[n] != rule.device for n in matching):
            raise DesksideError(
                f"{rule}: contradicts {reasons[matching[0]]}, which comes first and pins every "
                "tensor that it matches"
            )
        for name in free:
            pin(name, rule.device, str(rule))
    _pin_experts(rules, names, pin, devices, reasons)
    layer_gpu = _split_layers(rules, n_layers, gpus)
    head_gpu = gpus[rules.main_gpu] if rules.main_gpu is not None else None
    if rules.gpu_layers is not None:
        _pin_layers(rules.gpu_layers, names, n_layers, gpus, layer_gpu, head_gpu, pin)
    return Pinned(devices, reasons, layer_gpu, head_gpu)


def _check_devices(rules: Rules, gpus: Sequence[str]) -> None:
    have = ", ".join((CPU, *gpus))
    for rule in rules.overrides:
        if rule.device not in (CPU, *gpus):
            raise DesksideError(f"{rule}: there is no device {rule.device}; the devices are {have}")
    if rules.cpu_moe and rules.n_cpu_moe is not None:
        raise DesksideError("--cpu-moe and --n-cpu-moe contradict each other: give one of them")
    if rules.n_cpu_moe is not None and rules.n_cpu_moe < 0:
        raise DesksideError(f"--n-cpu-moe {rules.n_cpu_moe}: expected a number of layers")
    if rules.tensor_split and len(rules.tensor_split) != len(gpus):
        raise DesksideError(
            f"--tensor-split has {len(rules.tensor_split)} shares, but there are {len(gpus)} GPUs "
            f"({have})"
        )
    if rules.main_gpu is not None and not 0 <= rules.main_gpu < len(gpus):
        raise DesksideError(
            f"--main-gpu {rules.main_gpu}: there are {len(gpus)} GPUs, counted from 0"
        )
    if rules.gpu_layers and not gpus:
        raise DesksideError("-ngl: there is no GPU to put layers on; name one with --device")
    if rules.gpu_layers == 0 and rules.tensor_split:
        raise DesksideError("-ngl 0 and --tensor-split contradict each other: no layer to split")


Pin = Callable[[str, str, str], None]  # tensor, device, reason


def _pin_experts(
    rules: Rules,
    names: Sequence[str],
    pin: Pin,
    devices: Mapping[str, str],
    reasons: Mapping[str, str],
) -> None:
    if not rules.cpu_moe and not rules.n_cpu_moe:
        return
    flag = "--cpu-moe" if rules.cpu_moe else f"--n-cpu-moe {rules.n_cpu_moe}"
    below = ALL_LAYERS if rules.n_cpu_moe is None else rules.n_cpu_moe
    found = [n for n in names if role(n) is Role.EXPERTS and (layer_of(n) or 0) < below]
    if not found:
        raise DesksideError(f"{flag}: this model has no routed experts")
    if all(devices.get(n, CPU) != CPU for n in found):
        raise DesksideError(
            f"{flag}: contradicts {reasons[found[0]]}, which puts all of these experts on GPUs"
        )
    for name in found:
        pin(name, CPU, flag)


def _split_layers(rules: Rules, n_layers: int, gpus: Sequence[str]) -> tuple[str, ...] | None:
    """The GPU of every layer and of the head. Those that `-ngl` offloads are dealt as in llama.cpp:
    in order, in runs, by the shares."""
    if not rules.tensor_split:
        return None
    n = n_layers + 1
    offloaded = n if rules.gpu_layers is None else min(rules.gpu_layers, n)
    total, ends = 0.0, []
    for share in rules.tensor_split:
        total += share
        ends.append(total)
    found = []
    for layer in range(n):
        at = max(0, layer - (n - offloaded)) / offloaded
        g = next((i for i, end in enumerate(ends) if at < end / total), len(gpus) - 1)
        found.append(gpus[g])
    return tuple(found)


def _pin_layers(
    count: int,
    names: Sequence[str],
    n_layers: int,
    gpus: Sequence[str],
    layer_gpu: Sequence[str] | None,
    head_gpu: str | None,
    pin: Pin,
) -> None:
    """Apply -ngl: pin the last `count` of layers and head to GPUs, all other tensors to the CPU.

    The embedding stays on the CPU. With several GPUs and no split, a tensor is pinned to "gpu": the
    planner selects which.
    """
    flag = "-ngl all" if count >= ALL_LAYERS else f"-ngl {count}"
    start = n_layers + 1 - min(count, n_layers + 1)
    for name in names:
        layer = layer_of(name)
        if role(name) is Role.EMBEDDING:
            pin(name, CPU, flag)
            continue
        layer = n_layers if layer is None else layer
        if layer < start:
            pin(name, CPU, flag)
        elif layer == n_layers and head_gpu:
            pin(name, head_gpu, f"{flag}, --main-gpu")
        elif layer_gpu:
            pin(name, layer_gpu[layer], f"{flag}, --tensor-split")
        elif len(gpus) == 1:
            pin(name, gpus[0], flag)
        else:
            pin(name, "gpu", flag)
