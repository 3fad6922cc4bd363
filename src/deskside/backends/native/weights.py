"""Loads a model's matrices, packed for the kernels, in the order in which a step reads them.

Matrices are in one arena of huge pages, in panels of 16 rows (native/weights/panel.h). They take as
many bytes as in the file, plus the padding of each last panel. A swiglu's gate and up alternate
panel by panel, so that a thread reads one stream. A tensor is read and packed in pieces, so no
second copy of it is in memory, unless its rows are interleaved in the file.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np

from deskside import _native
from deskside.errors import DesksideError
from deskside.files import read_at
from deskside.gguf import TensorInfo
from deskside.lowering.panels import PanelRange, layout, matrices
from deskside.lowering.steps import Step
from deskside.machine import pages
from deskside.machine.host import HostOptions
from deskside.machine.system import available_memory
from deskside.progress import Progress, silent


def load(
    steps: Sequence[Step],
    host: HostOptions,
    *,
    reserve: int = 0,
    progress: Progress = silent,
    packed: Mapping[str, _native.Weights] = MappingProxyType({}),
) -> dict[str, _native.Weights]:
    """All matrices of `steps`, by name. `reserve` bytes of memory are left free.

    packed: matrices that are already loaded; they are returned as they are.
    DesksideError if the matrices do not fit or cannot be read. A system without NUMA only causes a
    warning. Any failure, Ctrl-C included, frees the memory, even if a caller keeps the exception.
    """
    ranges, total = layout(
        together for together in matrices(steps) if any(t.name not in packed for t in together)
    )
    arena = _arena(total, reserve, host)
    weights = dict(packed)
    files: dict[Path, int] = {}
    done, whole = 0, sum(p.info.nbytes for p in ranges)
    # Packed tensors are not read again, and a large file's pages must not evict the arena.
    forget = whole > available_memory() // 2
    try:
        for p in ranges:
            info = p.info
            if info.path not in files:
                files[info.path] = os.open(info.path, os.O_RDONLY)
            fd = files[info.path]
            progress("loading", done, whole)
            weights[info.name] = _packed(arena, fd, p, host.most_threads)
            if forget:
                _forget(fd, info)
            done += info.nbytes
        progress("loading", done, whole)
    except BaseException as error:
        weights.clear()
        del arena
        if isinstance(error, MemoryError):
            raise DesksideError(f"{info.path}: no memory to load tensor {info.name}") from None
        if isinstance(error, RuntimeError | OSError):
            raise DesksideError(f"{info.path}: tensor {info.name} {error}") from None
        raise
    finally:
        for fd in files.values():
            os.close(fd)
    return weights


def _forget(fd: int, info: TensorInfo) -> None:
    """Let go of the file's pages, but not of those of rows between the matrices."""
    runs = info.n_matrices if info.stride else 1
    for i in range(runs):
        at = info.offset + i * info.matrix_stride
        os.posix_fadvise(fd, at, info.nbytes // runs, os.POSIX_FADV_DONTNEED)


def _packed(arena: _native.Arena, fd: int, p: PanelRange, threads: int) -> _native.Weights:
    """A tensor's panels from its file. An interleaved one is taken apart in memory first."""
    info, place = p.info, (p.groups, p.at, p.stride, threads)
    type_id, n = info.type.id, info.row_len
    if info.interleaved is None:
        between = (info.stride,) if info.stride else ()
        return arena.from_file(fd, info.offset, type_id, n, p.rows, *place, *between)
    stored = np.empty((info.n_matrices, info.matrix_bytes), np.uint8)
    for i, matrix in enumerate(stored):
        read_at(fd, info.offset + i * info.matrix_stride, matrix)
    data = info.interleaved.plain(stored.reshape(info.n_rows, info.row_bytes))
    return arena.from_array(data, type_id, n, *place)


def _arena(total: int, reserve: int, host: HostOptions) -> _native.Arena:
    """Memory for `total` bytes of weights. DesksideError if it does not fit beside `reserve`."""
    free = available_memory()
    huge_pages = host.huge_pages
    from_pool = huge_pages in pages.RESERVED  # the system counts reserved pages as taken
    if from_pool:
        pages.need_reserved(huge_pages, total)
    needed = reserve + (0 if from_pool else total)
    sizes = f"the weights take {total / 1e9:.1f} GB, cache and work memory {reserve / 1e9:.1f} GB"
    if needed > free:
        raise DesksideError(
            f"{sizes}, of {free / 1e9:.1f} GB free; take a smaller file, lower -c, or use "
            "-ctk q8_0 -ctv q8_0"
        )
    nodes, note = pages.spread(host.numa)
    try:
        arena = _native.Arena(total, huge_pages, nodes)
    except MemoryError:
        why = "a limit of the system refuses them; raise ulimit -v or the overcommit limit"
        if from_pool:
            why = f"the reserved pages are not there (--huge-pages {huge_pages})"
        raise DesksideError(f"{sizes}; {why}") from None
    if arena.nodes_error:
        note = pages.not_spread(arena.nodes_error)
    if note:
        warnings.warn(note, stacklevel=2)
    return arena
