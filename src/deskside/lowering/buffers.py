"""Places the values of a tape in one arena. Values needed at different times share memory."""

from __future__ import annotations

from collections.abc import Sequence

from deskside.lowering.steps import Step
from deskside.tape import Value

LINE = 16  # floats of a cache line: buffers start on one
PAGE = 1024  # floats of 4 KiB


def stride(width: int) -> int:
    """Floats from a row to the next. Rows whole pages apart would share few sets of the caches."""
    return width + LINE if width > 0 and width % PAGE == 0 else width


def plan_buffers(
    steps: Sequence[Step], max_rows: int, external: Value
) -> tuple[dict[int, int], int]:
    """Offsets in floats of every value but `external`, and the arena's size.

    First fit: a value takes the lowest gap that is free from the step that first writes it to the
    last step that uses it. Values of one step never share a place: its ops run in any order.
    """
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    for i, step in enumerate(steps):
        for op in step.ops:
            for value in op.outputs:
                made.setdefault(value.id, i)
                last[value.id] = i
                size[value.id] = -(-stride(value.width) * max_rows // LINE) * LINE
            for value in op.inputs:
                last[value.id] = i

    offsets: dict[int, int] = {}
    live: list[int] = []  # ids by offset
    total = 0
    for value_id in sorted(made, key=made.__getitem__):
        if value_id == external.id:
            continue
        live = [v for v in live if last[v] >= made[value_id]]
        at = 0
        for other in live:
            if offsets[other] - at >= size[value_id]:
                break
            at = offsets[other] + size[other]
        offsets[value_id] = at
        live.append(value_id)
        live.sort(key=lambda v: (offsets[v], size[v]))
        total = max(total, at + size[value_id])
    return offsets, total


def plan_arena(
    steps: Sequence[Step], max_rows: int, external: Value
) -> tuple[dict[int, int], dict[str, tuple[int, int, int]], int]:
    """As `plan_buffers`, with the places of biases, by name, behind the values.

    A place is offset, width and the floats from a row to the next: none, every row reads the same.
    """
    offsets, total = plan_buffers(steps, max_rows, external)
    places: dict[str, tuple[int, int, int]] = {}
    for op in (op for step in steps for op in step.ops if op.kind == "bias"):
        info = op.op.weights[0]
        if info.name not in places:
            places[info.name] = (total, info.row_len, 0)
            total += -(-info.row_len // LINE) * LINE
    return offsets, places, total
