"""Long prompts: experts of the host pass through a device, which computes them.

A batch of many tokens uses every expert of a layer often enough that bringing it to a device takes
less time than computing it on the host (`plan_stream` has the numbers). Experts pass through a few
slots of the device's memory, several at a time; while one slot is computed on, the next ones are
filled.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from deskside.backends.expert_cache import Residents
from deskside.backends.expert_copies import Copier, FileSource, Layout
from deskside.backends.torch_device import TorchDevice, show
from deskside.backends.torch_experts import Matrices
from deskside.backends.torch_ops import FEW_PAIRS
from deskside.errors import DesksideError
from deskside.tape import Op


@dataclass(frozen=True)
class StreamOptions:
    """Batches of at least `min_tokens` have their experts computed on `device`.

    slot_bytes: of one staging slot, which holds as many whole experts as fit; there are `slots`.
    host_below: experts with fewer tokens in a batch are computed on the host at the same time; 0
    for none. DesksideError for counts that make no sense.
    """

    device: str
    min_tokens: int
    slot_bytes: int
    slots: int = 2
    host_below: int = 0

    def __post_init__(self) -> None:
        if self.min_tokens < 1 or self.slots < 2 or self.host_below < 0:
            raise DesksideError(
                "streaming experts: expected min_tokens of at least 1, 2 or more slots, and "
                f"host_below of at least 0, got {self.min_tokens}, {self.slots}, {self.host_below}"
            )

    def least(self, top_k: int) -> int:
        """Tokens from which on batches stream: fewer pairs than that are computed another way."""
        return max(2, self.min_tokens, FEW_PAIRS // top_k + 1)

    def nbytes(self, layouts: Mapping[int, Layout]) -> int:
        """Of the device's memory; DesksideError where a slot is smaller than one expert."""
        largest = max(layout.nbytes for layout in layouts.values())
        if self.slot_bytes < largest:
            raise DesksideError(
                f"streaming experts to {self.device}: a slot of {show(self.slot_bytes)} holds no "
                f"expert of {show(largest)}; give slots of at least that"
            )
        return self.slots * self.slot_bytes


class Streamer:
    """Lends a device the experts of one layer after another. layouts: by layer."""

    def __init__(
        self,
        options: StreamOptions,
        device: TorchDevice,
        layouts: Mapping[int, Layout],
        source: FileSource,
        residents: Residents | None,
    ) -> None:
        self.options = options
        self.device = device
        self.experts = self.nbytes = self.resident = 0  # copied, their bytes, spared
        self._layouts = layouts
        self._residents = residents
        with device.guard("making room for staging slots"):
            self._slots = [
                torch.empty(options.slot_bytes, dtype=torch.uint8, device=device.device)
                for _ in range(options.slots)
            ]
        self._copier = Copier(device.device, source, options.slot_bytes, options.slots)

    def divide(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        chosen = ids.long()
        n_expert = self._layouts[layer].parts[0][0].shape[2]
        # Not bincount: its result would be as long as the largest id, and the device would wait.
        counts = torch.zeros(n_expert, dtype=torch.long, device=ids.device)
        counts.scatter_add_(0, chosen.reshape(-1), torch.ones_like(chosen).reshape(-1))
        own = counts[chosen] >= self.options.host_below
        if self._residents is not None:
            own |= self._residents.held(layer, chosen)
        return ids.masked_fill(~own, -1.0), ids.masked_fill(own, -1.0)

    def gathers(self) -> bool:
        return False

    def stacks(self, op: Op) -> Matrices:
        raise NotImplementedError

    def places(self, layer: int, ids: Tensor) -> Tensor:
        raise NotImplementedError

    def each(self, op: Op, experts: list[int]) -> Callable[[int], Matrices]:
        return _Pass(self, op, experts).matrices

    def drain(self) -> None:
        self._copier.drain()


class _Pass:
    """A layer's experts on their way through the slots."""

    def __init__(self, streamer: Streamer, op: Op, experts: list[int]) -> None:
        self._s = streamer
        self._op = op
        self._layout = streamer._layouts[op.layer]
        residents = streamer._residents
        there = {e for e in experts if residents and residents.slot(op.layer, e) is not None}
        streamer.resident += len(there)
        coming = [e for e in experts if e not in there]
        size = streamer.options.slot_bytes // self._layout.nbytes
        self._groups = [coming[i : i + size] for i in range(0, len(coming), size)]
        self._jobs: list[Future[Any]] = []
        self._here = -1  # the group that is being computed
        while len(self._jobs) < min(len(self._groups), streamer.options.slots):
            self._fetch()

    def _fetch(self) -> None:
        n = len(self._jobs)
        group = self._groups[n]
        slot = self._s._slots[n % len(self._s._slots)]
        self._jobs.append(self._s._copier.bring(self._layout, group, slot))
        self._s.experts += len(group)
        self._s.nbytes += len(group) * self._layout.nbytes

    def matrices(self, e: int) -> Matrices:
        s, residents = self._s, self._s._residents
        if residents is not None and residents.slot(self._op.layer, e) is not None:
            return residents.matrices(self._op, e)
        if self._here < 0 or e not in self._groups[self._here]:
            self._next()
        i = self._groups[self._here].index(e)
        slot = s._slots[self._here % len(s._slots)]
        return self._layout.matrices(slot[i * self._layout.nbytes :])

    def _next(self) -> None:
        """The slot computed on is free: its next group comes, and the one after it is awaited."""
        if self._here >= 0 and len(self._jobs) < len(self._groups):
            self._fetch()
        self._here += 1
        self._s.device.beat(f"streaming experts of layer {self._op.layer}")
        self._s._copier.arrived(self._jobs[self._here].result())
