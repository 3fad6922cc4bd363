"""A lock for the steps of a model. It also delays Ctrl-C until a step is whole."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType

from deskside.errors import DesksideError


class Turn:
    """A reentrant lock that delays Ctrl-C.

    The first Ctrl-C raises KeyboardInterrupt after the outermost block, a second one at once. This
    holds in the main thread, if SIGINT has Python's default handler; otherwise Ctrl-C is untouched.

    A process forked after this one was made gets a DesksideError: the model's threads stay behind.
    """

    def __init__(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.RLock()
        self._depth = 0
        self._defers = self._pressed = False

    def __enter__(self) -> None:
        if os.getpid() != self._pid:  # the lock may be held by a thread that is not here either
            raise DesksideError(
                "this model was loaded before a fork, and its threads stayed in the other process; "
                "load it after the fork, in each process of its own"
            )
        self._lock.acquire()
        try:
            if self._depth == 0:
                self._pressed = False
                usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
                self._defers = usual and threading.current_thread() is threading.main_thread()
                if self._defers:
                    signal.signal(signal.SIGINT, self._note)
            self._depth += 1
        except BaseException:  # Ctrl-C just before it is deferred
            self._lock.release()
            raise

    def __exit__(self, *_: object) -> None:
        try:
            self._depth -= 1
            if self._depth == 0 and self._defers:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                if self._pressed:
                    raise KeyboardInterrupt
        finally:
            self._lock.release()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._pressed:
            raise KeyboardInterrupt
        self._pressed = True
