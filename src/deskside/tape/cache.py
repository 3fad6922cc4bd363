"""The state of sequences between tokens: keys and values, convolution inputs, delta states.

Layouts, one array per state (a slot holds one sequence):

    KVState     k, v   uint8   (slots, kv_heads, n_ctx, bytes of one head's row)
    ConvState          float32 (slots, kernel - 1, width), oldest input first, before SiLU
    DeltaState         float32 (slots, v_heads, head_dim keys, head_dim values)

Each KV head has its positions in one run, so attention reads one contiguous stream per KV head. The
recurrent states stay float32: others report that half precision breaks the model (docs/MODEL.md).
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from deskside.errors import DesksideError
from deskside.gguf.quants import QuantType, quant_type
from deskside.tape.tape import ConvState, DeltaState, KVState, State

KV_TYPES = ("f16", "q8_0", "f32")


def kv_type(name: str, flag: str) -> QuantType:
    """The quant type that `flag` gives the KV cache. DesksideError for an unknown name."""
    if name.lower() not in KV_TYPES:
        raise DesksideError(f"{flag} {name}: a KV cache is one of {', '.join(KV_TYPES)}")
    return quant_type(name)


@dataclass(frozen=True)
class Segment:
    """`n` consecutive tokens of the sequence in `slot`, the first at position `pos`."""

    slot: int
    pos: int
    n: int


@dataclass(frozen=True)
class Batch:
    """Tokens of one step, segment after segment, and the rows whose logits are wanted."""

    tokens: NDArray[np.int32]
    segments: tuple[Segment, ...]
    outputs: NDArray[np.int32]


Number = TypeVar("Number", np.uint8, np.float32)
HUGE = 2 << 20  # bytes of a huge page


def zeros(shape: tuple[int, ...], dtype: type[Number]) -> NDArray[Number]:
    """Zeroed memory, aligned to pages. Large memory is in huge pages if the system has them."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        memory = mmap.mmap(-1, size + HUGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise DesksideError(
            f"no memory for {size / 1e9:.1f} GB of cache: {error.strerror}; lower -c"
        ) from None
    data = np.frombuffer(memory, np.uint8)
    start = -data.ctypes.data % HUGE if size >= HUGE else 0
    if size >= HUGE and hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return data[start : start + size].view(dtype).reshape(shape)


Arrays = tuple[NDArray[np.uint8] | NDArray[np.float32], ...]


class DeviceState(Protocol):
    """A state in the memory of a device. Only keys and values use the positions."""

    @property
    def nbytes(self) -> int: ...

    def clear(self, slot: int) -> None: ...

    def read(self, slot: int, start: int, end: int) -> Arrays:
        """A copy in the system's memory; of keys and values only positions `start` to end - 1."""
        ...

    def write(self, slot: int, start: int, end: int, parts: Arrays) -> None:
        """Put back what `read` returned for the same positions."""
        ...

    def copy(self, source: int, slot: int, end: int) -> None:
        """Copy one slot to another; of keys and values the positions before `end`."""
        ...


@dataclass(frozen=True)
class Checkpoint:
    """A sequence after its first `n` tokens, kept outside the cache.

    parts: per state, the arrays of `state_shapes`. Keys and values are those of positions `start`
    to n - 1.
    """

    n: int
    start: int
    parts: tuple[Arrays, ...]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for arrays in self.parts for array in arrays)


class Cache:
    """State of `n_slots` sequences of at most `n_ctx` tokens.

    The system gives zeroed memory; a page takes memory only once it is written.
    device_states: by index, the states that a backend has on its devices. Their `arrays` are ().
    lengths: how many tokens of each slot's sequence are computed.
    Not thread-safe: threads that share a cache must take turns (`engine.load.Loaded`).
    """

    def __init__(
        self,
        states: Sequence[State],
        *,
        n_slots: int,
        n_ctx: int,
        k_type: QuantType,
        v_type: QuantType,
        device_states: Mapping[int, DeviceState] | None = None,
    ) -> None:
        self.device_states: Mapping[int, DeviceState] = device_states or {}
        self.states = tuple(states)
        self.n_slots = n_slots
        self.n_ctx = n_ctx
        self.k_type = k_type
        self.v_type = v_type
        self.lengths = [0] * n_slots
        self.arrays: list[Arrays] = [
            () if i in self.device_states else self._allocate(state)
            for i, state in enumerate(states)
        ]

    def _allocate(self, state: State) -> Arrays:
        shapes = state_shapes(state, self.n_ctx, self.k_type, self.v_type)
        if isinstance(state, KVState):
            return tuple(zeros((self.n_slots, *shape), np.uint8) for shape in shapes)
        return tuple(zeros((self.n_slots, *shape), np.float32) for shape in shapes)

    @property
    def nbytes(self) -> int:
        own = sum(array.nbytes for arrays in self.arrays for array in arrays)
        return own + sum(state.nbytes for state in self.device_states.values())

    def check(self, batch: Batch) -> None:
        """ValueError if a segment lies outside."""
        for s in batch.segments:
            if not (0 <= s.slot < self.n_slots and s.pos >= 0 and s.pos + s.n <= self.n_ctx):
                raise ValueError(f"{s} lies outside the cache")

    @property
    def recurrent(self) -> bool:
        """Whether sequences have recurrent state, which cannot be cut back."""
        return any(not isinstance(state, KVState) for state in self.states)

    @property
    def recurrent_bytes(self) -> int:
        """Bytes of recurrent state per sequence."""
        return cache_bytes(self.states, 1, self.k_type, self.v_type)[1]

    def advance(self, batch: Batch) -> None:
        """Count the batch's tokens as computed. Backends call this after a step."""
        for s in batch.segments:
            self.lengths[s.slot] = s.pos + s.n

    def truncate(self, slot: int, n: int) -> bool:
        """Cut a sequence back to its first `n` tokens. Returns False and changes nothing if that
        is impossible: the sequence is shorter, or its recurrent state is already past n."""
        length = self.lengths[slot]
        if n == 0:
            self.clear(slot)
        elif n > length or (n < length and self.recurrent):
            return False
        self.lengths[slot] = n
        return True

    def snapshot(self, slot: int, n: int, start: int = 0) -> Checkpoint:
        """A copy of the sequence in `slot` after its first `n` tokens.

        start: leave out keys and values before this position; start=n keeps recurrent state only.
        ValueError if the slot has no state of that length (see `truncate`).
        """
        length = self.lengths[slot]
        if not 0 <= start <= n <= length or (n < length and self.recurrent):
            raise ValueError(f"slot {slot} holds {length} tokens: there is no state of {n}")
        return Checkpoint(n, start, tuple(self._read(i, slot, start, n) for i in self._indices))

    def restore(self, slot: int, checkpoint: Checkpoint) -> None:
        """Put a sequence back as it was. Keys and values before `checkpoint.start` must still be
        in the slot; `clear` and shorter sequences do not overwrite them."""
        n, start = checkpoint.n, checkpoint.start
        if n > self.n_ctx:
            raise ValueError(f"a checkpoint of {n} tokens in a context of {self.n_ctx}")
        self.lengths[slot] = (
            0  # an interruption must not leave a half-restored slot that counts as whole
        )
        for i, parts in zip(self._indices, checkpoint.parts, strict=True):
            if i in self.device_states:
                self.device_states[i].write(slot, start, n, parts)
            else:
                for array, part in zip(self.arrays[i], parts, strict=True):
                    self._part(i, array[slot], start, n)[...] = part
        self.lengths[slot] = n

    def copy(self, source: int, slot: int) -> None:
        """Make slot `slot` hold what `source` holds."""
        n = self.lengths[source]
        if source == slot:
            return
        self.lengths[slot] = 0
        for i in self._indices:
            if i in self.device_states:
                self.device_states[i].copy(source, slot, n)
            else:
                for array in self.arrays[i]:
                    self._part(i, array[slot], 0, n)[...] = self._part(i, array[source], 0, n)
        self.lengths[slot] = n

    @property
    def _indices(self) -> range:
        return range(len(self.states))

    def _read(self, i: int, slot: int, start: int, end: int) -> Arrays:
        if i in self.device_states:
            return self.device_states[i].read(slot, start, end)
        return tuple(self._part(i, array[slot], start, end).copy() for array in self.arrays[i])

    def _part(self, i: int, array: Any, start: int, end: int) -> Any:
        """The part of one sequence's array that holds positions `start` to end - 1."""
        return array[:, start:end] if isinstance(self.states[i], KVState) else array

    def clear(self, slot: int) -> None:
        """Forget a sequence. Keys and values stay in place: only computed positions are read."""
        self.lengths[slot] = 0
        for state, arrays in zip(self.states, self.arrays, strict=True):
            if arrays and not isinstance(state, KVState):
                arrays[0][slot] = 0
        for held in self.device_states.values():
            held.clear(slot)


def state_shapes(
    state: State, n_ctx: int, k_type: QuantType, v_type: QuantType
) -> tuple[tuple[int, ...], ...]:
    """Array shapes of one sequence's part of a state: uint8 for keys and values, else float32."""
    match state:
        case KVState(kv_heads=heads, head_dim=head_dim):
            return (
                (heads, n_ctx, k_type.row_bytes(head_dim)),
                (heads, n_ctx, v_type.row_bytes(head_dim)),
            )
        case ConvState(width=width, kernel=kernel):
            return ((kernel - 1, width),)
        case DeltaState(v_heads=v_heads, head_dim=head_dim):
            return ((v_heads, head_dim, head_dim),)


def cache_bytes(
    states: Sequence[State], n_ctx: int, k_type: QuantType, v_type: QuantType
) -> tuple[int, int]:
    """Bytes of one sequence at `n_ctx` positions: (keys and values, recurrent state)."""
    kv = recurrent = 0
    for state in states:
        elements = sum(math.prod(s) for s in state_shapes(state, n_ctx, k_type, v_type))
        if isinstance(state, KVState):
            kv += elements
        else:
            recurrent += 4 * elements
    return kv, recurrent
