"""Long prompts: experts of the host pass through a device, which computes them.

A batch of many tokens uses every expert of a layer often enough that bringing it to a device takes
less time than computing it on the host (`plan_stream` has the numbers). Experts pass through a few
slots of the device's memory, several at a time; while one slot is computed on, the next ones are
filled. Behind a layer's last experts come the first ones of the next layer, before it is known
which of them are chosen, if the batch is so large that it must be nearly all.
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

SURE = 8  # pairs of token and expert for each expert, from which on all are expected to be chosen


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

    def min_batch(self, top_k: int) -> int:
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


@dataclass(frozen=True)
class Fetch:
    """Experts of a layer that are or will be side by side in a slot."""

    layer: int
    experts: list[int]
    slot: Tensor
    job: Future[Any]


class Streamer(Offloads):
    """Supplies a device with the experts of one layer after another. layouts: by layer."""

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
        self.experts = self.nbytes = self.resident = 0  # copied, their bytes, spared
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
        # Not bincount: its result would be as long as the largest id, and the device would wait.
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
        """The layer is computed: its last slot is free."""
        if self._pass is not None:
            self._pass.done()
        self._pass = None

    def drain(self) -> None:
        """Nothing is under way any more, nor expected."""
        self._copier.drain()
        self._pass = None
        self._ahead = []

    def coming(self, layer: int, experts: Iterable[int]) -> list[list[int]]:
        """Those that are not resident, in groups of a slot."""
        left = [e for e in experts if not self._is_resident(layer, e)]
        size = self.options.slot_bytes // self._layouts[layer].nbytes
        return [left[i : i + size] for i in range(0, len(left), size)]

    def _is_resident(self, layer: int, e: int) -> bool:
        return self._residents is not None and self._residents.slot(layer, e) is not None

    def fetch(self, layer: int, group: list[int]) -> Fetch:
        """Into the next slot in turn, which must be free."""
        slot = self._slots[self._turn]
        self._turn = (self._turn + 1) % len(self._slots)
        layout = self._layouts[layer]
        self.experts += len(group)
        self.nbytes += len(group) * layout.nbytes
        return Fetch(layer, group, slot, self._copier.bring(layout, group, slot))

    def fetch_ahead(self, layer: int) -> bool:
        """Of the layer behind this one, what it is sure to need; False if there is no more."""
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
        """What was fetched ahead, if it is what is needed."""
        ahead, self._ahead = self._ahead, []
        needed = groups[: len(ahead)]
        return (
            ahead if [(f.layer, f.experts) for f in ahead] == [(layer, g) for g in needed] else []
        )


class _Pass:
    """A layer's experts on their way through the slots; those of the next layer follow where so
    many pairs of token and expert leave hardly one of its experts out."""

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
        """A slot is free; False if nothing is to come."""
        if self._left:
            self._fetched.append(self._s.fetch(self._op.layer, self._left.popleft()))
            return True
        return self._sure and self._s.fetch_ahead(self._op.layer)

    def matrices(self, e: int) -> Matrices:
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
        """The slot computed on is free."""
        if self._current is not None:
            self._current = None
            self._fill()
