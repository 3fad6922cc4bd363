"""Where each matrix lies in the arena of packed weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from deskside import _native
from deskside.errors import DesksideError
from deskside.gguf import TensorInfo
from deskside.lowering.steps import Step

PAGE_BYTES = 4096  # a matrix starts on a page of its own


@dataclass(frozen=True)
class PanelRange:
    """A tensor's place: `groups` matrices (one per expert), panels `stride` bytes apart."""

    info: TensorInfo
    at: int
    stride: int
    rows: int
    groups: int


def matrices(steps: Iterable[Step]) -> list[tuple[TensorInfo, ...]]:
    """The tensors that are multiplied, in order of use; those to be interleaved together."""
    found: list[tuple[TensorInfo, ...]] = []
    for step in steps:
        for op in step.ops:
            if op.kind == "linear":
                for part in op.parts:
                    up = part.up.weights if part.up else ()
                    found.append((part.op.weights[0], *up))
            elif op.kind == "experts_up":
                found.append(op.op.weights[:2])
            elif op.kind == "experts_down":
                found.append(op.op.weights[2:])
    return found


def panel_bytes(info: TensorInfo) -> int:
    """Bytes of a panel of the tensor's rows. DesksideError where its type has no CPU kernel."""
    try:
        return _native.panel_bytes(info.type.id, info.row_len)
    except ValueError:
        raise DesksideError(
            f"{info.path}: tensor {info.name} has type {info.type.name}, which has no kernel"
        ) from None


def layout(tensors: Iterable[Sequence[TensorInfo]]) -> tuple[list[PanelRange], int]:
    """Places of all tensors, and the arena's bytes."""
    ranges: list[PanelRange] = []
    total = 0
    seen: set[str] = set()
    for together in tensors:
        if together[0].name in seen:
            continue
        seen.update(t.name for t in together)
        panels = [panel_bytes(t) for t in together]
        stride, at = sum(panels), total
        for info, panel in zip(together, panels, strict=True):
            groups = info.shape[2] if len(info.shape) > 2 else 1
            rows = info.n_rows // groups
            ranges.append(PanelRange(info, at, stride, rows, groups))
            at += panel
        n_panels = -(-rows // _native.PANEL_ROWS) * groups
        total += -(-stride * n_panels // PAGE_BYTES) * PAGE_BYTES
    return ranges, total
