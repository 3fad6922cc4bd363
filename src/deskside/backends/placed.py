"""Runs a tape whose tensors are spread over the native CPU backend and devices of torch.

Values go from device to device at the borders of sections only, through the host. The native
sections run in a thread of their own, so that a device computes what does not wait for them
meanwhile. Results do not depend on that: every op reads the same values in any case.
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

from deskside.backends.cpu import CpuBackend
from deskside.backends.sections import HOST, HOST_TORCH, Section, cut, hops
from deskside.backends.steps import Stretch
from deskside.backends.torch_device import Arrays, TorchDevice, show, work_bytes
from deskside.backends.torch_ops import TorchStep
from deskside.cache import Batch, Cache
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.progress import Progress, silent
from deskside.quants import QuantType
from deskside.system import available_memory
from deskside.tape import State, Tape, Value


@dataclass(frozen=True)
class Traffic:
    """Transfers from device to device of one step, and their bytes."""

    hops: int
    nbytes: int


class PlacedBackend:
    """A tape over several devices, at most `max_tokens` tokens a step.

    placement: the device's name for every tensor: "cpu" or one of `devices`. reserve: bytes of the
    system's memory that must stay free, for a cache. native: False has torch run the CPU's part
    too, with which every placement gives the same bits. DesksideError where something does not fit.
    """

    def __init__(
        self,
        file: GGUF,
        tape: Tape,
        placement: Mapping[str, str],
        devices: Sequence[TorchDevice],
        *,
        n_threads: int,
        max_tokens: int,
        isa: str | None = None,
        reserve: int = 0,
        native: bool = True,
        progress: Progress = silent,
    ) -> None:
        self.tape = tape
        self.max_tokens = max_tokens
        placement = {name: device.lower() for name, device in placement.items()}
        _check(tape, placement, devices)
        self.sections = cut(tape, placement, native=native)
        self.devices = {d.name: d for d in devices}
        if any(s.device == HOST_TORCH for s in self.sections):
            self.devices[HOST_TORCH] = TorchDevice(HOST_TORCH, torch.device("cpu"))
        self._expect_host_memory(reserve)
        stretches = [
            Stretch(s.ops, s.imports, s.exports) for s in self.sections if s.device == HOST
        ]
        self._native = {i: n for n, i in enumerate(self._indices(HOST))}
        self.cpu: CpuBackend | None = None
        try:
            for device in self.devices.values():
                device.plan(self.sections)
                work = work_bytes(self.sections, device.name, max_tokens)
                device.load(file, self._weights(device.name), work, progress)
            if stretches:
                self.cpu = CpuBackend(
                    file,
                    tape,
                    n_threads=n_threads,
                    max_tokens=max_tokens,
                    isa=isa,
                    reserve=reserve,
                    stretches=stretches,
                    progress=progress,
                )
        except BaseException:
            for device in self.devices.values():
                device.weights.clear()
            raise
        self._worker = ThreadPoolExecutor(1, "deskside-cpu")

    def _expect_host_memory(self, reserve: int) -> None:
        """Emulated devices live in the system's memory too."""
        for device in self.devices.values():
            if device.budget is not None:
                reserve += sum(w.nbytes for w in self._weights(device.name))
        free = available_memory()
        if reserve > free:
            raise DesksideError(
                f"emulated devices and cache take {show(reserve)} of {show(free)} free; "
                "emulate fewer tensors, or lower -c"
            )

    def _indices(self, device: str) -> list[int]:
        return [i for i, s in enumerate(self.sections) if s.device == device]

    def _weights(self, device: str) -> list[TensorInfo]:
        ops = [op for s in self.sections if s.device == device for op in s.ops]
        return list({w.name: w for op in ops for w in op.weights}.values())

    def weight_bytes(self) -> dict[str, int]:
        """Bytes of weights on every device."""
        names = dict.fromkeys(s.device for s in self.sections)
        return {name: sum(w.nbytes for w in self._weights(name)) for name in names}

    def state_homes(self) -> dict[int, str]:
        """The device of every state, by its index."""
        return state_homes(self.sections)

    def traffic(self, tokens: int = 1, outputs: int = 1) -> Traffic:
        """What a step of so many tokens and wanted logits moves between devices."""
        return Traffic(
            *hops(self.sections, lambda v: 4 * v.width * (outputs if v.per_output else tokens))
        )

    def new_cache(self, *, n_slots: int, n_ctx: int, k_type: QuantType, v_type: QuantType) -> Cache:
        """A cache whose states lie beside their ops; `run` takes no other."""
        held = {
            i: self.devices[home].hold(self.tape.states[i], n_slots, n_ctx, k_type, v_type)
            for i, home in self.state_homes().items()
            if home not in (HOST, HOST_TORCH)
        }
        for name, device in self.devices.items():
            device.expect("work memory", work_bytes(self.sections, name, self.max_tokens))
        return Cache(
            self.tape.states,
            n_slots=n_slots,
            n_ctx=n_ctx,
            k_type=k_type,
            v_type=v_type,
            held=held,
        )

    def run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """See `Backend.run`. After an error the batch's sequences are empty."""
        return self._run(batch, cache, out, None)

    def profile(self, batch: Batch, cache: Cache) -> tuple[NDArray[np.float32], list[float]]:
        """As `run`, with the microseconds of each of `sections`, run one after another."""
        micros: list[float] = []
        return self._run(batch, cache, None, micros), micros

    def _run(
        self,
        batch: Batch,
        cache: Cache,
        out: NDArray[np.float32] | None,
        micros: list[float] | None,
    ) -> NDArray[np.float32]:
        elsewhere = {i for i, d in self.state_homes().items() if d not in (HOST, HOST_TORCH)}
        if set(cache.held) != elsewhere or not 1 <= len(batch.tokens) <= self.max_tokens:
            raise ValueError("the cache is not of `new_cache`, or the batch is too large")
        cache.check(batch)
        shape = (len(batch.outputs), self.tape.n_vocab)
        logits = np.empty(shape, np.float32) if out is None else out
        run = _Run(self, batch, cache, logits)
        try:
            run.all(micros)
        except BaseException:
            run.settle()
            for segment in batch.segments:
                cache.clear(segment.slot)
            raise
        return logits


class _Run:
    """One step on its way through the sections."""

    def __init__(
        self, backend: PlacedBackend, batch: Batch, cache: Cache, logits: NDArray[np.float32]
    ) -> None:
        self.backend = backend
        self.batch = batch
        self.cache = cache
        self.logits = logits
        self.values: dict[str, dict[int, Tensor]] = {name: {} for name in backend.devices}
        self.arrived: dict[int, Callable[[], Arrays]] = {}  # exports on the host, by value
        self.jobs: list[Future[Arrays]] = []
        self.steps = {name: self._step(device) for name, device in backend.devices.items()}

    def _step(self, device: TorchDevice) -> TorchStep:
        homes = self.backend.state_homes()
        states: dict[int, tuple[Tensor, ...]] = {}
        for i, home in homes.items():
            if home == device.name and i in self.cache.held:
                states[i] = self.cache.held[i].arrays  # type: ignore[attr-defined]
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
        )

    def all(self, micros: list[float] | None) -> None:
        for i, section in enumerate(self.backend.sections):
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
        """Nothing may still write to the states when they are cleared."""
        wait_for(self.jobs)

    def _native(self, i: int, section: Section) -> None:
        imports = {v.id: self.arrived[v.id] for v in section.imports}
        job = self.backend._worker.submit(self._native_job, i, section, imports)
        self.jobs.append(job)
        self.arrived.update({v.id: job.result for v in section.exports})

    def _native_job(
        self, i: int, section: Section, imports: Mapping[int, Callable[[], Arrays]]
    ) -> Arrays:
        cpu = self.backend.cpu
        assert cpu is not None
        for value in section.imports:
            cpu.values(value, self._rows(value))[:] = imports[value.id]()[value.id]
        stretch = self.backend._native[i]
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


def state_homes(sections: Sequence[Section]) -> dict[int, str]:
    """The device of every state, by its index in the tape."""
    return {op.state: s.device for s in sections for op in s.ops if op.state is not None}


def host_states(tape: Tape, placement: Mapping[str, str]) -> list[State]:
    """The states that will lie in the system's memory."""
    homes = state_homes(cut(tape, {name: d.lower() for name, d in placement.items()}))
    return [s for i, s in enumerate(tape.states) if homes[i] in (HOST, HOST_TORCH)]


def _check(tape: Tape, placement: Mapping[str, str], devices: Sequence[TorchDevice]) -> None:
    known = {HOST, *(d.name for d in devices)}
    for name in tape.weights():
        if placement.get(name, HOST) not in known:
            raise DesksideError(
                f"the placement puts tensor {name} on {placement[name]}; the devices are "
                f"{', '.join(sorted(known))}"
            )
