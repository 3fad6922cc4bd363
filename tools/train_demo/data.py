"""Endless, resumable token streams and the row mixture for training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Share of rows per source while the learning rate is constant, and while it decays.
STABLE_MIXTURE = {"library": 0.36, "topics": 0.08, "tests": 0.02, "chat": 0.54}
DECAY_MIXTURE = {"library": 0.27, "topics": 0.07, "tests": 0.01, "chat": 0.65}


class TokenStream:
    """Documents of one source in a new random order each epoch, concatenated without end."""

    def __init__(self, path: Path, seed: int) -> None:
        with np.load(path) as arrays:
            self.ids: NDArray[np.uint16] = arrays["ids"]
            self.offsets: NDArray[np.int64] = arrays["offsets"]
        self.seed = seed
        self.epoch, self.document, self.within = 0, 0, 0
        self.order = self.shuffled()

    def shuffled(self) -> NDArray[np.int64]:
        rng = np.random.default_rng((self.seed, self.epoch))
        return rng.permutation(len(self.offsets) - 1)

    def take(self, count: int) -> NDArray[np.uint16]:
        """The next ``count`` tokens."""
        parts: list[NDArray[np.uint16]] = []
        while count:
            index = self.order[self.document]
            begin = self.offsets[index] + self.within
            part = self.ids[begin : min(begin + count, self.offsets[index + 1])]
            parts.append(part)
            count -= len(part)
            self.within += len(part)
            if begin + len(part) == self.offsets[index + 1]:
                self.advance_document()
        return np.concatenate(parts)

    def advance_document(self) -> None:
        self.document, self.within = self.document + 1, 0
        if self.document == len(self.order):
            self.epoch, self.document = self.epoch + 1, 0
            self.order = self.shuffled()

    def state(self) -> tuple[int, int, int]:
        return self.epoch, self.document, self.within

    def restore(self, state: tuple[int, int, int]) -> None:
        self.epoch, self.document, self.within = state
        self.order = self.shuffled()


class Mixture:
    """Batches whose rows are each drawn from one source; consecutive rows continue a source."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.streams = {
            name: TokenStream(folder / f"{name}.npz", seed + index)
            for index, name in enumerate(STABLE_MIXTURE)
        }
        self.rng = np.random.default_rng(seed)

    def batch(self, rows: int, length: int, shares: Mapping[str, float]) -> Tensor:
        """int64 (rows, length + 1): inputs and, shifted by one, targets."""
        names = list(shares)
        chosen = self.rng.choice(len(names), size=rows, p=list(shares.values()))
        taken = [self.streams[names[index]].take(length + 1) for index in chosen]
        return torch.from_numpy(np.stack(taken).astype(np.int64))

    def state(self) -> dict[str, Any]:
        streams = {name: stream.state() for name, stream in self.streams.items()}
        return {"streams": streams, "rng": self.rng.bit_generator.state}

    def restore(self, state: dict[str, Any]) -> None:
        for name, position in state["streams"].items():
            self.streams[name].restore(position)
        self.rng.bit_generator.state = state["rng"]
