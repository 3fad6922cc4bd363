"""A model's forward pass as data: ops, values, states, batches and what they cost."""

from deskside.tape.tape import (
    Attrs,
    ConvState,
    DeltaState,
    KVState,
    Op,
    State,
    Tape,
    TapeBuilder,
    Value,
)

__all__ = [
    "Attrs",
    "ConvState",
    "DeltaState",
    "KVState",
    "Op",
    "State",
    "Tape",
    "TapeBuilder",
    "Value",
]
