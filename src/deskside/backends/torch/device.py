"""A torch device. It holds weights as the file's bytes, states, and the values of a step."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from deskside.backends.torch.expert_ops import EXPERT_OPS
from deskside.backends.torch.graph import CudaGraphs, Graphs, NewGraph
from deskside.backends.torch.kernels import NONE, Kernels
from deskside.backends.torch.ops import OPS, TorchStep
from deskside.backends.torch.quants import TYPES
from deskside.errors import DesksideError
from deskside.gguf import GGUF, TensorInfo
from deskside.gguf.quants import QuantType
from deskside.lowering.buffers import LINE
from deskside.lowering.sections import HOST_TORCH, Section, last_uses
from deskside.progress import Progress
from deskside.tape import KVState, Op, State
from deskside.tape.cache import state_shapes

COPY = 64 << 20  # bytes of a weight that are copied to a device at a time

Arrays = dict[int, NDArray[np.float32]]  # by a value's id


class TorchState:
    """A `DeviceState`: the arrays of one state on a device, in the layouts of `tape/cache.py`."""

    def __init__(self, device: TorchDevice, arrays: tuple[Tensor, ...], recurrent: bool) -> None:
        self._device = device
        self._recurrent = recurrent
        self.arrays = arrays

    @property
    def nbytes(self) -> int:
        return sum(a.nbytes for a in self.arrays)

    def clear(self, slot: int) -> None:
        # a lost device has lost its states too
        if self._recurrent and not self._device.lost:
            self.arrays[0][slot] = 0

    def read(self, slot: int, start: int, end: int) -> tuple[NDArray[Any], ...]:
        with self._device.guard("reading a sequence's state"):
            return tuple(a.cpu().numpy().copy() for a in self._parts(slot, start, end))

    def write(self, slot: int, start: int, end: int, parts: Sequence[NDArray[Any]]) -> None:
        with self._device.guard("writing a sequence's state"):
            for array, part in zip(self._parts(slot, start, end), parts, strict=True):
                array.copy_(torch.from_numpy(part))

    def copy(self, source: int, slot: int, end: int) -> None:
        with self._device.guard("copying a sequence's state"):
            pairs = zip(self._parts(slot, 0, end), self._parts(source, 0, end), strict=True)
            for array, part in pairs:
                array.copy_(part)

    def _parts(self, slot: int, start: int, end: int) -> list[Tensor]:
        return [a[slot] if self._recurrent else a[slot, :, start:end] for a in self.arrays]


class TorchDevice:
    """One torch device.

    kernels: used instead of torch's ops. graphs: whether steps with one token per sequence are
    captured (`graph.py`); None: only on CUDA.
    """

    budget: int | None = None  # limit on its bytes; None for all that is free

    def __init__(
        self,
        name: str,
        device: torch.device,
        *,
        kernels: Kernels = NONE,
        graphs: bool | None = None,
    ) -> None:
        self.name = name
        self.device = device
        self.weights: dict[str, Tensor] = {}
        self._last: dict[int, Op] = {}
        self.lost = False
        self.kernels = kernels
        self._capturing = device.type == "cuda" if graphs is None else graphs
        self.graphs: Graphs | None = None
        # by section: its runs of ops, which are captured each, unless they are of offloaded experts
        self._parts: dict[int, tuple[Section, ...]] = {}
        self._plans: dict[int, tuple[Sequence[Section], dict[int, Op], Graphs | None]] = {}
        self._work = 0

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """Turn a failure of the device into a DesksideError. doing: what the block does.

        After an error of CUDA the device is lost: every later `guard` raises.
        """
        try:
            if self.lost:
                raise self._gone(doing)
            yield
        except torch.OutOfMemoryError as error:
            line = str(error).splitlines()[0]
            raise DesksideError(
                f"device {self.name} is out of memory while {doing}: {line}"
            ) from None
        except RuntimeError as error:
            if self.device.type != "cuda":
                raise
            self.lost = True
            raise self._gone(doing, str(error).splitlines()[0]) from None

    def _gone(self, doing: str, why: str = "") -> DesksideError:
        return DesksideError(
            f"device {self.name} was lost while {doing}{': ' if why else ''}{why}; "
            "the sequence is dropped; load the model again, without this device if it fails again"
        )

    def free(self) -> int | None:
        """Bytes that still fit. None if the system's memory is the limit."""
        if self.device.type != "cuda":
            return None
        return int(torch.cuda.mem_get_info(self.device)[0])

    def expect(self, what: str, nbytes: int) -> None:
        """DesksideError unless `nbytes` more fit. what: names them in the message."""
        free = self.free()
        if free is not None and nbytes > free:
            total = self.budget if self.budget is not None else free
            raise DesksideError(
                f"device {self.name}: {what} of {show(nbytes)} does not fit in the {show(free)} "
                f"left of {show(total)}: {show(nbytes - free)} short; lower -c or -ub, or place "
                "fewer tensors on it"
            )

    def load(self, file: GGUF, infos: Sequence[TensorInfo], work: int, progress: Progress) -> None:
        """Copy the weights `infos` to the device, and leave `work` bytes for activations.

        DesksideError for a type that torch cannot decode, or if they do not fit.
        """
        for info in infos:
            if info.type.name not in TYPES:
                raise DesksideError(
                    f"{info.path}: tensor {info.name} has type {info.type.name}, which device "
                    f"{self.name} cannot decode; place it on the CPU"
                )
        self._work = work
        whole = sum(info.nbytes for info in infos)
        self.expect("weights and work memory", whole + work)
        done = 0
        for info in infos:
            # (rows, row bytes) of a matrix; (experts, rows, row bytes) of experts'
            raw = file.matrices(info) if len(info.shape) > 2 else file.raw(info)
            if self.name == HOST_TORCH:  # no copy: it reads the mapped file
                self.weights[info.name] = _mapped(raw)
                continue
            with self.guard(f"loading {info.name}"):
                held = torch.empty(raw.shape, dtype=torch.uint8, device=self.device)
                rows = max(1, COPY // raw[0].nbytes)
                for i in range(0, len(raw), rows):
                    progress(f"loading to {self.name}", done, whole)
                    held[i : i + rows].copy_(_mapped(raw[i : i + rows]))
                    done += raw[i : i + rows].nbytes
            self.weights[info.name] = held
        progress(f"loading to {self.name}", done, whole)

    def hold(
        self, state: State, n_slots: int, n_ctx: int, k_type: QuantType, v_type: QuantType
    ) -> TorchState:
        """Allocate zeroed memory for a state: `n_slots` sequences of `n_ctx` tokens.

        DesksideError if it does not fit.
        """
        for _, _, graphs in self._plans.values():
            if graphs is not None:
                graphs.drop()  # they point to the previous cache
        kv = isinstance(state, KVState)
        kind = torch.uint8 if kv else torch.float32
        shapes = state_shapes(state, n_ctx, k_type, v_type)
        with self.guard("making room for the cache"):
            arrays = tuple(
                torch.zeros((n_slots, *shape), dtype=kind, device=self.device) for shape in shapes
            )
        return TorchState(self, arrays, not kv)

    def run(self, section: Section, values: dict[int, Tensor], step: TorchStep, rows: int) -> None:
        """Run the section's ops on `values`, by value id. Outputs are added, unused values removed.

        rows: number of wanted logits. With 0, values of their rows are empty.
        DesksideError if the device has no room or is lost.
        """
        for part in self._parts.get(id(section), (section,)):
            if (
                self.graphs is None
                or _is_offloaded(part.ops[0])
                or not self._replay(part, values, step, rows)
            ):
                for op in part.ops:
                    with self.guard(f"computing {op.kind} of layer {op.layer}"):
                        self._op(op, values, step, rows)
                    self._forget(op, section, values)

    def _replay(self, part: Section, values: dict[int, Tensor], step: TorchStep, rows: int) -> bool:
        assert self.graphs is not None

        def ops(own: dict[int, Tensor], captured: TorchStep) -> None:
            for op in part.ops:
                self._op(op, own, captured, rows)
                self._forget(op, part, own)

        with self.guard(f"replaying ops of layer {part.ops[0].layer}"):
            done = self.graphs.run(part, values, step, ops)
        if done:
            for op in part.ops:
                self._forget(op, part, values)
        return done

    def _op(self, op: Op, values: dict[int, Tensor], step: TorchStep, rows: int) -> None:
        if op.outputs[0].per_output and rows == 0:
            made = [torch.empty(0, v.width, device=self.device) for v in op.outputs]
        else:
            compute = OPS.get(op.kind) or EXPERT_OPS[op.kind]
            made = compute(op, [values[v.id] for v in op.inputs], step)
        values.update({v.id: t for v, t in zip(op.outputs, made, strict=True)})

    def _forget(self, op: Op, section: Section, values: dict[int, Tensor]) -> None:
        for value in (*op.inputs, *op.outputs):
            if self._last.get(value.id) is op and value not in section.exports:
                values.pop(value.id, None)

    def beat(self, doing: str) -> None:
        """DesksideError if the device is lost. Called by work beside the ops, such as copies."""
        if self.lost:
            raise self._gone(doing)

    def plan(self, sections: Sequence[Section]) -> None:
        """Prepare for a route's `sections`: find the last use of each value, and make new graphs.

        A value is removed after its last use, an export after it is sent.
        """
        if id(sections) not in self._plans:
            uses = last_uses(sections).items()
            last = {value: op for (device, value), op in uses if device == self.name}
            self._plans[id(sections)] = sections, last, self._new_graphs(sections, last)
        _, self._last, self.graphs = self._plans[id(sections)]

    def _new_graphs(self, sections: Sequence[Section], last: Mapping[int, Op]) -> Graphs | None:
        if not self._capturing:
            return None
        own = []
        for section in (s for s in sections if s.device == self.name):
            runs = [tuple(ops) for _, ops in groupby(section.ops, _is_offloaded)]
            parts = tuple(Section(self.name, ops, exports=section.exports) for ops in runs)
            self._parts[id(section)] = parts
            own += [part for part in parts if not _is_offloaded(part.ops[0])]
        return Graphs(
            self.device,
            own,
            last,
            new_graph=self._graph_maker(),
            room=self._leaves_room,
            note=self._note,
        )

    def _graph_maker(self) -> NewGraph:
        return CudaGraphs(self.device)

    def _leaves_room(self) -> bool:
        """Whether the work memory of the largest step still fits."""
        free = self.free()
        return free is None or free + self._idle() >= self._work

    def _idle(self) -> int:
        """Bytes that torch's allocator keeps for later: they count as free."""
        if self.device.type != "cuda":
            return 0
        reserved = torch.cuda.memory_reserved(self.device)
        return int(reserved - torch.cuda.memory_allocated(self.device))

    def _note(self, why: str) -> None:
        warnings.warn(f"device {self.name} runs without graphs: {why}", stacklevel=2)

    def send(self, section: Section, values: dict[int, Tensor]) -> Callable[[], Arrays]:
        """Start to copy a section's exports to the host. The function returned waits for them.

        Exports that the device does not use again are removed from `values`.
        """
        wait = self._download({v.id: values[v.id] for v in section.exports})
        for v in section.exports:
            if any(self._last[v.id] is op for op in section.ops):
                del values[v.id]
        return wait

    def upload(self, arrays: Arrays) -> dict[int, Tensor]:
        """Copy values, by id, to the device in one transfer."""
        offsets, total = _offsets({i: a.size for i, a in arrays.items()})
        staged = torch.empty(total, pin_memory=self.device.type == "cuda")
        for i, a in arrays.items():
            staged[offsets[i] : offsets[i] + a.size] = torch.from_numpy(a.reshape(-1))
        with self.guard("receiving values"):
            flat = torch.empty(total, device=self.device)
            # torch reuses pinned memory only after the copy is done
            flat.copy_(staged, non_blocking=True)
            return {i: flat[offsets[i] :][: a.size].view(a.shape) for i, a in arrays.items()}

    def _download(self, values: Mapping[int, Tensor]) -> Callable[[], Arrays]:
        """Start to copy values to the host in one transfer. The function returned waits for it."""
        offsets, total = _offsets({i: t.numel() for i, t in values.items()})
        with self.guard("sending values"):
            flat = torch.empty(total, device=self.device)
            for i, t in values.items():
                flat[offsets[i] : offsets[i] + t.numel()] = t.reshape(-1)
            if self.device.type == "cuda":
                host = torch.empty(total, pin_memory=True)
                host.copy_(flat, non_blocking=True)
                event = torch.cuda.Event()
                event.record(torch.cuda.current_stream(self.device))
        if self.device.type != "cuda":
            host, event = flat.clone(), None
        shapes = {i: tuple(t.shape) for i, t in values.items()}

        def wait() -> Arrays:
            if event is not None:
                with self.guard("sending values"):
                    event.synchronize()
            array = host.numpy()
            return {
                i: array[offsets[i] :][: int(np.prod(shape))].reshape(shape)
                for i, shape in shapes.items()
            }

        return wait


def _is_offloaded(op: Op) -> bool:
    """Whether the op is of offloaded experts. No graph can run it: the host counts its experts."""
    return op.kind in EXPERT_OPS


def show(nbytes: int) -> str:
    """`nbytes` as text for a message: in MiB, and exact."""
    return f"{nbytes / (1 << 20):.1f} MiB ({nbytes} bytes)"


def _offsets(sizes: Mapping[int, int]) -> tuple[dict[int, int], int]:
    """Where each value starts in one transfer, and the total length, in floats.

    Values start on cache lines. sizes: floats, by value id.
    """
    offsets, total = {}, 0
    for i, size in sizes.items():
        offsets[i] = total
        total += -(-size // LINE) * LINE
    return offsets, total


def _mapped(raw: NDArray[np.uint8]) -> Tensor:
    """A view of file bytes. Their mapping is read-only; torch has no such tensors and warns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(raw)
