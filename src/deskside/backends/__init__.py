"""Executors of a tape: `reference` says what the ops mean, `cpu` runs them fast."""

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
        """Logits (len(batch.outputs), n_vocab) of the rows asked for: in `out` where it is given.

        At decode a new array for the logits of a large vocabulary would cost hundreds of page
        faults a token.
        """
        ...
