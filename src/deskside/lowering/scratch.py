"""Memory that sections take on a device of torch while they run. Does not import torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from deskside.lowering.buffers import LINE
from deskside.lowering.sections import Section, last_uses
from deskside.tape import Op, Value

PIECE = 8 << 20  # bytes of decoded weights, or of attention scores, at a time
FEW_PAIRS = 64  # pairs of token and expert up to which the experts' rows are gathered, not sorted
MAX_OUTPUTS = 64  # tokens of a step whose logits an engine asks for at once
ONE_BY_ONE = frozenset({"expert_offload", "expert_offload_pairs", "expert_pairs"})
BORDER = 256  # bytes: an expert's matrix in a slot starts on such a border


def work_bytes(sections: Sequence[Section], device: str, rows: int, outputs: int) -> int:
    """What a step of `rows` tokens takes on a device beside weights and states, from above: the
    values that are alive together, and what the largest op needs for itself (`_scratch`).

    outputs: most tokens of a step whose logits are wanted.
    """
    own = [s for s in sections if s.device == device]
    last = {v: op for (name, v), op in last_uses(sections).items() if name == device}
    live: dict[int, int] = {}  # bytes by value
    peak = 0

    def nbytes(values: Iterable[Value]) -> dict[int, int]:
        return {v.id: _bytes(v, rows, outputs) + 4 * LINE for v in values}

    for section in own:
        live |= nbytes(section.imports)
        for op in section.ops:
            live |= nbytes(op.outputs)
            peak = max(peak, sum(live.values()) + _scratch(op, rows, outputs))
            for v in (*op.inputs, *op.outputs):
                if last[v.id] is op and v not in section.exports:
                    live.pop(v.id, None)
        sent = nbytes(section.exports)
        peak = max(peak, sum(live.values()) + 2 * sum(sent.values()))
        for v in section.exports:
            if any(last[v.id] is op for op in section.ops):
                del live[v.id]
    return peak


def expert_bytes(op: Op) -> int:
    """Of one expert in a slot, where each of its matrices starts on a border."""
    return sum(-(-w.shape[1] * w.row_bytes // BORDER) * BORDER for w in op.weights)


def table_bytes(experts: Sequence[int]) -> int:
    """Of a device's table of the experts that it holds: int32 (layers, experts).

    experts: how many each layer has.
    """
    return 4 * len(experts) * max(experts)


def _bytes(value: Value, rows: int, outputs: int) -> int:
    return 4 * (outputs if value.per_output else rows) * value.width


def _scratch(op: Op, rows: int, outputs: int) -> int:
    """Temporaries of an op, from above. Decoding a weight takes up to 24 bytes beside its float."""
    # products are written where they stay
    values = op.inputs if op.kind == "linear" else (*op.inputs, *op.outputs)
    scratch = 6 * sum(_bytes(v, rows, outputs) for v in values) + (1 << 16)
    routed = op.kind.startswith("expert") and bool(op.weights)
    if op.kind == "linear" or routed:
        largest = max(4 * w.row_len * w.n_rows for w in op.weights)
        # A piece is at least one row, of every gathered pair.
        min_piece = max(4 * w.row_len * FEW_PAIRS for w in op.weights)
        scratch += 7 * min(max(PIECE, min_piece), max(largest, min_piece))
    if routed:
        pairs = rows * op.inputs[1].width
        widest = max(w.row_len + w.shape[1] for w in op.weights)
        # Offloaded experts are computed one by one, of many pairs, and all tokens may choose one.
        if op.kind in ONE_BY_ONE:
            scratch += 64 * pairs + 32 * widest * max(rows, min(pairs, FEW_PAIRS))
        else:
            scratch += 16 * pairs * widest
    if op.kind == "attention":
        scratch += 4 * PIECE
    return scratch
