"""Runs a tape whose tensors are placed on the CPU and on torch devices.

A section is a run of ops on one device (`lowering/sections.py`). Values are copied between devices
only at the borders of sections, through the host. Native sections run in their own thread, so a
device computes meanwhile what does not need their results. Timing never changes a result: every op
reads the same values.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from functools import cache as cached

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deskside._native import Weights
from deskside.backends.experts.offload import OffloadedExperts
from deskside.backends.experts.resident import ExpertCache, ExpertMetrics
from deskside.backends.experts.stream import StreamOptions
from deskside.backends.native.program import CpuBackend
from deskside.backends.torch.device import Arrays, TorchDevice, show
from deskside.backends.torch.emulated import EmulatedDevice
from deskside.backends.torch.kernels import NONE, Kernels
from deskside.backends.torch.ops import TorchStep
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.quants import QuantType
from deskside.lowering.scratch import work_bytes
from deskside.lowering.sections import (
    HOST,
    HOST_TORCH,
    OFFLOADED,
    Section,
    cut_by_device,
    hops,
    state_homes,
)
from deskside.lowering.steps import Stretch
from deskside.machine.devices import Device
from deskside.machine.host import HostOptions
from deskside.machine.system import available_memory
from deskside.progress import Progress, silent
from deskside.tape import Tape, Value
from deskside.tape.cache import Batch, Cache


@dataclass(frozen=True)
class Traffic:
    """The transfers between devices in one step, and their bytes."""

    hops: int
    nbytes: int


class Route:
    """One way to run the tape, for steps of at most `max_tokens` tokens.

    offloads: whether a device computes experts of the host. streams: whether these are streamed.
    """

    def __init__(
        self, sections: tuple[Section, ...], max_tokens: int, *, offloads: bool, streams: bool
    ) -> None:
        self.sections = sections
        self.max_tokens = max_tokens
        self.offloads = offloads
        self.streams = streams
        # By index of a native section: the index of its stretch in the native program.
        native = [i for i, s in enumerate(sections) if s.device == HOST]
        self.native = {i: n for n, i in enumerate(native)}
        self.cpu: CpuBackend | None = None

    def stretches(self) -> list[Stretch]:
        """The native sections, as stretches of one program."""
        own = (self.sections[i] for i in self.native)
        return [Stretch(s.ops, s.imports, s.exports) for s in own]


class PlacedBackend:
    """A backend over several devices, for at most `max_tokens` tokens per step.

    placement     tensor -> "cpu" or the name of one of `devices`
    max_outputs   limit on the wanted logits of a step; None for `max_tokens`
    reserve       bytes of the system's memory that must stay free, for a cache
    native        False: torch runs the CPU's part too; every placement then gives the same bits
    stream        large batches stream the CPU's experts through a device, which computes them
    expert_cache  in smaller batches, a device computes the experts that it caches

    DesksideError for a device that is not in `devices`, or what does not fit.
    """

    def __init__(
        self,
        file: GGUF,
        tape: Tape,
        placement: Mapping[str, str],
        devices: Sequence[TorchDevice],
        host: HostOptions,
        *,
        max_tokens: int,
        max_outputs: int | None = None,
        reserve: int = 0,
        native: bool = True,
        stream: StreamOptions | None = None,
        expert_cache: ExpertCache | None = None,
        progress: Progress = silent,
    ) -> None:
        self.tape = tape
        self.max_tokens = max_tokens
        self.max_outputs = max_outputs or max_tokens
        placement = {name: device.lower() for name, device in placement.items()}
        _check(tape, placement, devices)
        self.devices = {d.name: d for d in devices}
        self.offload = OffloadedExperts(
            tape, placement, self.devices, stream, expert_cache, max_tokens
        )
        self.routes = [
            Route(
                cut_by_device(tape, placement, native=native, offload=route.offload),
                route.max_tokens,
                offloads=route.offload is not None,
                streams=route.streams,
            )
            for route in self.offload.routes
        ]
        self.sections = self.routes[0].sections
        self._homes = state_homes(self.sections)
        if any(s.device == HOST_TORCH for s in self._all_sections()):
            self.devices[HOST_TORCH] = TorchDevice(HOST_TORCH, torch.device("cpu"))
        reserve += self.offload.host_bytes()
        self._expect_host_memory(reserve)
        self._active: Route | None = None
        try:
            self._load(file, host, reserve, progress)
        except BaseException:
            self.offload.release()
            for device in self.devices.values():
                device.weights.clear()
            raise
        self.cpu = self.routes[0].cpu
        self._worker = ThreadPoolExecutor(1, "deskside-cpu")

    def _load(self, file: GGUF, host: HostOptions, reserve: int, progress: Progress) -> None:
        """Copy the weights to the devices, then build the routes' native programs.

        The programs share their packed weights.
        """
        for device in self.devices.values():
            weights, work = self._weights(device.name), self._work(device)
            self.offload.expect(device, sum(w.nbytes for w in weights), work)
            device.load(file, weights, work + self.offload.nbytes(device.name), progress)
        packed: Mapping[str, Weights] = {}
        for route in self.routes:
            if not route.native:
                continue
            route.cpu = CpuBackend(
                file,
                self.tape,
                host,
                max_tokens=route.max_tokens,
                reserve=reserve,
                stretches=route.stretches(),
                packed=packed,
                progress=progress,
            )
            packed = route.cpu.weights
        self.offload.load(packed, host.most_threads)

    def _expect_host_memory(self, reserve: int) -> None:
        """DesksideError unless `reserve` and the weights of emulated devices fit in memory.

        Emulated devices use the system's memory too.
        """
        for device in self.devices.values():
            if device.budget is not None:
                reserve += sum(w.nbytes for w in self._weights(device.name))
        free = available_memory()
        if reserve > free:
            raise DesksideError(
                f"emulated devices and cache take {show(reserve)} of {show(free)} free; "
                "emulate fewer tensors, or lower -c"
            )

    def _all_sections(self) -> list[Section]:
        return [s for route in self.routes for s in route.sections]

    def _weights(self, device: str) -> list[TensorInfo]:
        """The weights that a device holds, without the experts offloaded to it."""
        ops = [op for s in self._all_sections() if s.device == device for op in s.ops]
        held = (w for op in ops if op.kind not in OFFLOADED for w in op.weights)
        return list({w.name: w for w in held}.values())

    def _work(self, device: TorchDevice) -> int:
        """Bytes of the device's work memory, over all routes."""
        return max(
            work_bytes(r.sections, device.name, r.max_tokens, min(self.max_outputs, r.max_tokens))
            for r in self.routes
        )

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights on every device."""
        names = dict.fromkeys(s.device for s in self._all_sections())
        return {name: sum(w.nbytes for w in self._weights(name)) for name in names}

    def state_homes(self) -> dict[int, str]:
        """The device of every state, by the state's index."""
        return self._homes

    def route(self, tokens: int) -> Route:
        """The route of a step of `tokens` tokens."""
        return next(r for r in self.routes if tokens <= r.max_tokens)

    def traffic(self, tokens: int = 1, outputs: int = 1) -> Traffic:
        """The values that a step copies between devices, without experts.

        tokens, outputs: of the step; outputs are wanted logits.
        """
        sections = self.route(tokens).sections
        return Traffic(
            *hops(sections, lambda v: 4 * v.width * (outputs if v.per_output else tokens))
        )

    @property
    def expert_metrics(self) -> ExpertMetrics:
        """Counts of what `stream` and `expert_cache` did so far."""
        return self.offload.metrics

    def expert_usage(self) -> dict[int, list[float]]:
        """By layer, how often a token recently selected each expert: a profile for `ExpertCache`.

        The shares are 0 to 1. Without an expert cache there are none.
        """
        return self.offload.residents.usage() if self.offload.residents else {}

    def new_cache(self, *, n_slots: int, n_ctx: int, k_type: QuantType, v_type: QuantType) -> Cache:
        """A cache whose states are on the devices of their ops. `run` accepts no other.

        n_slots: sequences. n_ctx: tokens of each. DesksideError if a device has no room.
        """
        on_devices = {
            i: self.devices[home].hold(self.tape.states[i], n_slots, n_ctx, k_type, v_type)
            for i, home in self.state_homes().items()
            if home not in (HOST, HOST_TORCH)
        }
        for device in self.devices.values():
            device.expect("work memory", self._work(device))
        return Cache(
            self.tape.states,
            n_slots=n_slots,
            n_ctx=n_ctx,
            k_type=k_type,
            v_type=v_type,
            device_states=on_devices,
        )

    def run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """See `Backend.run`. An error clears the batch's sequences.

        ValueError if the cache is not of `new_cache`, or the batch is too large.
        """
        return self._run(batch, cache, out, None)

    def profile(self, batch: Batch, cache: Cache) -> tuple[NDArray[np.float32], list[float]]:
        """As `run`, and the microseconds of each section of its route. Sections do not overlap."""
        micros: list[float] = []
        return self._run(batch, cache, None, micros), micros

    def _run(
        self,
        batch: Batch,
        cache: Cache,
        out: NDArray[np.float32] | None,
        micros: list[float] | None,
    ) -> NDArray[np.float32]:
        elsewhere = {i for i, d in self._homes.items() if d not in (HOST, HOST_TORCH)}
        too_large = len(batch.outputs) > self.max_outputs
        too_large |= not 1 <= len(batch.tokens) <= self.max_tokens
        if set(cache.device_states) != elsewhere or too_large:
            raise ValueError("the cache is not of `new_cache`, or the batch is too large")
        cache.check(batch)
        shape = (len(batch.outputs), self.tape.n_vocab)
        logits = np.empty(shape, np.float32) if out is None else out
        route = self.route(len(batch.tokens))
        if route is not self._active:
            for device in self.devices.values():
                device.plan(route.sections)
            self._active = route
        run = _Run(self, route, batch, cache, logits)
        try:
            self.offload.begin_step()
            run.all(micros)
            self.offload.end_step()
            cache.advance(batch)
        except BaseException:
            run.settle()
            for segment in batch.segments:
                cache.clear(segment.slot)
            raise
        return logits


class _Run:
    """One step through the sections of its route."""

    def __init__(
        self,
        backend: PlacedBackend,
        route: Route,
        batch: Batch,
        cache: Cache,
        logits: NDArray[np.float32],
    ) -> None:
        self.backend = backend
        self.route = route
        self.batch = batch
        self.cache = cache
        self.logits = logits
        self.values: dict[str, dict[int, Tensor]] = {name: {} for name in backend.devices}
        self.arrived: dict[int, Callable[[], Arrays]] = {}  # by value id: waits for its export
        self.jobs: list[Future[Arrays]] = []
        self.steps = {name: self._step(device) for name, device in backend.devices.items()}

    def _step(self, device: TorchDevice) -> TorchStep:
        homes = self.backend.state_homes()
        states: dict[int, tuple[Tensor, ...]] = {}
        for i, home in homes.items():
            if home == device.name and i in self.cache.device_states:
                states[i] = self.cache.device_states[i].arrays  # type: ignore[attr-defined]
            elif home == device.name:
                states[i] = tuple(map(torch.from_numpy, self.cache.arrays[i]))
        return TorchStep(
            self.batch,
            device.device,
            device.weights,
            states,
            self.cache.k_type,
            self.cache.v_type,
            device.kernels,
            self.backend.offload.supplier(self.route.streams) if self.route.offloads else None,
        )

    def all(self, micros: list[float] | None) -> None:
        for i, section in enumerate(self.route.sections):
            began = time.perf_counter()
            if section.device == HOST:
                self._native(i, section)
            else:
                self._torch(section)
            if micros is not None:
                wait_for(self.jobs)
                device = self.backend.devices.get(section.device)
                if device is not None and device.device.type == "cuda":
                    torch.cuda.synchronize(device.device)
                micros.append(1e6 * (time.perf_counter() - began))
        for job in self.jobs:
            job.result()
        logits = self.backend.tape.logits.id
        if logits in self.arrived:
            self.logits[:] = self.arrived[logits]()[logits]

    def settle(self) -> None:
        """Wait for all work under way. The caller clears the states next: none may be written."""
        wait_for(self.jobs)
        self.backend.offload.drain()

    def _native(self, i: int, section: Section) -> None:
        imports = {v.id: self.arrived[v.id] for v in section.imports}
        job = self.backend._worker.submit(self._native_job, i, section, imports)
        self.jobs.append(job)
        self.arrived.update({v.id: job.result for v in section.exports})

    def _native_job(
        self, i: int, section: Section, imports: Mapping[int, Callable[[], Arrays]]
    ) -> Arrays:
        cpu = self.route.cpu
        assert cpu is not None
        for value in section.imports:
            cpu.values(value, self._rows(value))[:] = imports[value.id]()[value.id]
        stretch = self.route.native[i]
        cpu.run_stretch(stretch, self.batch, self.cache, self.logits)
        # Copies: the program's next stretch may use their place.
        return {v.id: cpu.values(v, self._rows(v)).copy() for v in section.exports}

    def _torch(self, section: Section) -> None:
        device = self.backend.devices[section.device]
        values = self.values[section.device]
        if section.imports:
            values.update(
                device.upload({v.id: self.arrived[v.id]()[v.id] for v in section.imports})
            )
        device.run(section, values, self.steps[section.device], len(self.batch.outputs))
        if section.exports:
            wait = cached(device.send(section, values))
            self.arrived.update({v.id: wait for v in section.exports})

    def _rows(self, value: Value) -> int:
        return len(self.batch.outputs) if value.per_output else len(self.batch.tokens)


def _check(tape: Tape, placement: Mapping[str, str], devices: Sequence[TorchDevice]) -> None:
    known = {HOST, *(d.name for d in devices)}
    for name in tape.weights():
        if placement.get(name, HOST) not in known:
            raise DesksideError(
                f"the placement puts tensor {name} on {placement[name]}; the devices are "
                f"{', '.join(sorted(known))}"
            )


def open_devices(devices: Sequence[Device]) -> list[TorchDevice]:
    """Open the devices of a plan, each limited to the plan's bytes of memory.

    An emulated device computes on the CPU. DesksideError for a CUDA device that torch does not see.
    """
    found: list[TorchDevice] = []
    for d in devices:
        if d.name.startswith("emu"):
            found.append(EmulatedDevice(d.name, d.memory))
            continue
        index, count = int(d.name.removeprefix("cuda")), torch.cuda.device_count()
        if index >= count:
            raise DesksideError(f"--device {d.name}: torch sees {count} CUDA devices; leave it out")
        total = torch.cuda.get_device_properties(index).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, d.memory / total), index)
        found.append(TorchDevice(d.name, torch.device("cuda", index), kernels=kernels()))
    return found


def kernels() -> Kernels:
    """Triton's kernels if Triton is installed, else none."""
    try:
        from deskside.backends.triton.table import triton_kernels
    except ImportError:
        return NONE
    return triton_kernels()
