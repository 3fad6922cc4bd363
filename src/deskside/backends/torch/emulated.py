"""A device emulated on the CPU: a budget of bytes, and a meter of what torch allocates."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class OutOfBudget(Exception):
    """An emulated device holds more than it may: by `args[0]` bytes."""


class Meter(TorchDispatchMode):  # type: ignore[misc]
    """Counts the live bytes of all storages that were made while it was active."""

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
