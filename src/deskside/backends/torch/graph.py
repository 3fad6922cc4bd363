"""Captures a section once and replays it: no Python between its ops, one launch on CUDA.

In a step with one token per sequence, all shapes follow from its `Shape`. The ops read the batch
from `ops.BatchTensors`. So a section runs uncaptured at first, which compiles kernels and
initialises libraries. It is captured the second time, and replayed from then on. Values that cross
its borders are in buffers, one set per shape, whose addresses do not change.

On CUDA the capture is a CUDA graph. The tests' device records the calls that torch dispatches, and
repeats them on the same memory (tests/torch_record.py). It refuses what CUDA refuses: ops that wait
for the device, and data from the host.

If a capture fails, the section runs uncaptured, and the user gets one note.
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
MAX_TOKENS = 8  # limit on the tokens of a captured step
MAX_SHAPES = 8  # limit on the shapes kept; the least recently used goes first


@dataclass(frozen=True)
class Shape:
    """What the shapes of a captured step depend on.

    tokens: one per sequence. outputs: wanted logits. bucket: as in `ops.BatchTensors`.
    """

    tokens: int
    outputs: int
    bucket: int


class Graph(Protocol):
    """One captured section."""

    def capture(self, run: Callable[[], None]) -> None:
        """Record `run` and execute it once. Raises if it cannot be captured."""
        ...

    def replay(self) -> None:
        """Repeat what `run` did to memory."""
        ...


class NewGraph(Protocol):
    """Makes the empty graphs of a device."""

    def __call__(self, outside: Sequence[Tensor], states: Sequence[Tensor]) -> Graph:
        """An empty graph that may use these tensors. states: those that it may change."""
        ...

    def renew(self) -> None:
        """Release what the graphs share. Called after all are dropped, or a capture failed."""
        ...


class CudaGraphs:
    """Makes the CUDA graphs of a device.

    They never overlap, so they share a pool of memory and the stream of their capture. torch's
    default capture stream is on the first device, whichever device is captured.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        self.renew()

    def __call__(self, outside: Sequence[Tensor], states: Sequence[Tensor]) -> CudaGraph:
        return CudaGraph(self)

    def renew(self) -> None:
        # A new pool: after a failed capture, or once no graph uses it, a pool accepts no graph.
        self.pool = torch.cuda.graph_pool_handle()


class CudaGraph:
    """One section as a CUDA graph."""

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
                    # other threads may use CUDA meanwhile: check only this thread's calls
                    capture_error_mode="thread_local",
                ):
                    run()
            except BaseException:
                # If the end of a capture fails, torch keeps allocating from the graph's pool.
                with contextlib.suppress(Exception):
                    torch._C._cuda_endAllocateToPool(maker.device.index or 0, maker.pool)
                raise
            finally:
                torch.cuda.set_stream(current)  # torch does not if the end of the capture fails
        self.replay()  # a capture computes nothing

    def replay(self) -> None:
        with torch.cuda.device(self._maker.device):
            self._graph.replay()


@dataclass(frozen=True)
class Borders:
    """needed: values that a section reads from others. kept: its outputs that others read."""

    needed: tuple[Value, ...]
    kept: tuple[Value, ...]


def borders(section: Section, last: Mapping[int, Op]) -> Borders:
    """The borders of a section. last: by value id, the last op of the device that uses it."""
    made = {v.id: v for op in section.ops for v in op.outputs}
    needed = {v.id: v for op in section.ops for v in op.inputs if v.id not in made}
    own = {op.index for op in section.ops}
    exports = {v.id for v in section.exports}
    kept = tuple(v for i, v in made.items() if i in exports or last[i].index not in own)
    return Borders(tuple(needed.values()), kept)


@dataclass
class _Shaped:
    """The buffers and graphs of one shape."""

    shape: Shape
    packed: Tensor  # `BatchTensors.packed`, on the device
    buffers: dict[int, Tensor] = field(default_factory=dict)  # by id of a value at a border
    seen: set[int] = field(default_factory=set)  # id() of sections that have run once
    graphs: dict[int, Graph] = field(default_factory=dict)  # by id() of a section


class Graphs:
    """The captured sections of one device, for one cache at a time.

    sections, last: as in `borders`.
    room(): whether the work memory of the largest step still fits; called after each capture.
    note(why): called once, for the first section that cannot be captured.
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
        # (id() of a section, tokens of a step) that cannot be captured
        self._never: set[tuple[int, int]] = set()
        self._full = False
        self._shapes: dict[Shape, _Shaped] = {}
        self._states: tuple[Tensor, ...] = ()
        self._now: tuple[weakref.ref[TorchStep], _Shaped] | None = None
        self.captures = self.replays = 0

    def drop(self) -> None:
        """Free all graphs and buffers. Call it when the cache that they point to is replaced."""
        self._shapes.clear()
        self._states, self._now, self._full = (), None, False
        self._new_graph.renew()

    def run(
        self, section: Section, values: dict[int, Tensor], step: TorchStep, ops: RunOps
    ) -> bool:
        """Run the section as a graph and add its outputs to `values`, by value id.

        Returns False and does nothing if it must run uncaptured.
        ops(values, step) runs the section's ops uncaptured and adds their outputs to `values`.
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
        """The buffers and graphs of the step's shape. The batch is copied there once per step."""
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
        self._shapes[shape] = shaped  # the most recently used is last
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
        """Capture and run the section. Returns False and changes nothing if that is impossible."""
        border = self._borders[id(section)]
        # no cached rotations: those of `step` may have been computed outside the graph
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
        except Exception as error:  # any error: the section can still run uncaptured
            self._never.add((id(section), shaped.shape.tokens))
            self._new_graph.renew()
            first: BaseException = error
            while first.__context__ is not None:  # the end of a failed capture raises as well
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
