"""Plans where the values of a tape live in one arena, from the span in which each is needed."""

from __future__ import annotations

from collections.abc import Sequence

from deskside.tape import Op, Value

# Buffers start on cache lines: 16 floats.
ALIGN = 16


def group_linears(ops: Sequence[Op]) -> list[list[Op]]:
    """Steps in order; linears that read the same value become one step, at the first one's place.

    They can share the rounding of their input to 8 bits and one pass of all threads. A value is
    written once, so a later linear may move ahead to any place behind its input.
    """
    steps: list[list[Op]] = []
    by_input: dict[int, list[Op]] = {}
    for op in ops:
        if op.kind == "linear":
            key = op.inputs[0].id
            if key in by_input:
                by_input[key].append(op)
                continue
            by_input[key] = [op]
            steps.append(by_input[key])
        else:
            steps.append([op])
    return steps


def plan_buffers(
    steps: Sequence[Sequence[Op]], max_rows: int, external: Value
) -> tuple[dict[int, int], int]:
    """Offsets in floats of every value but `external`, and the arena's size.

    First fit: a value takes the lowest gap that is free from the step that makes it to the last
    step that reads it.
    """
    made: dict[int, int] = {}
    last: dict[int, int] = {}
    size: dict[int, int] = {}
    for i, step in enumerate(steps):
        for op in step:
            for value in op.outputs:
                made[value.id] = last[value.id] = i
                size[value.id] = -(-value.width * max_rows // ALIGN) * ALIGN
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
        live.sort(key=offsets.__getitem__)
        total = max(total, at + size[value_id])
    return offsets, total
