"""Copies single experts from the host's memory to a device.

Several threads write an expert, as the file's bytes, into a pinned buffer. From there it is copied
to the device. On CUDA the copy runs on its own stream, beside the computation.

The bytes come from the CPU's packed weights: the threads unpack the panels, so no second copy of a
model is in memory. If torch runs the CPU's part, there are no packed weights. The bytes then come
from the model's file, usually from the page cache.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deskside import _native
from deskside.backends.torch.expert_ops import Matrices
from deskside.errors import DesksideError
from deskside.files import read_at
from deskside.gguf import TensorInfo
from deskside.lowering.scratch import BORDER
from deskside.tape import Op

Bytes = NDArray[np.uint8]


@dataclass(frozen=True)
class Layout:
    """How one expert of a layer lies in `nbytes` bytes. parts: (tensor, start, bytes) of each."""

    parts: tuple[tuple[TensorInfo, int, int], ...]
    nbytes: int

    @classmethod
    def of(cls, op: Op) -> Layout:
        """The layout of an expert of `op`. Each matrix starts on a border of BORDER bytes."""
        parts, at = [], 0
        for info in op.weights:
            own = info.shape[1] * info.row_bytes
            parts.append((info, at, own))
            at += -(-own // BORDER) * BORDER
        return cls(tuple(parts), at)

    def matrices(self, memory: Tensor) -> Matrices:
        """gate, up, down as views (..., rows, row_bytes) of `memory`, uint8 (..., >= nbytes)."""
        gate, up, down = (
            memory[..., at : at + n].unflatten(-1, (info.shape[1], info.row_bytes))
            for info, at, n in self.parts
        )
        return gate, up, down


class Source:
    """Reads experts' matrices as the file's bytes. packed: by name, tensors that the CPU has."""

    def __init__(self, packed: Mapping[str, _native.Weights] = MappingProxyType({})) -> None:
        self.packed = packed
        self._files: dict[Path, int] = {}
        self._lock = Lock()  # of _files

    def read(self, info: TensorInfo, expert: int, to: Bytes) -> None:
        """Write expert `expert` of a tensor to `to`, uint8 (rows * row_bytes,).

        DesksideError if its file cannot be read.
        """
        if (weights := self.packed.get(info.name)) is not None:
            weights.unpack(expert, to.reshape(info.shape[1], info.row_bytes))
        else:
            self._read(info, info.offset + expert * info.matrix_stride, to)

    def _read(self, info: TensorInfo, offset: int, to: Bytes) -> None:
        try:
            with self._lock:
                if info.path not in self._files:
                    self._files[info.path] = os.open(info.path, os.O_RDONLY)
                fd = self._files[info.path]
            read_at(fd, offset, to)
        except OSError as error:
            raise DesksideError(f"{info.path}: tensor {info.name} {error}") from None
        if info.interleaved:
            to[:] = info.interleaved.plain(to.reshape(-1, info.row_bytes)).reshape(-1)

    def close(self) -> None:
        while self._files:
            os.close(self._files.popitem()[1])

    def __del__(self) -> None:
        self.close()


class Copier:
    """A thread that copies experts to one device, through `slots` buffers of `nbytes` in turn.

    `n_threads` more threads fill the buffers.
    """

    def __init__(
        self, device: torch.device, source: Source, nbytes: int, slots: int, n_threads: int
    ) -> None:
        self.device = device
        self._source = source
        cuda = device.type == "cuda"
        self._host = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=cuda) for _ in range(slots)]
        self._sent: list[Any] = [None] * slots  # events: the last copy out of a buffer is done
        self._turn = 0
        self._stream = torch.cuda.Stream(device) if cuda else None
        self._worker = ThreadPoolExecutor(1, "deskside-experts")
        self._readers = ThreadPoolExecutor(n_threads, "deskside-unpack")
        self._jobs: list[Future[Any]] = []

    def copy(self, layout: Layout, experts: Sequence[int], target: Tensor) -> Future[Any]:
        """Start to copy `experts`, one after another, to `target`, uint8.

        The copy waits for what is already queued on the device's current stream. The future's
        result is an event for `arrived`; it raises DesksideError if a file cannot be read.
        """
        buffer = self._turn
        self._turn = (buffer + 1) % len(self._host)
        after = None
        if self._stream is not None:
            after = torch.cuda.Event()
            after.record(torch.cuda.current_stream(self.device))
        self._jobs = [job for job in self._jobs if not job.done()]
        job = self._worker.submit(self._copy, layout, experts, target, buffer, after)
        self._jobs.append(job)
        return job

    def arrived(self, event: Any) -> None:
        """Make the device's current stream wait for the copy. event: a result of `copy`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def drain(self) -> None:
        """Wait until no copy is under way. Errors are left to whoever holds the futures."""
        for job in self._jobs:
            job.exception()
        self._jobs = []

    def _copy(
        self, layout: Layout, experts: Sequence[int], target: Tensor, buffer: int, after: Any
    ) -> Any:
        host, size = self._host[buffer], layout.nbytes
        if self._sent[buffer] is not None:
            self._sent[buffer].synchronize()
        array = host.numpy()

        def read(job: tuple[int, int, tuple[TensorInfo, int, int]]) -> None:
            i, e, (info, at, n) = job
            self._source.read(info, e, array[i * size + at :][:n])

        jobs = [(i, e, part) for i, e in enumerate(experts) for part in layout.parts]
        reads = [self._readers.submit(read, job) for job in jobs]
        wait(reads)  # all, also after an error: no thread may still write to the buffer
        for done in reads:
            done.result()
        n = len(experts) * size
        if self._stream is None:
            target[:n].copy_(host[:n])
            return None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(after)
            target[:n].copy_(host[:n], non_blocking=True)
            event = torch.cuda.Event()
            event.record(self._stream)
        self._sent[buffer] = event
        return event
