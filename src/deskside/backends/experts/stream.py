"""Streams experts of the host through a device, which computes them: for long prompts.

In a batch of many tokens, each expert has enough tokens that a copy to the device takes less time
than computing on the host (`plan/stream.py` has the numbers). Experts are copied to a few staging
slots in the device's memory, several per slot. While the device computes from one slot, the next
ones are filled.

After a layer's last experts, the first of the next layer are copied ahead, before its router has
selected. This happens only if the batch is so large that nearly all of them will be selected.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from deskside.backends.experts.copies import Copier, Layout, Source
from deskside.backends.experts.resident import Residents
from deskside.backends.torch.device import TorchDevice, show
from deskside.backends.torch.expert_ops import Matrices, Offloads
from deskside.errors import DesksideError
from deskside.lowering.scratch import FEW_PAIRS
from deskside.tape import Op

SURE = 8  # tokens per expert, on average, from which on all experts are expected to be selected


@dataclass(frozen=True)
class StreamOptions:
    """In batches of `min_tokens` or more tokens, `device` computes the host's experts.

    slot_bytes  of one staging slot; it holds as many whole experts as fit
    slots       number of staging slots, at least 2
    host_below  experts with fewer tokens in a batch stay on the host, at the same time; 0 for none

    DesksideError for counts out of range.
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

    def min_batch(self, top_k: int) -> int:
        """The smallest batch that streams, in tokens. It has more than FEW_PAIRS pairs."""
        return max(2, self.min_tokens, FEW_PAIRS // top_k + 1)

    def nbytes(self, layouts: Mapping[int, Layout]) -> int:
        """Bytes of the device's memory. DesksideError if a slot is smaller than one expert."""
        largest = max(layout.nbytes for layout in layouts.values())
        if self.slot_bytes < largest:
            raise DesksideError(
                f"streaming experts to {self.device}: a slot of {show(self.slot_bytes)} is too "
                f"small for an expert of {show(largest)}; give slots of at least that"
            )
        return self.slots * self.slot_bytes


@dataclass(frozen=True)
class Fetch:
    """Experts of a layer that are, or will be, one after another in a slot. job: the copy."""

    layer: int
    experts: list[int]
    slot: Tensor
    job: Future[Any]


class Streamer(Offloads):
    """Supplies a device with the experts of one layer after another.

    layouts: by layer. residents: experts on the same device that need no copy; None without cache.
    """

    def __init__(
        self,
        options: StreamOptions,
        device: TorchDevice,
        layouts: Mapping[int, Layout],
        source: Source,
        n_threads: int,
        residents: Residents | None,
    ) -> None:
        self.options = options
        self.device = device
        self.experts = self.nbytes = self.resident = 0  # experts copied, their bytes, spared
        self._layouts = layouts
        self._residents = residents
        with device.guard("making room for staging slots"):
            self._slots = [
                torch.empty(options.slot_bytes, dtype=torch.uint8, device=device.device)
                for _ in range(options.slots)
            ]
        self._copier = Copier(device.device, source, options.slot_bytes, options.slots, n_threads)
        self._turn = 0
        self._following = dict(pairwise(layouts))  # layer -> the next one that streams
        self._ahead: list[Fetch] = []
        self._pass: _Pass | None = None

    def divide(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        chosen = ids.long()
        n_expert = self._layouts[layer].parts[0][0].shape[2]
        # Not bincount: its result's length depends on the ids, so the host would have to wait.
        counts = torch.zeros(n_expert, dtype=torch.long, device=ids.device)
        counts.scatter_add_(0, chosen.reshape(-1), torch.ones_like(chosen).reshape(-1))
        there = counts[chosen] >= self.options.host_below
        if self._residents is not None:
            there |= self._residents.held(layer, chosen)
        return ids.masked_fill(~there, -1.0), ids.masked_fill(there, -1.0)

    def each(self, op: Op, experts: list[int], pairs: int) -> Callable[[int], Matrices]:
        if self._pass is not None:
            self._pass.done()
        self._pass = _Pass(self, op, experts, pairs)
        return self._pass.matrices

    def done(self) -> None:
        """End the layer: its last slot is free."""
        if self._pass is not None:
            self._pass.done()
        self._pass = None

    def drain(self) -> None:
        """Wait until no copy is under way, and forget the layer and what was copied ahead."""
        self._copier.drain()
        self._pass = None
        self._ahead = []

    def coming(self, layer: int, experts: Iterable[int]) -> list[list[int]]:
        """The experts that are not resident, in groups that fill a slot."""
        left = [e for e in experts if not self._is_resident(layer, e)]
        size = self.options.slot_bytes // self._layouts[layer].nbytes
        return [left[i : i + size] for i in range(0, len(left), size)]

    def _is_resident(self, layer: int, e: int) -> bool:
        return self._residents is not None and self._residents.slot(layer, e) is not None

    def fetch(self, layer: int, group: list[int]) -> Fetch:
        """Start to copy a group to the next slot in turn, which must be free."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        layout = self._layouts[layer]
        self.experts += len(group)
        self.nbytes += len(group) * layout.nbytes
        return Fetch(layer, group, slot, self._copier.copy(layout, group, slot))

    def fetch_ahead(self, layer: int) -> bool:
        """Start to copy the next group of the layer after `layer`. False if there is no more."""
        following = self._following.get(layer)
        if following is None:
            return False
        n_expert = self._layouts[following].parts[0][0].shape[2]
        groups = self.coming(following, range(n_expert))[len(self._ahead) :]
        if not groups:
            return False
        self._ahead.append(self.fetch(following, groups[0]))
        return True

    def take_ahead(self, layer: int, groups: list[list[int]]) -> list[Fetch]:
        """The copies started ahead, if they are what `groups` needs first; else none."""
        ahead, self._ahead = self._ahead, []
        needed = groups[: len(ahead)]
        return (
            ahead if [(f.layer, f.experts) for f in ahead] == [(layer, g) for g in needed] else []
        )


class _Pass:
    """A layer's experts, passing through the slots. pairs: of token and expert in the batch.

    The next layer's experts follow if there are SURE pairs per expert.
    """

    def __init__(self, streamer: Streamer, op: Op, experts: list[int], pairs: int) -> None:
        self._s = streamer
        self._op = op
        self._layout = streamer._layouts[op.layer]
        groups = streamer.coming(op.layer, experts)
        streamer.resident += len(experts) - sum(map(len, groups))
        self._fetched = deque(streamer.take_ahead(op.layer, groups))
        self._left = deque(groups[len(self._fetched) :])
        self._current: Fetch | None = None
        n_expert = op.weights[0].shape[2]
        self._sure = pairs >= SURE * n_expert and streamer.options.host_below <= 1
        while len(self._fetched) + len(streamer._ahead) < streamer.options.slots:
            if not self._fill():
                break

    def _fill(self) -> bool:
        """Start to fill a free slot. False if there is nothing left to copy."""
        if self._left:
            self._fetched.append(self._s.fetch(self._op.layer, self._left.popleft()))
            return True
        return self._sure and self._s.fetch_ahead(self._op.layer)

    def matrices(self, e: int) -> Matrices:
        """The matrices of expert `e`. Waits for its copy. Ask for experts in the given order."""
        s = self._s
        if s._residents is not None and s._is_resident(self._op.layer, e):
            return s._residents.matrices(self._op, e)
        if self._current is None or e not in self._current.experts:
            self.done()
            self._current = self._fetched.popleft()
            s.device.beat(f"streaming experts of layer {self._op.layer}")
            s._copier.arrived(self._current.job.result())
        at = self._current.experts.index(e) * self._layout.nbytes
        return self._layout.matrices(self._current.slot[at:])

    def done(self) -> None:
        """Free the slot that was computed from, and start to fill it."""
        if self._current is not None:
            self._current = None
            self._fill()
