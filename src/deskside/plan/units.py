"""A tape grouped for placing: units, whose tensors share a device, and atoms, which run there.

A unit is what makes sense only as a whole: a layer's mixer (attention or delta net with its state),
its router with norms (of a dense model: its feed-forward block), its shared expert, its routed
experts; the embedding; the head. Tensors that rules pin leave their unit. An atom is a run of ops
of one unit on one device, as the contract with the executor has it: an op runs where its first
weight is, one without weights where its first input was made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deskside.gguf import TensorInfo
from deskside.gguf.roles import Role, role
from deskside.tape import Op, Tape

# Kinds of tensors in budgets, in the order in which they are shown.
SMALL = "norms and router"
KINDS = (
    Role.EXPERTS,
    Role.SHARED,
    Role.ATTENTION,
    Role.DELTA,
    Role.FFN,
    Role.HEAD,
    Role.EMBEDDING,
    SMALL,
)
EMBED, MIXER, FFN, EXPERTS, SHARED, HEAD = "embed", "mixer", "ffn", "experts", "shared", "head"
# Units of the tensors that a layer's other ops follow; all other roles are the mixer's.
_UNITS = {
    Role.EXPERTS: EXPERTS, Role.SHARED: SHARED, Role.FFN: FFN, Role.FFN_NORM: FFN, Role.ROUTER: FFN,
}  # fmt: skip
Key = tuple[int, str]  # layer, role; layer -1 before the first, n_layers behind the last


@dataclass
class Unit:
    """tensors: those that are free to be placed; `pinned` those that rules placed."""

    layer: int
    role: str
    tensors: list[str] = field(default_factory=list)
    pinned: list[str] = field(default_factory=list)


@dataclass
class Atom:
    """Consecutive ops of unit number `unit`; pin: the device they are bound to, None for the
    unit's own. "gpu" is any GPU: the layer's."""

    unit: int
    layer: int
    role: str
    pin: str | None
    ops: list[Op] = field(default_factory=list)


@dataclass
class Grouping:
    """Units and atoms of a tape in its order; `kinds` of all its tensors."""

    tape: Tape
    n_layers: int
    units: list[Unit]
    atoms: list[Atom]
    kinds: dict[str, str]

    def infos(self) -> dict[str, TensorInfo]:
        return self.tape.weights()


def group_units(tape: Tape, pinned: Mapping[str, str]) -> Grouping:
    """`tape` in units and atoms, with the tensors of `pinned` on their devices."""
    n_layers = 1 + max(op.layer for op in tape.ops)
    kinds = tensor_kinds(tape)
    tied = _is_tied(tape)
    units: dict[Key, Unit] = {}
    numbers: dict[Key, int] = {}
    atoms: list[Atom] = []
    part, pin = EMBED, None
    seen: set[str] = set()
    made: dict[int, tuple[Key, str | None]] = {}  # where a value was made
    layer = -1
    for op in tape.ops:
        changed = op.layer != layer
        layer = op.layer
        if op.kind == "embed":
            part = HEAD if tied else EMBED
        elif op.kind == "take_rows":
            part, changed = HEAD, True
        own = [w for w in op.weights if w.name not in seen or w.name == op.weights[0].name]
        if own and layer >= 0 and op.kind != "rope":
            part = _UNITS.get(role(own[0].name), MIXER)
        elif changed and layer >= 0:
            part = MIXER
        place = n_layers if part == HEAD else layer
        key = (place, part)
        if key not in units:
            numbers[key] = len(units)
            units[key] = Unit(place, part)
        unit = units[key]
        for w in op.weights:
            if w.name not in seen:
                seen.add(w.name)
                (unit.pinned if w.name in pinned else unit.tensors).append(w.name)
        # rope's factors are shared by all layers and say nothing about where one runs
        if op.weights and op.kind != "rope":
            pin = pinned.get(op.weights[0].name)
        elif op.inputs and op.inputs[0].id in made and made[op.inputs[0].id][0] == key:
            pin = made[op.inputs[0].id][1]
        elif changed:
            pin = None
        made.update({v.id: (key, pin) for v in op.outputs})
        last = atoms[-1] if atoms else None
        if last is None or (last.unit, last.pin) != (numbers[key], pin):
            atoms.append(Atom(numbers[key], place, part, pin))
        atoms[-1].ops.append(op)
    return Grouping(tape, n_layers, list(units.values()), atoms, kinds)


def _is_tied(tape: Tape) -> bool:
    embedding = next(op.weights[0].name for op in tape.ops if op.kind == "embed")
    return any(op.kind == "linear" and op.weights[0].name == embedding for op in tape.ops)


def tensor_kinds(tape: Tape) -> dict[str, str]:
    """Kind of every tensor that the tape reads; an embedding that is the head too is a head."""
    kinds: dict[str, str] = {}
    for op in tape.ops:
        for w in op.weights:
            kinds[w.name] = _kind(op, w.name)
    return kinds


def _kind(op: Op, name: str) -> str:
    if op.kind == "linear" and op.inputs[0].per_output:
        return Role.HEAD  # the embedding, too, if it is tied
    found = role(name)
    return found if found in KINDS else SMALL
