"""Groups a tape for placement: units, whose tensors share a device, and atoms, which run there.

A unit is placed as a whole. Units are:

- a layer's mixer: attention or delta net, with its state
- its router with norms; in a dense model, its feed-forward block
- its shared expert
- its routed experts
- the embedding
- the head

Tensors that rules pin leave their unit. An atom is a run of ops of one unit on one device. As in
`lowering/sections.py`, an op runs where its first weight is; without weights, where its first input
was made.
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
    """tensors: free to be placed. pinned: placed by rules."""

    layer: int
    role: str
    tensors: list[str] = field(default_factory=list)
    pinned: list[str] = field(default_factory=list)


@dataclass
class Atom:
    """Consecutive ops of unit number `unit`. pin: the device that rules bind them to; None for the
    unit's device; "gpu" for the layer's GPU."""

    unit: int
    layer: int
    role: str
    pin: str | None
    ops: list[Op] = field(default_factory=list)


@dataclass
class Grouping:
    """Units and atoms of a tape, in its order. kinds: of all its tensors."""

    tape: Tape
    n_layers: int
    units: list[Unit]
    atoms: list[Atom]
    kinds: dict[str, str]

    def infos(self) -> dict[str, TensorInfo]:
        return self.tape.weights()


def group_units(tape: Tape, pinned: Mapping[str, str]) -> Grouping:
    """Groups `tape` into units and atoms. pinned: tensor -> device, as the rules have it."""
    grouper = _Grouper(tape, pinned)
    layer = -1
    for op in tape.ops:
        grouper.add(op, changed=op.layer != layer or op.kind == "take_rows")
        layer = op.layer
    return Grouping(tape, grouper.n_layers, grouper.units, grouper.atoms, tensor_kinds(tape))


class _Grouper:
    """Units and atoms of the ops so far. _part, _pin: the last op's role and its pinned device."""

    def __init__(self, tape: Tape, pinned: Mapping[str, str]) -> None:
        self.n_layers = 1 + max(op.layer for op in tape.ops)
        self.units: list[Unit] = []
        self.atoms: list[Atom] = []
        self._pinned = pinned
        self._tied = _is_tied(tape)
        self._numbers: dict[Key, int] = {}
        self._seen: set[str] = set()
        self._made: dict[int, tuple[Key, str | None]] = {}  # where a value was made
        self._part = EMBED
        self._pin: str | None = None

    def add(self, op: Op, *, changed: bool) -> None:
        """Add the next op of the tape. changed: whether it begins a layer or the head."""
        self._part = self._part_of(op, changed)
        layer = self.n_layers if self._part == HEAD else op.layer
        key = (layer, self._part)
        number = self._numbers.setdefault(key, len(self.units))
        if number == len(self.units):
            self.units.append(Unit(*key))
        unit = self.units[number]
        for name in (w.name for w in op.weights):
            if name not in self._seen:
                self._seen.add(name)
                (unit.pinned if name in self._pinned else unit.tensors).append(name)
        self._pin = self._pin_of(op, key, changed)
        self._made.update({v.id: (key, self._pin) for v in op.outputs})
        last = self.atoms[-1] if self.atoms else None
        if last is None or (last.unit, last.pin) != (number, self._pin):
            self.atoms.append(Atom(number, layer, self._part, self._pin))
        self.atoms[-1].ops.append(op)

    def _part_of(self, op: Op, changed: bool) -> str:
        if op.layer >= 0 and _is_bound(op):
            return _UNITS.get(role(op.weights[0].name), MIXER)
        if op.layer >= 0 and changed:
            return MIXER
        if op.kind == "embed":
            return HEAD if self._tied else EMBED
        return HEAD if op.kind == "take_rows" else self._part

    def _pin_of(self, op: Op, key: Key, changed: bool) -> str | None:
        if _is_bound(op):
            return self._pinned.get(op.weights[0].name)
        made, pin = self._made.get(op.inputs[0].id, (None, None)) if op.inputs else (None, None)
        if made == key:
            return pin
        return None if changed else self._pin


def _is_bound(op: Op) -> bool:
    """Whether its first weight decides where it runs. Rope's does not: all layers share it."""
    return bool(op.weights) and op.kind != "rope"


def _is_tied(tape: Tape) -> bool:
    embedding = next(op.weights[0].name for op in tape.ops if op.kind == "embed")
    return any(op.kind == "linear" and op.weights[0].name == embedding for op in tape.ops)


def tensor_kinds(tape: Tape) -> dict[str, str]:
    """The kind of every tensor that the tape reads. A tied embedding is a head."""
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
