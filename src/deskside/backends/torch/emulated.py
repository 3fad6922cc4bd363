"""Emulates a device such as `emu0:96GiB`: torch computes on the CPU, within a budget of bytes.

Every byte that torch allocates for it is counted. Beyond the budget it fails, as a real device.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from deskside.backends.torch.device import TorchDevice, show
from deskside.backends.torch.kernels import NONE, Kernels
from deskside.errors import DesksideError


class OutOfBudget(Exception):
    """An emulated device exceeds its budget by `args[0]` bytes."""


class Meter(TorchDispatchMode):  # type: ignore[misc]
    """Counts the live bytes of all storages that torch makes while it is active.

    OutOfBudget as soon as they exceed `budget`.
    """

    def __init__(self, budget: int) -> None:
        super().__init__()
        self.budget = budget
        self.live = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        if storage in self._seen:
            return
        self._seen[storage] = True
        nbytes = storage.nbytes()
        weakref.finalize(storage, self._free, nbytes)
        self.live += nbytes
        self.peak = max(self.peak, self.live)
        if self.live > self.budget:
            raise OutOfBudget(self.live - self.budget)

    def _free(self, nbytes: int) -> None:
        self.live -= nbytes


class EmulatedDevice(TorchDevice):
    """A device on the CPU that may hold `budget` bytes."""

    budget: int

    def __init__(self, name: str, budget: int, *, kernels: Kernels = NONE) -> None:
        super().__init__(name, torch.device("cpu"), kernels=kernels, graphs=False)
        self.budget = budget
        self.meter = Meter(budget)

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        try:
            with super().guard(doing), self.meter:
                yield
        except OutOfBudget as error:
            raise DesksideError(
                f"device {self.name} has no room while {doing}: {show(error.args[0])} short of its "
                f"{show(self.meter.budget)}; lower -c or -ub, or place fewer tensors on it"
            ) from None

    def free(self) -> int:
        return self.meter.budget - self.meter.live
