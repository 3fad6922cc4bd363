"""Backends run a tape. `reference` defines what the ops compute; the others are fast."""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from deskside.tape.cache import Batch, Cache


class Backend(Protocol):
    """Runs a tape on a batch and advances the cache."""

    def run(
        self, batch: Batch, cache: Cache, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Logits of the rows `batch.outputs`: float32 (len(batch.outputs), n_vocab).

        They are written to `out` if it is given. At decode, a new array for a large vocabulary
        would cost hundreds of page faults per token.
        """
        ...
