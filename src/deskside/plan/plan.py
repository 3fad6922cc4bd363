"""A plan: its options, the bytes on every device, the predicted rates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from deskside.errors import DesksideError
from deskside.lowering.memory import StepShape
from deskside.machine.devices import Device, Machine
from deskside.plan.rules import Rules
from deskside.plan.speed import Rate, Replayed
from deskside.tape import Tape
from deskside.tape.cache import kv_type


@dataclass(frozen=True)
class Options:
    """What a plan is made for. DesksideError for counts below 1 or an unknown cache type.

    ctx       tokens of one sequence
    parallel  sequences
    reserved  bytes by device for offloaded experts: staging slots and expert cache
    shapes    the steps that run; () for one of `ubatch` tokens
    threads_batch
              threads while a prompt is computed; 0 for as many as `threads`
    The rest is as in `EngineConfig`.
    """

    ctx: int
    ubatch: int = 512
    parallel: int = 1
    ctk: str = "f16"
    ctv: str = "f16"
    threads: int = 1
    threads_batch: int = 0
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
    def most_threads(self) -> int:
        """Threads that have work memory."""
        return max(self.threads, self.threads_batch)

    @property
    def resident(self) -> bool:
        """Whether the embedding table, too, must be read into memory."""
        return self.mlock or not self.mmap


@dataclass(frozen=True)
class Usage:
    """Bytes on one device. weights: by kind. mapped: bytes in the mapped file, not counted."""

    device: Device
    weights: Mapping[str, int]
    mapped: int
    kv: int
    recurrent: int
    buffers: int
    reserved: int = 0

    @property
    def held(self) -> int:
        """Bytes taken, without the margin."""
        parts = (self.kv, self.recurrent, self.buffers, self.reserved)
        return sum(self.weights.values()) + sum(parts)

    @property
    def total(self) -> int:
        """Bytes taken, with the margin."""
        return self.held + self.device.margin

    @property
    def free(self) -> int:
        return self.device.memory - self.total


@dataclass(frozen=True)
class Plan:
    """A placement that fits. placement, reasons, kinds: by tensor name. state_devices: by state.

    replayed: what others published for this machine, where the context holds it.
    """

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
    replayed: tuple[Replayed, ...] = ()

    @property
    def used(self) -> tuple[str, ...]:
        """The devices that hold a tensor or a state."""
        holds = {*self.placement.values(), *self.state_devices}
        return tuple(d.name for d in self.machine.devices if d.name in holds)


class DoesNotFit(DesksideError):
    """No placement under the rules fits.

    shortfall: missing bytes by device, of the placement that lacks least.
    """

    def __init__(self, message: str, shortfall: Mapping[str, int]) -> None:
        super().__init__(message)
        self.shortfall = dict(shortfall)
