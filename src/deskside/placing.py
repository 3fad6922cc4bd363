"""From an engine's options to a plan: which machine, which rules, and what the user is told.

A GPU is used where `devices` names it, or where another option asks for one. Without either the CPU
does everything, for no GPU has run this code yet (README).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from deskside import rules
from deskside.config import EngineConfig
from deskside.devices import CPU, Machine, choose_devices, parse_size
from deskside.errors import DesksideError
from deskside.machines import this_machine
from deskside.plan import DoesNotFit, Options, Plan, make_plan
from deskside.plan_ways import ways_out
from deskside.tape import Tape

_NO_GPU = "does nothing: there is no GPU to use"


@dataclass(frozen=True)
class Placing:
    """plan: None where there is nothing to decide; notes: lines for the user."""

    plan: Plan | None = None
    notes: tuple[str, ...] = ()

    @property
    def over_devices(self) -> bool:
        """Whether anything but the CPU is used."""
        return self.plan is not None and self.plan.used not in ((), (CPU,))


def place(tape: Tape, config: EngineConfig, ctx: int, ubatch: int) -> Placing:
    """The plan of a model under an engine's options; nothing is loaded. ctx, ubatch: tokens, as the
    engine will have them. DesksideError for options that make no sense or cannot be met, with the
    ways out."""
    wishes = rules_of(config)
    if config.devices is None and wishes == rules.Rules() and config.margin is None:
        return Placing()
    if config.backend != "cpu":
        raise DesksideError(f"--backend {config.backend} computes everything in one place: leave "
                            "out --device and the rules of placement")  # fmt: skip
    machine = this_machine(config.n_threads)
    unasked = config.devices is None and not _wants_gpu(wishes)
    machine = machine_of(config, machine, ["none"] if unasked else None)
    notes: list[str] = []
    if not machine.gpus:
        wishes, notes = _without_gpu(wishes)
    options = Options(
        ctx=ctx, ubatch=ubatch, ctk=config.ctk, ctv=config.ctv, threads=config.n_threads
    )
    try:
        plan = make_plan(tape, machine, wishes, options)
    except DoesNotFit as refusal:
        ways = "; or ".join(w.flags for w in ways_out(tape, machine, wishes, options))
        raise DesksideError(f"{refusal}{'; enough would be: ' if ways else ''}{ways}") from None
    return Placing(plan, tuple(notes))


def rules_of(config: EngineConfig) -> rules.Rules:
    """What the options ask for; DesksideError for one that is none."""
    texts = config.override_tensor
    layers = config.gpu_layers
    return rules.Rules(
        rules.parse_overrides([texts] if isinstance(texts, str) else texts),
        config.cpu_moe,
        config.n_cpu_moe,
        rules.parse_gpu_layers(None if layers is None else str(layers)),
        rules.parse_split(config.tensor_split),
        config.main_gpu,
    )


def machine_of(
    config: EngineConfig, machine: Machine, devices: Sequence[str] | None = None
) -> Machine:
    """`machine` with the devices of the options, or with these, and their margin."""
    asked = devices if devices is not None else config.devices or ()
    if isinstance(asked, str):
        asked = [asked]
    entries = [e for text in asked for e in text.split(",") if e.strip()]
    margin = None if config.margin is None else parse_size(config.margin, "--margin")
    return choose_devices(machine, entries, margin)


def _wants_gpu(wishes: rules.Rules) -> bool:
    elsewhere = any(rule.device != CPU for rule in wishes.overrides)
    moe = wishes.cpu_moe or wishes.n_cpu_moe is not None
    layers = wishes.gpu_layers is not None and wishes.gpu_layers > 0
    return elsewhere or moe or layers or bool(wishes.tensor_split) or wishes.main_gpu is not None


def _without_gpu(wishes: rules.Rules) -> tuple[rules.Rules, list[str]]:
    """What is left of rules on a machine without a GPU: command lines for llama.cpp work there,
    too. Rules that name a device stay, and are refused."""
    named = {
        "-ngl": bool(wishes.gpu_layers),
        "--tensor-split": bool(wishes.tensor_split),
        "--main-gpu": wishes.main_gpu is not None,
    }
    notes = [f"{flag} {_NO_GPU}" for flag, given in named.items() if given]
    return replace(wishes, gpu_layers=None, tensor_split=(), main_gpu=None), notes
