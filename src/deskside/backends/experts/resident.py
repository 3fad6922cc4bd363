"""The expert cache: spare memory of a device holds single experts of layers on the host.

Of the experts that a batch selects, the device computes those that it holds. The host computes the
rest at the same time.

After a step, the hottest experts that were missed are promoted: they are copied to the device, and
the coldest are evicted for them. Counts alone decide this, so the same requests lead to the same
contents. On an emulated device, promotions end with the step. On CUDA they run beside the next
steps; an expert is used from the first step that begins after its copy is done.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deskside.backends.experts.copies import Copier, Layout, Source
from deskside.backends.torch.device import TorchDevice, show
from deskside.backends.torch.expert_ops import Gathers, Matrices, Offloads
from deskside.errors import DesksideError
from deskside.lowering.scratch import table_bytes
from deskside.tape import Op

POLICIES = ("lfu", "lru")
STAGED = 4  # promotions under way at a time


@dataclass(frozen=True)
class ExpertCache:
    """Options of an expert cache: `nbytes` of `device`'s memory.

    policy          "lfu" keeps the experts selected most often, "lru" those selected last
    max_promotions  limit on the experts promoted after a step
    half_life       lfu: a token counts half after so many tokens
    margin          lfu: an expert replaces another only if it is hotter by this factor, so that
                    two equally hot experts do not take turns
    profile         by layer, how often a token selects each expert, 0 to 1, as from
                    `PlacedBackend.expert_usage`; the hottest are loaded at the start

    DesksideError for an unknown policy or a number out of range.
    """

    device: str
    nbytes: int
    policy: str = "lfu"
    max_promotions: int = 8
    half_life: float = 512.0
    margin: float = 1.25
    profile: Mapping[int, Sequence[float]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise DesksideError(
                f"expert cache: unknown policy {self.policy!r}; choose one of {', '.join(POLICIES)}"
            )
        if self.max_promotions < 0 or self.half_life <= 0 or self.margin < 1:
            raise DesksideError(
                "expert cache: expected max_promotions of at least 0, a half_life above 0 and a "
                f"margin of at least 1, got {self.max_promotions}, {self.half_life}, {self.margin}"
            )

    def slots(self, layouts: Mapping[int, Layout]) -> tuple[int, int]:
        """The number of slots, one per expert, and the bytes of each. DesksideError for none."""
        size = max(layout.nbytes for layout in layouts.values())
        experts = experts_of(layouts)
        table = table_bytes(experts)  # the table of slots is on the device too
        n = min((self.nbytes - table) // size, sum(experts))
        if n < 1:
            raise DesksideError(
                f"expert cache: {show(self.nbytes)} of {self.device} are too little for an expert "
                f"of {show(size)}; give it at least {show(size + table)}, or none"
            )
        return n, size


def experts_of(layouts: Mapping[int, Layout]) -> list[int]:
    """The number of experts of each layer."""
    return [layout.parts[0][0].shape[2] for layout in layouts.values()]


@dataclass(frozen=True)
class ExpertMetrics:
    """Counts since a backend was made.

    hits, misses    pairs of token and expert that the device, or the host, computed in steps with
                    the expert cache
    promotions      experts copied into the cache after the start; promoted_bytes: theirs
    evictions       experts removed from the cache
    resident        experts in the cache now, of `slots`
    streamed        experts copied through staging slots; streamed_bytes: theirs
    spared          experts that streaming did not copy, because they were resident
    """

    hits: int = 0
    misses: int = 0
    promotions: int = 0
    evictions: int = 0
    promoted_bytes: int = 0
    resident: int = 0
    slots: int = 0
    streamed: int = 0
    streamed_bytes: int = 0
    spared: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the pairs that the device computed, 0 to 1. 0 before the first pair."""
        return self.hits / max(1, self.hits + self.misses)


class Residents(Offloads, Gathers):
    """The experts that are resident on a device. It supplies their matrices.

    ops: the layers' `experts` ops. layouts: by layer. max_tokens: of the steps that call `divide`.
    DesksideError for a profile whose number of experts is not the model's.
    """

    def __init__(
        self,
        options: ExpertCache,
        device: TorchDevice,
        ops: Sequence[Op],
        layouts: Mapping[int, Layout],
        source: Source,
        n_threads: int,
        max_tokens: int,
    ) -> None:
        self.options = options
        self.device = device
        self._layouts = layouts
        self._row = {op.layer: i for i, op in enumerate(ops)}
        self._layers = [op.layer for op in ops]
        self._n_experts = np.array([op.weights[0].shape[2] for op in ops])
        n, size = options.slots(layouts)
        shape = (len(ops), int(self._n_experts.max()))
        with device.guard("making room for the expert cache"):
            self._pool = torch.zeros(n, size, dtype=torch.uint8, device=device.device)
            self._table = torch.full(shape, -1, dtype=torch.int32, device=device.device)
        cuda = device.device.type == "cuda"
        # Not pinned: from pageable memory, `_upload`'s copy is done when it returns.
        self._host_table = torch.full(shape, -1, dtype=torch.int32)
        # by row and expert: its slot, or -1 if it is not resident
        self._slot_of: NDArray[np.int32] = self._host_table.numpy()
        self._owner = np.zeros((n, 2), np.int64)  # by slot: its expert's row and id
        self._settled = np.zeros(n, bool)  # by slot: neither free nor being filled
        self._free = list(range(n - 1, -1, -1))
        self._coming: dict[tuple[int, int], tuple[int, Future[Any]]] = {}
        self._copier = Copier(device.device, source, size, STAGED, n_threads)
        self.heat = np.zeros(shape)  # lfu: decayed count of uses; lru: the last step
        self.background = cuda  # promotions go on beside the next steps
        self._step = 0
        self._changed = True  # the host's table differs from the device's
        self._decay = 0.5 ** (1 / options.half_life)
        top_k = max(op.inputs[1].width for op in ops)
        self._chosen = torch.empty(len(ops), max_tokens, top_k, pin_memory=cuda)
        self._noted: dict[int, tuple[int, int]] = {}  # rows seen in this step: tokens, top_k
        self._metrics = ExpertMetrics(slots=n)
        self._seed()

    @property
    def metrics(self) -> ExpertMetrics:
        """The counts so far, without those of streaming."""
        return replace(self._metrics, resident=int((self._slot_of >= 0).sum()))

    def usage(self) -> dict[int, list[float]]:
        """By layer, how often a token recently selected each expert, 0 to 1. All 0 for lru.

        It serves as the `profile` of another run.
        """
        share = self.heat * (1 - self._decay) if self.options.policy == "lfu" else self.heat * 0
        return {
            layer: share[i, : self._n_experts[i]].tolist() for i, layer in enumerate(self._layers)
        }

    def _seed(self) -> None:
        for layer, shares in self.options.profile.items():
            row = self._row.get(layer)
            if row is None:
                continue
            if len(shares) != self._n_experts[row]:
                raise DesksideError(
                    f"expert cache: the profile has {len(shares)} experts for layer {layer}, "
                    f"the model {self._n_experts[row]}"
                )
            self.heat[row, : len(shares)] = np.array(shares) / (1 - self._decay)
        order = np.argsort(-self.heat, axis=None, kind="stable")
        for at in order[: len(self._free)].tolist():
            row, e = divmod(at, self.heat.shape[1])
            if self.heat[row, e] > 0:
                self._promote(row, e)
                self._take_in(wait=True)
        if self.options.policy == "lru":
            self.heat[:] = 0
        self._metrics = replace(self._metrics, promotions=0, promoted_bytes=0)
        self._upload()

    # ---- `Offloads` and `Gathers` --------------------------------------------------------------

    def divide(self, layer: int, ids: Tensor) -> tuple[Tensor, Tensor]:
        row = self._row[layer]
        n, top_k = ids.shape
        to = self._chosen[row] if self.device.device.type == "cuda" else None
        if to is not None:
            to[:n, :top_k].copy_(ids, non_blocking=True)
        else:  # through NumPy: an emulated device's meter would count the host's tensor as its own
            self._chosen.numpy()[row, :n, :top_k] = ids.numpy()
        self._noted[row] = (n, top_k)
        there = self.held(layer, ids.long())
        return ids.masked_fill(~there, -1.0), ids.masked_fill(there, -1.0)

    def held(self, layer: int, ids: Tensor) -> Tensor:
        """Whether each of `ids`, int64, is resident: bool of the same shape."""
        return self._table[self._row[layer]][ids] >= 0

    def stacks(self, op: Op) -> Matrices:
        return self._layouts[op.layer].matrices(self._pool)

    def places(self, layer: int, ids: Tensor) -> Tensor:
        return self._table[self._row[layer]][ids.long().clamp(min=0)].long().clamp(min=0)

    def each(self, op: Op, experts: list[int], pairs: int) -> Callable[[int], Matrices]:
        return lambda e: self.matrices(op, e)

    def done(self) -> None:
        pass

    def slot(self, layer: int, e: int) -> int | None:
        """The slot of expert `e`; None if it is not resident."""
        slot = int(self._slot_of[self._row[layer], e])
        return slot if slot >= 0 else None

    def matrices(self, op: Op, e: int) -> Matrices:
        """The matrices of expert `e`, which must be resident."""
        return self._layouts[op.layer].matrices(self._pool[self.slot(op.layer, e)])

    # ---- between steps --------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Use the experts whose copies are done since the last step."""
        self._noted = {}
        self._take_in(wait=False)
        self._upload()

    def end_step(self) -> None:
        """Count what the step selected, and promote the hottest experts that it missed.

        DesksideError if a copy failed or the device was lost.
        """
        if not self._noted:
            return
        if self.device.device.type == "cuda":  # short: the logits have usually been waited for
            torch.cuda.current_stream(self.device.device).synchronize()
        self._step += 1
        shape = self.heat.shape
        flat = np.concatenate(
            [
                self._chosen[row, :n, :top_k].numpy().reshape(-1).astype(np.int64) + row * shape[1]
                for row, (n, top_k) in self._noted.items()
            ]
        )
        counts = np.bincount(flat, minlength=self.heat.size).reshape(shape).astype(np.float64)
        here = self._slot_of >= 0
        hits = int(counts[here].sum())
        self._metrics = replace(
            self._metrics,
            hits=self._metrics.hits + hits,
            misses=self._metrics.misses + len(flat) - hits,
        )
        self._warm(counts, max(n for n, _ in self._noted.values()))
        # Hottest first, then those that this step selected most, then by layer and id.
        rows, experts = np.nonzero((counts > 0) & ~here)
        order = np.lexsort((-counts[rows, experts], -self.heat[rows, experts]))
        for i in order[: self.options.max_promotions].tolist():
            at = (int(rows[i]), int(experts[i]))
            if at not in self._coming:
                self._replace(at)
        if not self.background:
            self._take_in(wait=True)
        self._upload()

    def _warm(self, counts: NDArray[np.float64], tokens: int) -> None:
        if self.options.policy == "lru":
            self.heat[counts > 0] = self._step
            return
        # Geometric sum: the tokens count one by one, each with an equal share of the counts.
        kept = self._decay**tokens
        self.heat *= kept
        self.heat += counts * ((1 - kept) / (tokens * (1 - self._decay)))

    def _replace(self, at: tuple[int, int]) -> None:
        """Start to promote an expert, if it is hotter than the one that it would evict."""
        if not self._free:
            heat = np.where(self._settled, self.heat[self._owner[:, 0], self._owner[:, 1]], np.inf)
            slot = int(heat.argmin())
            margin = self.options.margin if self.options.policy == "lfu" else 1.0
            if self.heat[at] <= heat[slot] * margin:
                return
            owner = tuple(self._owner[slot])
            self._slot_of[owner] = -1
            self._changed = True
            self._settled[slot] = False
            self._free.append(slot)
            self._metrics = replace(self._metrics, evictions=self._metrics.evictions + 1)
        self._promote(*at)

    def _promote(self, row: int, e: int) -> None:
        slot = self._free.pop()
        self._owner[slot] = (row, e)
        layout = self._layouts[self._layers[row]]
        job = self._copier.copy(layout, [e], self._pool[slot])
        self._coming[row, e] = (slot, job)

    def _take_in(self, *, wait: bool) -> None:
        """Use the experts whose copies are done. wait: wait for all copies first.

        The first error of a copy is raised after all of them have been handled.
        """
        error: BaseException | None = None
        for at, (slot, job) in list(self._coming.items()):
            if not (wait or job.done()):
                continue
            if not wait and job.exception() is None:
                event = job.result()
                if event is not None and not event.query():
                    continue
            del self._coming[at]
            failed = job.exception()
            try:
                if failed is None:
                    layer = self._layers[at[0]]
                    self.device.beat(f"promoting expert {at[1]} of layer {layer}")
            except DesksideError as lost:
                failed = lost
            if failed is not None:
                error = error or failed
                self._free.append(slot)
                continue
            self._copier.arrived(job.result())
            self._slot_of[at] = slot
            self._settled[slot] = True
            self._changed = True
            self._metrics = replace(
                self._metrics,
                promotions=self._metrics.promotions + 1,
                promoted_bytes=self._metrics.promoted_bytes
                + self._layouts[self._layers[at[0]]].nbytes,
            )
        if error is not None:
            raise error

    def _upload(self) -> None:
        """Copy the host's table to the device, if it changed. After an error the next step does."""
        if self._changed:
            with self.device.guard("updating the expert cache"):
                self._table.copy_(self._host_table)
            self._changed = False

    def drain(self) -> None:
        self._copier.drain()
