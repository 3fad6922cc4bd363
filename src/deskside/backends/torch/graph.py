"""A section captured once and replayed: no Python between its ops, one launch on CUDA.

A step of one token a sequence has shapes that follow from its `Shape` alone, and reads what the
batch says from `ops.BatchTensors`. So a section of it is run once as it is (which compiles
kernels and sets libraries up), captured the next time, and replayed from then on. All values that
cross a section's border lie in buffers of the shape, at addresses that do not change.

On CUDA that is a CUDA graph. The tests' device records the calls that torch dispatches
(tests/torch_record.py) and repeats them on the same memory. It refuses what a capture would: ops
that wait for the device, and data from the host.

Where a capture fails, the section runs as it always did, with one note.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from deskside.backends.torch.ops import BatchTensors, TorchStep, bucket_of
from deskside.backends.torch.quants import codebooks
from deskside.lowering.sections import Section
from deskside.tape import Op, Value

RunOps = Callable[[dict[int, Tensor], TorchStep], None]
MAX_TOKENS = 8  # of a step that is captured
MAX_SHAPES = 8  # kept at a time


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


class NewGraph(Protocol):
    """Makes the empty graphs of a device."""

    def __call__(self, outside: Sequence[Tensor], states: Sequence[Tensor]) -> Graph:
        """One that may use these tensors; the second ones are states."""
        ...

    def renew(self) -> None:
        """No graph that it made is kept any more, or the making of one failed."""
        ...


class CudaGraphs:
    """Makes CUDA graphs. They share a pool of memory, since they never overlap, and with it the
    stream that they are captured on (torch's own would be of the first device for all)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.renew()

    def __call__(self, outside: Sequence[Tensor], states: Sequence[Tensor]) -> CudaGraph:
        return CudaGraph(self)

    def renew(self) -> None:
        # A pool that a failed capture leaves open, or that no graph holds, takes no other graph.
        self.pool = torch.cuda.graph_pool_handle()


class CudaGraph:
    """One section."""

    def __init__(self, maker: CudaGraphs) -> None:
        self._maker = maker
        self._graph = torch.cuda.CUDAGraph()

    def capture(self, run: Callable[[], None]) -> None:
        maker = self._maker
        with torch.cuda.device(maker.device):
            current = torch.cuda.current_stream(maker.device)
            try:
                with torch.cuda.graph(
                    self._graph,
                    pool=maker.pool,
                    stream=maker.stream,
                    # Other threads may use CUDA meanwhile: only this one's calls are checked.
                    capture_error_mode="thread_local",
                ):
                    run()
            except BaseException:
                # Where the end of a capture fails, torch keeps allocating to its pool.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(maker.device.index or 0, maker.pool)
                raise
            finally:
                torch.cuda.set_stream(current)  # which torch leaves where the end fails
        self.replay()  # capturing has computed nothing

    def replay(self) -> None:
        with torch.cuda.device(self._maker.device):
            self._graph.replay()


@dataclass(frozen=True)
class Borders:
    """Values that a section reads and does not make, and those of its own that are read later."""

    needed: tuple[Value, ...]
    kept: tuple[Value, ...]


def borders(section: Section, last: Mapping[int, Op]) -> Borders:
    """last: by value, the op after which the section's device can forget it."""
    made = {v.id: v for op in section.ops for v in op.outputs}
    needed = {v.id: v for op in section.ops for v in op.inputs if v.id not in made}
    own = {op.index for op in section.ops}
    exports = {v.id for v in section.exports}
    kept = tuple(v for i, v in made.items() if i in exports or last[i].index not in own)
    return Borders(tuple(needed.values()), kept)


@dataclass
class _Shaped:
    """What is kept for a shape."""

    shape: Shape
    packed: Tensor  # `BatchTensors.packed`, on the device
    buffers: dict[int, Tensor] = field(default_factory=dict)  # by value that crosses a border
    seen: set[int] = field(default_factory=set)  # sections that have run once, by id()
    graphs: dict[int, Graph] = field(default_factory=dict)


class Graphs:
    """The captured sections of one device, for one cache at a time.

    room(): whether what the device holds leaves the work memory of the largest step; asked after
    each capture. note(why): told once, of the first section that cannot be captured.
    """

    def __init__(
        self,
        device: torch.device,
        sections: Sequence[Section],
        last: Mapping[int, Op],
        *,
        new_graph: NewGraph,
        room: Callable[[], bool],
        note: Callable[[str], None],
    ) -> None:
        self._device = device
        self._borders = {id(s): borders(s, last) for s in sections}
        self._new_graph = new_graph
        self._room = room
        self._note = note
        self._noted = False
        # Sections, by id(), with a number of tokens at which they cannot be captured.
        self._never: set[tuple[int, int]] = set()
        self._full = False
        self._shapes: dict[Shape, _Shaped] = {}
        self._states: tuple[Tensor, ...] = ()
        self._now: tuple[weakref.ref[TorchStep], _Shaped] | None = None
        self.captures = self.replays = 0

    def drop(self) -> None:
        """Forget all graphs, and their memory: the cache that they point to is replaced."""
        self._shapes.clear()
        self._states, self._now, self._full = (), None, False
        self._new_graph.renew()

    def run(
        self, section: Section, values: dict[int, Tensor], step: TorchStep, ops: RunOps
    ) -> bool:
        """Run the section on `values`, to which what it makes is added; False if it is not to run
        as a graph, and nothing was done.

        ops(values, step) runs the section's ops as they are, and adds to `values`.
        """
        n = len(step.batch.tokens)
        if n > MAX_TOKENS or not bucket_of(step.batch):
            return False
        if self._full or (id(section), n) in self._never:
            return False
        shaped = self._begin(step)
        graph = shaped.graphs.get(id(section))
        if graph is None and id(section) not in shaped.seen:
            shaped.seen.add(id(section))
            return False
        border = self._borders[id(section)]
        for v in border.needed:
            buffer = self._buffer(shaped, v)
            if values[v.id] is not buffer:
                buffer.copy_(values[v.id])
                values[v.id] = buffer
        if graph is not None:
            graph.replay()
            self.replays += 1
        elif not self._capture(shaped, section, step, ops):
            return False
        values.update({v.id: shaped.buffers[v.id] for v in border.kept})
        return True

    def _begin(self, step: TorchStep) -> _Shaped:
        """What belongs to the step's shape; once a step, its tensors say what the batch says."""
        if self._now is not None and self._now[0]() is step:
            return self._now[1]
        states = tuple(a for i in sorted(step.states) for a in step.states[i])
        same = len(states) == len(self._states)
        if not (same and all(a is b for a, b in zip(states, self._states, strict=True))):
            self.drop()
            self._states = states
        shape = Shape(len(step.batch.tokens), len(step.batch.outputs), bucket_of(step.batch))
        packed = BatchTensors.packed(step.batch)
        shaped = self._shapes.pop(shape, None)
        if shaped is None:
            shaped = _Shaped(shape, torch.empty_like(packed, device=self._device))
        self._shapes[shape] = shaped  # the last one used stands last
        while len(self._shapes) > MAX_SHAPES:
            del self._shapes[next(iter(self._shapes))]
        shaped.packed.copy_(packed)
        self._now = (weakref.ref(step), shaped)
        return shaped

    def _buffer(self, shaped: _Shaped, v: Value) -> Tensor:
        if v.id not in shaped.buffers:
            rows = shaped.shape.outputs if v.per_output else shaped.shape.tokens
            shaped.buffers[v.id] = torch.empty(rows, v.width, device=self._device)
        return shaped.buffers[v.id]

    def _capture(self, shaped: _Shaped, section: Section, step: TorchStep, ops: RunOps) -> bool:
        """Capture and run the section; False if that cannot be, and nothing has changed."""
        border = self._borders[id(section)]
        # Its own rotations: those of `step` may have been computed outside of the graph.
        own = replace(step, _rotations={})
        own.tensors = BatchTensors.of(step.batch, shaped.packed)

        def run() -> None:
            values = {v.id: shaped.buffers[v.id] for v in border.needed}
            ops(values, own)
            for v in border.kept:
                shaped.buffers[v.id].copy_(values[v.id])

        try:
            for v in border.kept:
                self._buffer(shaped, v)
            outside = [*step.weights.values(), *shaped.buffers.values(), shaped.packed]
            graph = self._new_graph([*outside, codebooks(self._device)], self._states)
            graph.capture(run)
        except Exception as error:  # whatever it is, the section can still run as it is
            self._never.add((id(section), shaped.shape.tokens))
            self._new_graph.renew()
            first: BaseException = error
            while first.__context__ is not None:  # the end of a failed capture fails too
                first = first.__context__
            self._tell(f"{type(first).__name__}: {' '.join(str(first).split())}")
            return False
        self.captures += 1
        shaped.graphs[id(section)] = graph
        if not self._room():
            self._shapes.clear()
            self._now, self._full = None, True
            self._tell("no room beside the work memory")
        return True

    def _tell(self, why: str) -> None:
        if not self._noted:
            self._noted = True
            self._note(why)
