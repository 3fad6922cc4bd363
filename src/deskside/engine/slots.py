"""The tokens in a slot of the cache, and how many of them a new prompt can reuse.

Keys and values can be truncated to any length. Recurrent state cannot. A sequence with recurrent
state continues from its end or from a checkpoint. A checkpoint is a copy of the recurrent state at
an earlier length; keys and values before it stay in place.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deskside.machine.system import available_memory
from deskside.tape.cache import Cache, Checkpoint
from deskside.text.prompt import common

MAX_CHECKPOINTS = 8  # a slot; one checkpoint of a 397B model takes 195 MB


class Slot:
    """One slot of a cache. `tokens`: token ids whose keys and values it holds."""

    def __init__(self, index: int, cache: Cache) -> None:
        self.index = index
        self.tokens: list[int] = []
        self._cache = cache
        self._checkpoints: list[Checkpoint] = []  # by length
        self._latest: Checkpoint | None = None  # of `save(replace=True)`

    def extend(self, tokens: Sequence[int]) -> None:
        """Note that these tokens were computed after those that it holds."""
        self.tokens.extend(tokens)

    def clear(self) -> None:
        """Forget the sequence."""
        self.tokens, self._checkpoints, self._latest = [], [], None
        self._cache.clear(self.index)

    def fail(self) -> None:
        """Note that a step failed. Only checkpoints are left to continue from."""
        self._cache.clear(self.index)
        if not self._cache.recurrent:
            self.tokens = []

    def shared(self, prompt: Sequence[int]) -> int:
        """Number of leading tokens that `prompt` shares with this slot.

        The prompt's last token never counts, because its logits are wanted.
        """
        return common(self.tokens, prompt[:-1])

    def reuse(self, prompt: Sequence[int]) -> int:
        """Truncate to the longest prefix of `prompt` that can be continued. Returns its length."""
        shared, live = self.shared(prompt), self._cache.lengths[self.index] == len(self.tokens)
        if not self._cache.recurrent:
            n = shared if live and self._cache.truncate(self.index, shared) else 0
        elif live and shared == len(self.tokens):
            n = shared
        else:
            n = self._restore(shared)
        if n == 0:
            self.clear()
        self.tokens = self.tokens[:n]
        return n

    def _restore(self, shared: int) -> int:
        """Restore the longest checkpoint within the first `shared` tokens.

        Returns its length; 0 if there is none.
        """
        self._checkpoints = [c for c in self._checkpoints if c.n <= shared]
        latest = [] if self._latest is None or self._latest.n > shared else [self._latest]
        self._latest = None
        usable = sorted([*self._checkpoints, *latest], key=lambda c: c.n)
        if not usable:
            return 0
        self._cache.restore(self.index, usable[-1])
        return usable[-1].n

    def save(self, *, replace: bool = False) -> None:
        """Keep a checkpoint of this length, if there is memory for it.

        replace: drop the last checkpoint that was saved with `replace`.
        """
        n = len(self.tokens)
        if not self._cache.recurrent or any(c.n == n for c in self._checkpoints):
            return
        if available_memory() < 4 * self._cache.recurrent_bytes:
            return
        made = self._cache.snapshot(self.index, n, start=n)
        if replace:
            self._latest = made
            return
        self._checkpoints.append(made)
        if len(self._checkpoints) > MAX_CHECKPOINTS:
            # Drop the one closest to its predecessor, which saves least. Keep the last two.
            lengths = [0, *(c.n for c in self._checkpoints)]
            gaps = np.diff(lengths)[:-2]
            del self._checkpoints[int(gaps.argmin())]
