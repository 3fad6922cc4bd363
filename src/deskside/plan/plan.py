"""A plan: its options, what lies on every device, its predicted rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deskside.errors import DesksideError
from deskside.lowering.memory import StepShape
from deskside.machine.devices import Device, Machine
from deskside.plan.rules import Rules
from deskside.plan.speed import Rate
from deskside.tape import Tape
from deskside.tape.cache import kv_type


@dataclass(frozen=True)
class Options:
    """ctx: tokens of one sequence; parallel: sequences; reserved: bytes by device for experts that
    pass through it or are cached there; shapes: how steps run where that is so; the rest as in
    `EngineConfig`."""

    ctx: int
    ubatch: int = 512
    parallel: int = 1
    ctk: str = "f16"
    ctv: str = "f16"
    threads: int = 1
    mmap: bool = True
    mlock: bool = False
    reserved: Mapping[str, int] = field(default_factory=dict)
    shapes: tuple[StepShape, ...] = ()

    def __post_init__(self) -> None:
        for flag, value in (("-c", self.ctx), ("-ub", self.ubatch), ("--parallel", self.parallel)):
            if value < 1:
                raise DesksideError(f"{flag} {value}: expected at least 1")
        kv_type(self.ctk, "-ctk")
        kv_type(self.ctv, "-ctv")

    @property
    def resident(self) -> bool:
        """Whether even the embedding table must lie in memory that is taken."""
        return self.mlock or not self.mmap


@dataclass(frozen=True)
class Usage:
    """Bytes on one device. `mapped` lies in the mapped file and is not counted."""

    device: Device
    weights: Mapping[str, int]
    mapped: int
    kv: int
    recurrent: int
    buffers: int
    reserved: int = 0

    @property
    def held(self) -> int:
        parts = (self.kv, self.recurrent, self.buffers, self.reserved)
        return sum(self.weights.values()) + sum(parts)

    @property
    def total(self) -> int:
        """With the margin."""
        return self.held + self.device.margin

    @property
    def free(self) -> int:
        return self.device.memory - self.total


@dataclass(frozen=True)
class Plan:
    """A placement that fits. placement and reasons by tensor, states by their number."""

    tape: Tape
    options: Options
    machine: Machine
    rules: Rules
    placement: Mapping[str, str]
    reasons: Mapping[str, str]
    state_devices: tuple[str, ...]
    kinds: Mapping[str, str]
    usage: tuple[Usage, ...]
    rates: tuple[Rate, ...]

    @property
    def used(self) -> tuple[str, ...]:
        """Devices that hold something."""
        holds = {*self.placement.values(), *self.state_devices}
        return tuple(d.name for d in self.machine.devices if d.name in holds)


class DoesNotFit(DesksideError):
    """No placement under the rules fits. shortfall: bytes by device, of the placement that lacks
    least; pinned: the rules that put most on those devices."""

    def __init__(self, message: str, shortfall: Mapping[str, int]) -> None:
        super().__init__(message)
        self.shortfall = dict(shortfall)
