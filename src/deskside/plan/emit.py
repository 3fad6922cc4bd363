"""Emits a plan as a command line or as unit files.

The command line is for llama.cpp's or ik_llama.cpp's server. The files are a Podman quadlet or
a systemd unit; both start deskside.

In llama.cpp, `-ngl` and `--tensor-split` give each layer's tensors and cache to a device. `-ot`
then moves single tensors. So the layers' mixers decide the split. Tensors elsewhere become `-ot`
rules: one per device and set of layers. The rules have no commas, because llama.cpp splits there.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from deskside.errors import DesksideError
from deskside.machine.devices import CPU
from deskside.plan.plan import Plan
from deskside.plan.rules import layer_of

KINDS = ("llama-server", "ik-llama-server", "podman", "systemd")
PORT = 8080


@dataclass(frozen=True)
class Flags:
    """A placement as llama.cpp's flags. notes: what flags cannot express."""

    gpu_layers: int
    tensor_split: tuple[int, ...]
    overrides: tuple[tuple[str, str], ...]  # regex, our name of the device
    notes: tuple[str, ...] = ()


def flags(plan: Plan) -> Flags:
    """The flags that reproduce the plan's placement. notes: where a layer's state differs."""
    n = 1 + max(op.layer for op in plan.tape.ops)
    gpus = [d.name for d in plan.machine.gpus]
    mixer = _mixers(plan, n)
    head = next(d for name, d in plan.placement.items() if plan.kinds[name] == "head")
    count = _gpu_layers(mixer, head)
    start = n + 1 - count
    dealt = _dealt([*mixer[start:], head], gpus) if count else []
    split = tuple(dealt.count(g) for g in gpus) if len(gpus) > 1 and count else ()
    moved = {name: d for name, d in plan.placement.items() if _default(plan, name, n, dealt) != d}
    dealt_to = [CPU] * min(start, n) + dealt[: n - start]
    elsewhere = [i for i in range(n) if dealt_to[i] != mixer[i]]
    notes = []
    if elsewhere:
        notes.append(f"cache and state of layers {elsewhere} are not where the plan has them")
    stored = {name: w.source or name for name, w in plan.tape.weights().items()}
    places: dict[str, set[str]] = {}
    for name, own in stored.items():
        places.setdefault(own, set()).add(plan.placement[name])
    if torn := [own for own, devices in places.items() if len(devices) > 1]:
        notes.append(f"{torn[0]} is one tensor in the file; the plan has its parts on two devices")
    in_file = {stored[name]: device for name, device in moved.items()}
    overrides = _compact(in_file, set(stored.values()))
    return Flags(count, split, tuple(overrides), tuple(notes))


def _gpu_layers(mixer: Sequence[str], head: str) -> int:
    """`-ngl`: how many of the last layers go to GPUs, with the head as one more layer.

    It is the count at which the fewest layers' caches are on another device than in the plan.
    mixer: the device of each layer.
    """
    n = len(mixer)
    start = min(
        range(n + 1), key=lambda s: (sum((mixer[i] != CPU) != (i >= s) for i in range(n)), s)
    )
    return n + 1 - start if start < n or head != CPU else 0


def _dealt(devices: Sequence[str], gpus: Sequence[str]) -> list[str]:
    """The GPU that llama.cpp gives to each of the last layers and the head. It deals in order."""
    on = _nearest_gpu(devices)
    if len(on) > 1 and on[-1] != on[-2]:
        # llama.cpp deals the head after the last layer; an -ot rule moves it to its device
        on[-1] = max(on[-2:], key=gpus.index)
    return sorted(on, key=gpus.index)


def _default(plan: Plan, name: str, n: int, dealt: Sequence[str]) -> str:
    """The device that llama.cpp gives a tensor without an -ot rule. n: layers of the model."""
    layer = layer_of(name)
    behind = (n if layer is None else layer) - (n + 1 - len(dealt))
    return CPU if behind < 0 or plan.kinds[name] == "embedding" else dealt[behind]


def _nearest_gpu(devices: Sequence[str]) -> list[str]:
    """The devices of layers, with each CPU replaced by the nearest GPU before it, else after it."""
    found = list(devices)
    for i, device in enumerate(found):
        if device == CPU:
            found[i] = found[i - 1] if i else next(d for d in devices if d != CPU)
    return found


def _mixers(plan: Plan, n: int) -> list[str]:
    """The device of each layer's mixer: its attention or delta net, with the state."""
    found = [CPU] * n
    for op in plan.tape.ops:
        if op.state is not None:
            found[op.layer] = plan.state_devices[op.state]
    return found


def _compact(moved: Mapping[str, str], every: Collection[str]) -> list[tuple[str, str]]:
    """Regexes that match exactly the tensors of `moved`."""
    of_suffix: dict[str, set[int]] = {}
    for name in every:
        if (layer := layer_of(name)) is not None:
            of_suffix.setdefault(_suffix(name), set()).add(layer)
    layers: dict[tuple[str, str], set[int]] = {}
    rules: list[tuple[str, str]] = []
    for name, device in moved.items():
        layer = layer_of(name)
        if layer is None:
            rules.append((f"^{_escape(name)}$", device))
        else:
            layers.setdefault((_suffix(name), device), set()).add(layer)
    together: dict[tuple[str, frozenset[int], bool], list[str]] = {}
    for (suffix, device), where in layers.items():
        all_ = where == of_suffix[suffix]
        together.setdefault((device, frozenset() if all_ else frozenset(where), all_), []).append(
            suffix
        )
    for (device, where_, all_), suffixes in together.items():
        number = "" if all_ else f"blk\\.({numbers(where_)})\\."
        rules.append((f"{number}{_names(suffixes)}", device))
    return rules


def _suffix(name: str) -> str:
    return name.split(".", 2)[2]


def _names(suffixes: Sequence[str]) -> str:
    """A regex of tensor names without the layer; experts as users write them."""
    if {s.removesuffix(".weight") for s in suffixes} == {
        f"ffn_{part}_exps" for part in ("gate", "up", "down")
    }:
        return "ffn_(gate|up|down)_exps"
    stems = sorted(_escape(s) for s in suffixes)
    return f"({'|'.join(stems)})$" if len(stems) > 1 else f"{stems[0]}$"


def _escape(text: str) -> str:
    return text.replace(".", "\\.")


def numbers(values: Collection[int]) -> str:
    """A regex that matches exactly these numbers: 0-12 as [0-9]|1[0-2]."""
    digits: dict[int, set[int]] = {}
    for v in values:
        digits.setdefault(v // 10, set()).add(v % 10)
    tens: dict[frozenset[int], list[int]] = {}
    for ten in sorted(digits):
        tens.setdefault(frozenset(digits[ten]), []).append(ten)
    parts: list[tuple[int, str]] = []
    for last, heads in tens.items():
        own = _digits(last)
        if 0 in heads:
            parts.append((0, own))
        for high in sorted({h // 10 for h in heads if h}):
            low = [h % 10 for h in heads if h and h // 10 == high]
            before = str(high) if high else ""
            parts.append((min(h for h in heads if h), f"{before}{_digits(low)}{own}"))
    return "|".join(text for _, text in sorted(parts))


def _digits(values: Collection[int]) -> str:
    ordered = sorted(values)
    if len(ordered) == 1:
        return str(ordered[0])
    if len(ordered) > 2 and ordered[-1] - ordered[0] == len(ordered) - 1:
        return f"[{ordered[0]}-{ordered[-1]}]"
    return "[" + "".join(map(str, ordered)) + "]"


def emit(plan: Plan, kind: str, model: str) -> dict[str, str]:
    """Texts by file name; a command line has the name "".

    kind: one of KINDS. model: the path of the GGUF.
    DesksideError for an unknown kind, control characters in `model`, or what flags cannot express.
    """
    if kind not in KINDS:
        raise DesksideError(f"--emit {kind}: choose one of {', '.join(KINDS)}")
    for name, value in (("file name", model),):
        if not model.isprintable():
            raise DesksideError(f"--emit: the {name} {value!r} has control characters")
    if kind in ("llama-server", "ik-llama-server"):
        return {"": _command(plan, kind, model)}
    if kind == "podman":
        return _podman(plan, model)
    return _systemd(plan, model)


def arguments(plan: Plan, kind: str, model: str) -> list[str]:
    """The words of a command line: of a llama.cpp server, or of `deskside serve`.

    DesksideError for emulated devices on a llama.cpp server.
    """
    o, found = plan.options, flags(plan)
    if kind != "deskside" and any(d.name.startswith("emu") for d in plan.machine.gpus):
        raise DesksideError(
            f"--emit {kind}: emulated devices are deskside only; leave them out of --device"
        )
    theirs = kind != "deskside"
    # llama.cpp's -c counts all sequences together
    words = ["-m", model, "-c", str(o.ctx * (o.parallel if theirs else 1))]
    words += ["-np" if theirs else "--parallel", str(o.parallel), "-ub", str(o.ubatch)]
    words += ["-t", str(o.threads)]
    words += ["-tb", str(o.threads_batch)] if o.threads_batch else []
    words += ["-ctk", o.ctk, "-ctv", o.ctv]
    if theirs and o.ubatch > 2048:
        words += ["-b", str(o.ubatch)]
    if plan.machine.gpus:
        names = [d.name for d in plan.machine.gpus]
        shown = [n.upper() if theirs else f"{n}:{plan.machine.device(n).memory}" for n in names]
        words += ["--device", ",".join(shown)]
    if plan.machine.gpus or theirs:
        words += ["-ngl", str(found.gpu_layers)]
    if found.tensor_split:
        words += ["--tensor-split", ",".join(map(str, found.tensor_split))]
    for regex, device in found.overrides:
        words += ["-ot", f"{regex}={device.upper() if theirs else device}"]
    if kind == "llama-server" and plan.machine.gpus:
        words += ["--fit", "off"]  # --fit would undo the plan
    if kind == "llama-server":
        # one flag in place of --no-mmap and --mlock
        mode = {(True, False): "", (False, False): "none", (False, True): "mlock"}
        value = mode.get((o.mmap, o.mlock), "mmap+mlock")
        return words + (["--load-mode", value] if value else [])
    words += ["--no-mmap"] if not o.mmap else []
    words += ["--mlock"] if o.mlock else []
    return words


def _command(plan: Plan, kind: str, model: str) -> str:
    words = ["llama-server", *arguments(plan, kind, model)]
    lines = [f"# {note}" for note in flags(plan).notes]
    pairs = " \\\n  ".join(_lines(words))
    return "\n".join([*lines, pairs]) + "\n"


def _lines(words: Sequence[str]) -> list[str]:
    """Quoted words: one line per flag with its value."""
    lines: list[str] = []
    for word in words:
        if word.startswith("-") or not lines:
            lines.append(shlex.quote(word))
        else:
            lines[-1] += " " + shlex.quote(word)
    return lines


_PLANNED = (
    "# `deskside serve` comes with a later version; the flags are those of its public contract."
)


def _unit_words(words: Sequence[str]) -> str:
    """The words of an ExecStart. Backslashes, % and $ are escaped, as systemd.service(5) asks."""
    quoted = []
    for word in words:
        safe = word.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
        quoted.append(f'"{safe}"' if any(c in word for c in " \\'\"$%|();#") else safe)
    lines: list[str] = []
    for raw, word in zip(words, quoted, strict=True):
        if raw.startswith("-") or not lines:
            lines.append(word)
        else:
            lines[-1] += " " + word
    return " \\\n    ".join(lines)


def _podman(plan: Plan, model: str) -> dict[str, str]:
    """A quadlet. The model's folder is mounted read-only at /models."""
    folder, _, file = model.rpartition("/")
    words = ["serve", *arguments(plan, "deskside", f"/models/{file}")]
    words += ["--host", "0.0.0.0", "--port", str(PORT)]
    name = "deskside.container"
    return {name: _render(name, plan, words=words, file=file, folder=folder)}


def _systemd(plan: Plan, model: str) -> dict[str, str]:
    words = ["/usr/local/bin/deskside", "serve", *arguments(plan, "deskside", model)]
    words += ["--host", "127.0.0.1", "--port", str(PORT)]
    name = "deskside.service"
    return {name: _render(name, plan, words=words, file=model)}


def _render(name: str, plan: Plan, **values: Any) -> str:
    """The file of this name, from its template next to this module."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"literal": _literal, "exec": _unit_words}
    cuda = any(d.name.startswith("cuda") for d in plan.machine.gpus)
    return environment.get_template(f"{name}.jinja").render(
        planned=_PLANNED,
        port=PORT,
        gpu=bool(plan.machine.gpus),
        cuda=cuda,
        lock=plan.options.mlock or cuda,
        **values,
    )


def _literal(text: str) -> str:
    """Text for a unit file, where % starts a specifier."""
    return text.replace("%", "%%")
