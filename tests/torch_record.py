"""What stands in for a CUDA graph where there is no CUDA: torch's calls, recorded and repeated.

While a `Recording` is active, every call that torch dispatches is noted with its tensors. `replay`
makes the calls again, without the Python code that led to them, on the very same memory: results go
to fixed places, so whatever that code would have computed anew from the batch stays as it was. A
test that replays therefore sees what a graph would have baked in.

Refused are what a capture on CUDA refuses: to wait for the device (`.item()`, `nonzero`, indexing
by booleans, ...), copies between devices, and tensors that came into being outside, on the host.

Temporaries lie in a block of memory that the recordings of a device share, as graphs share a pool;
a tensor's place is reused once nothing in the recording reads it any more. A launch of a Triton
kernel, which torch does not dispatch, is one call (`Kernels.launches`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.weak import WeakIdKeyDictionary

from deskside.backends.torch.kernels import NONE, Kernels

LINE_BYTES = 64  # of a cache line; torch aligns likewise
WAITING_OPS = frozenset({
    "_local_scalar_dense", "nonzero", "masked_select", "_unique", "_unique2", "unique_dim",
    "unique_consecutive", "bincount", "is_nonzero", "equal",
})  # fmt: skip
WAITING_METHODS = frozenset(
    {"tolist", "numpy", "cpu", "item", "__array__", "__bool__", "__int__", "__float__"}
)
INDEXING = frozenset({"index", "index_put", "index_put_", "_index_put_impl_"})
UNFILLED = frozenset({"empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided"})


class Refused(Exception):
    """A capture on CUDA would have failed here."""


@dataclass(frozen=True)
class _Place:
    """A tensor within a storage that the recording made."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int  # elements


@dataclass
class _Call:
    run: Callable[..., Any]
    spec: Any
    args: list[Any]  # leaves; tensors as _Place or, from outside, themselves
    fresh: list[tuple[int, Any]] = field(default_factory=list)  # by leaf of the result
    modes: bool = True  # whether dispatch modes see it


class Blocks:
    """Memory that the recordings of one device take turns in."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._blocks: list[Tensor] = []

    def of(self, nbytes: int) -> Tensor:
        for block in self._blocks:
            if block.numel() >= nbytes:
                return block
        self._blocks.append(torch.empty(nbytes, dtype=torch.uint8, device=self._device))
        return self._blocks[-1]


class Recording:
    """A `torch_graph.Graph`. outside: tensors that may be used, at addresses that stay; states:
    those of them that are put back as they were if the capture fails."""

    def __init__(
        self,
        outside: Iterable[Tensor],
        states: Sequence[Tensor],
        blocks: Blocks,
        kernels: Kernels = NONE,
    ) -> None:
        self._kernels = kernels
        self._storages = WeakIdKeyDictionary()  # to its number; -1: outside
        self._keep = list(outside)
        for tensor in (*self._keep, *states):
            self._storages[tensor.untyped_storage()] = -1
        self._states = list(states)
        self._saved: dict[int, Tensor] = {}  # by index in states
        self._blocks = blocks
        self._sizes: list[int] = []
        self._first: list[int] = []  # the call that made a storage, and the last one with it
        self._last: list[int] = []
        self._calls: list[_Call] = []
        self._ready: list[_Call] = []

    def capture(self, run: Callable[[], None]) -> None:
        """Refused, or whatever `run` raises; the states are then as before."""
        try:
            with self._kernels.launches(self._launch), _NoHost(), _Dispatch(self):
                run()
            self._settle()
        except BaseException:
            self._put_back()
            raise
        finally:
            self._saved.clear()

    def replay(self) -> None:
        for call in self._ready:
            args, kwargs = tree_unflatten(call.args, call.spec)
            if not call.modes:
                with _disable_current_modes():
                    call.run(*args, **kwargs)
                continue
            leaves = tree_leaves(call.run(*args, **kwargs))
            for i, fixed in call.fresh:
                fixed.copy_(leaves[i])

    def _dispatched(self, func: Any, args: Any, kwargs: Any) -> Any:
        flat, spec = tree_flatten((args, kwargs))
        name = func._schema.name.partition("::")[2]
        self._refuse(name, func._schema.overload_name, flat)
        described = [self._describe(x, name) for x in flat]
        if func._schema.is_mutable:
            self._save(flat)
        out = func(*args, **kwargs)
        call = _Call(func, spec, described)
        for i, leaf in enumerate(tree_leaves(out)):
            if isinstance(leaf, Tensor):
                new = leaf.untyped_storage() not in self._storages
                if new:
                    self._add(leaf.untyped_storage())
                place = self._describe(leaf, name)
                if new and name not in UNFILLED:
                    call.fresh.append((i, place))
        self._calls.append(call)
        if not func._schema.is_mutable and not call.fresh:
            call.run = _nothing  # views are where they were
        return out

    def _launch(self, run: Callable[..., None], args: tuple[Any, ...]) -> None:
        flat, spec = tree_flatten((args, {}))
        self._calls.append(_Call(run, spec, [self._describe(x, "launch") for x in flat]))
        self._calls[-1].modes = False
        self._save(flat)
        with _disable_current_modes():
            run(*args)

    def _refuse(self, name: str, overload: str, flat: list[Any]) -> None:
        if name in WAITING_OPS or (name, overload) == ("repeat_interleave", "Tensor"):
            raise Refused(f"aten::{name} waits for the device")
        tensors = [x for x in flat if isinstance(x, Tensor)]
        if name in INDEXING and any(x.dtype in (torch.bool, torch.uint8) for x in tensors[1:2]):
            raise Refused(f"aten::{name} by booleans waits for the device")
        own = self._keep[0].device
        elsewhere = [x for x in flat if isinstance(x, torch.device) and x != own]
        if elsewhere or any(x.device != own for x in tensors):
            raise Refused(f"aten::{name} copies between devices")

    def _describe(self, x: Any, name: str) -> Any:
        """A tensor as its place; anything else, and tensors from outside, as they are."""
        if not isinstance(x, Tensor):
            return x
        number = self._storages.get(x.untyped_storage())
        if number is None:
            raise Refused(f"aten::{name} reads a tensor that was made outside of the section")
        if number < 0:
            return x
        self._last[number] = len(self._calls)
        return _Place(number, x.dtype, tuple(x.shape), x.stride(), x.storage_offset())

    def _add(self, storage: Any) -> None:
        self._storages[storage] = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._first.append(len(self._calls))
        self._last.append(len(self._calls))

    def _save(self, flat: list[Any]) -> None:
        """Copies of the states that a call may change, for `_put_back`. Not metered: CUDA, which
        computes nothing while it captures, needs none."""
        pointers = {x.untyped_storage().data_ptr() for x in flat if isinstance(x, Tensor)}
        for i, state in enumerate(self._states):
            if i not in self._saved and state.untyped_storage().data_ptr() in pointers:
                with _disable_current_modes():
                    self._saved[i] = state.clone()

    def _put_back(self) -> None:
        with _disable_current_modes():
            for i, saved in self._saved.items():
                self._states[i].copy_(saved)

    def _settle(self) -> None:
        """Give every storage its place, and the calls tensors there."""
        offsets, total = places(self._sizes, self._first, self._last)
        block = self._blocks.of(max(total, LINE_BYTES))

        def fixed(x: Any) -> Any:
            if not isinstance(x, _Place):
                return x
            start = offsets[x.storage] // x.dtype.itemsize + x.offset
            typed = block[: block.numel() // LINE_BYTES * LINE_BYTES].view(x.dtype)
            return typed.as_strided(x.size, x.stride, start)

        for call in self._calls:
            call.args = [fixed(x) for x in call.args]
            call.fresh = [(i, fixed(x)) for i, x in call.fresh]
        self._ready = [c for c in self._calls if c.run is not _nothing]
        self._calls = []


class Recordings:
    """Makes the recordings of a device. They share blocks of memory."""

    def __init__(self, device: torch.device, kernels: Kernels) -> None:
        self._blocks = Blocks(device)
        self._kernels = kernels

    def __call__(self, outside: Sequence[Tensor], states: Sequence[Tensor]) -> Recording:
        return Recording(outside, states, self._blocks, self._kernels)

    def renew(self) -> None:
        """Blocks serve any recording."""


def places(
    sizes: Sequence[int], first: Sequence[int], last: Sequence[int]
) -> tuple[list[int], int]:
    """Offsets in bytes such that no two that live at once overlap, and the bytes of all. Number i
    lives from call first[i] to last[i]; `first` does not fall."""
    offsets: list[int] = []
    live: list[int] = []
    total = 0
    for i, size in enumerate(sizes):
        live = [j for j in live if last[j] >= first[i]]
        at = 0
        for j in sorted(live, key=offsets.__getitem__):
            if offsets[j] - at >= size:
                break
            at = max(at, -(-(offsets[j] + sizes[j]) // LINE_BYTES) * LINE_BYTES)
        offsets.append(at)
        live.append(i)
        total = max(total, -(-(at + size) // LINE_BYTES) * LINE_BYTES)
    return offsets, total


def _nothing(*args: Any, **kwargs: Any) -> None:
    """A call that need not be made again."""


class _Dispatch(TorchDispatchMode):  # type: ignore[misc]
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._recording._dispatched(func, args, kwargs or {})


class _NoHost(TorchFunctionMode):  # type: ignore[misc]
    """Reading a tensor's values does not always dispatch when they are on the CPU already."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") in WAITING_METHODS:
            raise Refused(f"Tensor.{func.__name__} waits for the device")
        return func(*args, **(kwargs or {}))
