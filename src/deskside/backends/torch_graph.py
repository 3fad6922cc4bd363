"""A section captured once and replayed: no Python between its ops, one launch on CUDA.

A step of one token a sequence has shapes that follow from its `Shape` alone, and reads what the
batch says from tensors (`torch_ops.Given`). So a section of it is run once as it is (which compiles
kernels and sets libraries up), captured the next time, and replayed from then on. All values that
cross a section's border lie in buffers of the shape, at addresses that do not change.

On CUDA that is a CUDA graph. **No line of `CudaGraph` has run on hardware.** An emulated device
records the calls that torch dispatches (`torch_record`) and repeats them on the same memory; it
refuses what a capture would: ops that wait for the device, and data from the host.

Where a capture fails, the section runs as it always did, with one note.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from deskside.backends.sections import Section
from deskside.backends.torch_ops import Given, TorchStep
from deskside.backends.torch_record import Recording
from deskside.tape import Value

MOST_TOKENS = 8  # of a step that is captured
MOST_SHAPES = 8  # kept at a time


@dataclass(frozen=True)
class Shape:
    """What the shapes of a captured step depend on: sequences (one token each), wanted logits, and
    a power of 2 that no sequence's length exceeds."""

    tokens: int
    outputs: int
    bucket: int


class Graph(Protocol):
    """`capture` runs the function once, recorded; `replay` does again what it did to memory."""

    def capture(self, run: Callable[[], None]) -> None: ...

    def replay(self) -> None: ...


class CudaGraph:
    """A CUDA graph; those of a device share a pool of memory, since they never overlap."""

    def __init__(self, device: torch.device, pool: Any) -> None:
        self._device = device
        self._pool = pool
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], None]) -> None:
        # Other threads may use CUDA meanwhile, so only this one's calls are checked.
        with (
            torch.cuda.device(self._device),
            torch.cuda.graph(self._graph, pool=self._pool, capture_error_mode="thread_local"),
        ):
            run()
        self._graph.replay()  # capturing has computed nothing

    def replay(self) -> None:
        self._graph.replay()


@dataclass
class _Shaped:
    """What is kept for a shape."""

    given: Tensor  # `Given.packed`, on the device
    buffers: dict[int, Tensor] = field(default_factory=dict)  # by value that crosses a border
    seen: set[int] = field(default_factory=set)  # sections that have run once, by id()
    graphs: dict[int, Graph] = field(default_factory=dict)


class Graphs:
    """The captured sections of one device and one cache.

    new_graph: an empty graph. room(): whether what the device holds leaves the work memory of the
    largest step; asked after each capture. note: told once, if a section cannot be captured.
    """

    def __init__(
        self,
        new_graph: Callable[[Mapping[str, Tensor], list[Tensor]], Graph],
        room: Callable[[], bool],
        note: Callable[[str], None],
    ) -> None:
        self._new_graph = new_graph
        self._room = room
        self._note = note
        self._noted = False
        self._never: set[int] = set()  # sections that cannot be captured, by id()
        self._full = False
        self._shapes: dict[Shape, _Shaped] = {}
        self._cache: tuple[Tensor, ...] = ()
        self._given: weakref.ref[TorchStep] | None = None
        self.captures = self.replays = 0

    def drop(self) -> None:
        """Forget all graphs, and their memory: what they point to is about to go."""
        self._shapes.clear()
        self._cache = ()
        self._full = False

    def run(
        self,
        section: Section,
        values: dict[int, Tensor],
        step: TorchStep,
        ops: Callable[[dict[int, Tensor], TorchStep], None],
    ) -> bool:
        """Run the section on `values`, to which what it makes is added; False if it is not to be
        run as a graph, and nothing was done.

        ops(values, step) runs the section's ops as they are, and adds to `values`.
        """
        bucket = step.given.bucket
        n = len(step.batch.tokens)
        if not bucket or n > MOST_TOKENS or id(section) in self._never or self._full:
            return False
        self._own(step)
        shape = Shape(n, len(step.batch.outputs), bucket)
        shaped = self._shaped(shape, step)
        graph = shaped.graphs.get(id(section))
        if graph is None and id(section) not in shaped.seen:
            shaped.seen.add(id(section))
            return False
        self._fill(shaped, section, values, step)
        if graph is not None:
            graph.replay()
            self.replays += 1
        elif not self._capture(shaped, section, step, ops):
            return False
        values.update({v.id: shaped.buffers[v.id] for v in _kept(section)})
        return True
