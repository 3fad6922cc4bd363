"""What a slot of the cache holds, and how much of it a new prompt can use.

Keys and values can be cut back to any length. Recurrent state cannot: a sequence that has some is
continued from its end or from a checkpoint, which keeps the recurrent state of an earlier length
(the keys and values before it stay where they are).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from deskside.machine.system import available_memory
from deskside.tape.cache import Cache, Checkpoint
from deskside.text.prompt import common

MAX_CHECKPOINTS = 8  # of a slot; one of a 397B model takes 195 MB


class Slot:
    """One slot of a cache. `tokens`: those whose keys and values it holds."""

    def __init__(self, index: int, cache: Cache) -> None:
        self.index = index
        self.tokens: list[int] = []
        self._cache = cache
        self._checkpoints: list[Checkpoint] = []  # by length
        self._latest: Checkpoint | None = None  # of `save(replace=True)`

    def extend(self, tokens: Sequence[int]) -> None:
        """These were computed behind those that it holds."""
        self.tokens.extend(tokens)

    def clear(self) -> None:
        """Forget the sequence."""
        self.tokens, self._checkpoints, self._latest = [], [], None
        self._cache.clear(self.index)

    def fail(self) -> None:
        """A step broke off behind what it holds: only checkpoints are left to continue from."""
        self._cache.clear(self.index)
        if not self._cache.recurrent:
            self.tokens = []

    def shared(self, prompt: Sequence[int]) -> int:
        """Tokens that a prompt has in common with what it holds, and can use: not its last one,
        whose logits are wanted."""
        return common(self.tokens, prompt[:-1])

    def reuse(self, prompt: Sequence[int]) -> int:
        """Cut back to the longest beginning of `prompt` that can be continued; its length."""
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
        """The longest checkpoint within the first `shared` tokens; its length, 0 for none."""
        self._checkpoints = [c for c in self._checkpoints if c.n <= shared]
        latest = [] if self._latest is None or self._latest.n > shared else [self._latest]
        self._latest = None
        usable = sorted([*self._checkpoints, *latest], key=lambda c: c.n)
        if not usable:
            return 0
        self._cache.restore(self.index, usable[-1])
        return usable[-1].n

    def save(self, *, replace: bool = False) -> None:
        """Keep a checkpoint of what it holds, if there is memory for it. replace: it takes the
        place of the last one that was saved so."""
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
            # The one that is nearest to its predecessor saves least; never the last two.
            lengths = [0, *(c.n for c in self._checkpoints)]
            gaps = np.diff(lengths)[:-2]
            del self._checkpoints[int(gaps.argmin())]
