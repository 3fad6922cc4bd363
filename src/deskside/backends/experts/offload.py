"""Lets devices compute experts of the host: options, routes, memory, metrics.

`PlacedBackend` runs each step by one of up to two routes. Small batches use the expert cache, if
there is one. Large batches stream, if streaming is on. Each route has its own sections.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from deskside._native import Weights
from deskside.backends.experts.copies import Layout, Source
from deskside.backends.experts.resident import (
    STAGED,
    ExpertCache,
    ExpertMetrics,
    Residents,
    experts_of,
)
from deskside.backends.experts.stream import Streamer, StreamOptions
from deskside.backends.torch.device import TorchDevice, show
from deskside.backends.torch.expert_ops import Offloads
from deskside.errors import DesksideError
from deskside.lowering.scratch import table_bytes
from deskside.lowering.sections import Offload, offloadable
from deskside.tape import Tape


@dataclass(frozen=True)
class OffloadRoute:
    """A route for steps of up to `max_tokens` tokens that no earlier route takes."""

    offload: Offload | None
    max_tokens: int
    streams: bool = False


class OffloadedExperts:
    """The experts of the host that devices compute: options, routes, memory, metrics.

    The options have no effect, and take no memory, if the host has no layer's experts. The same
    holds for `stream` if no batch of up to `max_tokens` is large enough.
    DesksideError for an unknown device, or if a slot or the cache is too small for one expert.
    """

    def __init__(
        self,
        tape: Tape,
        placement: Mapping[str, str],
        devices: Mapping[str, TorchDevice],
        stream: StreamOptions | None,
        cache: ExpertCache | None,
        max_tokens: int,
    ) -> None:
        self.ops = offloadable(tape, placement)
        self.layouts = {op.layer: Layout.of(op) for op in self.ops}
        self.streamer: Streamer | None = None
        self.residents: Residents | None = None
        stream = _known(stream, devices, "streaming experts")
        cache = _known(cache, devices, "expert cache")
        min_tokens = 0
        if stream is not None and self.ops:
            min_tokens = stream.min_batch(min(op.inputs[1].width for op in self.ops))
        self.stream = stream if 0 < min_tokens <= max_tokens else None
        self.cache = cache if self.ops else None
        self._devices = devices
        small = max_tokens if self.stream is None else min_tokens - 1
        offload = None if self.cache is None else Offload(self.cache.device, all=False)
        self.routes = [OffloadRoute(offload, small)]
        if self.stream is not None:
            whole = self.stream.host_below <= 1
            offload = Offload(self.stream.device, all=whole)
            self.routes.append(OffloadRoute(offload, max_tokens, streams=True))
        # computed here, so that bad sizes are refused before anything is read
        self._slot_bytes = self.stream.nbytes(self.layouts) if self.stream else 0
        self._cache_bytes = 0
        if self.cache is not None:
            n, size = self.cache.slots(self.layouts)
            self._cache_bytes = n * size + table_bytes(experts_of(self.layouts))

    def nbytes(self, device: str) -> int:
        """Bytes of a device's memory that slots and cache take."""
        slots = self._slot_bytes if self.stream and self.stream.device == device else 0
        cached = self._cache_bytes if self.cache and self.cache.device == device else 0
        return slots + cached

    def host_bytes(self) -> int:
        """Bytes of the system's memory: staging buffers, and what emulated devices hold."""
        emulated = sum(self.nbytes(d.name) for d in self._devices.values() if d.budget is not None)
        staged = STAGED * self.cache.slots(self.layouts)[1] if self.cache else 0
        return self._slot_bytes + staged + emulated

    def expect(self, device: TorchDevice, weights: int, work: int) -> None:
        """DesksideError unless slots and cache fit on `device`, beside weights and work memory.

        weights, work: their bytes.
        """
        if own := self.nbytes(device.name):
            what = f"staging slots and expert cache of {show(own)} with weights and work memory"
            device.expect(f"{what}, together", own + weights + work)

    def load(self, packed: Mapping[str, Weights], n_threads: int) -> None:
        """Allocate slots and cache, and fill a cache that has a profile. packed: CPU's weights."""
        source = Source(packed)
        small = self.routes[0].max_tokens
        if self.cache is not None:
            device = self._devices[self.cache.device]
            self.residents = Residents(
                self.cache, device, self.ops, self.layouts, source, n_threads, small
            )
        if self.stream is not None:
            device = self._devices[self.stream.device]
            shared = self.cache is not None and self.cache.device == self.stream.device
            residents = self.residents if shared else None
            self.streamer = Streamer(
                self.stream, device, self.layouts, source, n_threads, residents
            )

    def release(self) -> None:
        self.residents = self.streamer = None

    def supplier(self, streams: bool) -> Offloads | None:
        """What supplies experts on the route that streams, or on the other."""
        return self.streamer if streams else self.residents

    def begin_step(self) -> None:
        if self.residents is not None:
            self.residents.begin_step()

    def end_step(self) -> None:
        if self.residents is not None:
            self.residents.end_step()

    def drain(self) -> None:
        """Wait until no copy is under way, after an error."""
        for part in (self.streamer, self.residents):
            if part is not None:
                part.drain()

    @property
    def metrics(self) -> ExpertMetrics:
        """The counts of both routes."""
        found = self.residents.metrics if self.residents is not None else ExpertMetrics()
        if (s := self.streamer) is None:
            return found
        return replace(found, streamed=s.experts, streamed_bytes=s.nbytes, spared=s.resident)


Options = TypeVar("Options", StreamOptions, ExpertCache)


def _known(
    options: Options | None, devices: Mapping[str, TorchDevice], what: str
) -> Options | None:
    if options is None:
        return None
    name = options.device.lower()
    if name not in devices:
        known = ", ".join(sorted(devices)) or "none"
        raise DesksideError(f"{what}: there is no device {options.device}; the devices are {known}")
    return replace(options, device=name)
