"""An object in a process of its own, its methods called over a pipe.

Keeps a crash of a foreign library out of the test run, and two libraries with the same symbols
apart. The idle process blocks in a read.

    with Remote(Path("capi.py"), "LlamaCpp", "model.gguf", threads=2) as engine:
        engine.logits([1, 2, 3])
"""

from __future__ import annotations

import os
import pickle
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, BinaryIO


class RemoteError(RuntimeError):
    """The call failed or the process died; the text tells why, with the end of its stderr."""


class Remote:
    """Makes `class_name(*args, **kwargs)` of the Python file `source` in a new process."""

    def __init__(self, source: Path, class_name: str, *args: Any, **kwargs: Any) -> None:
        self._name = class_name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(source), class_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        try:
            self._call("", args, kwargs)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """The process."""
        return self._process.pid

    def _call(self, method: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            pickle.dump((method, args, kwargs), self._process.stdin)
            self._process.stdin.flush()
            ok, value = pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError, pickle.UnpicklingError):
            code = self._process.wait()
            raise RemoteError(f"{self._name} died with code {code}\n{self._tail()}") from None
        if not ok:
            raise RemoteError(f"{self._name}: {value}\n{self._tail()}")
        return value

    def _tail(self) -> str:
        end = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, end - 2000))
        return self._log.read().decode(errors="replace")

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kwargs: self._call(method, args, kwargs)

    def close(self) -> None:
        """Ends the process."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()
        self._log.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(source: str, class_name: str, requests: BinaryIO, replies: BinaryIO) -> None:
    target: Any = None
    while True:
        try:
            method, args, kwargs = pickle.load(requests)
        except EOFError:
            return
        try:
            if method:
                reply = (True, getattr(target, method)(*args, **kwargs))
            else:
                target = runpy.run_path(source, run_name="remote")[class_name](*args, **kwargs)
                reply = (True, None)
        except Exception as error:  # the caller decides what a failure means
            reply = (False, f"{type(error).__name__}: {error}")
        pickle.dump(reply, replies)
        replies.flush()


if __name__ == "__main__":
    # libraries print to descriptor 1: the replies keep a copy of it, and it becomes stderr
    channel = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _serve(sys.argv[1], sys.argv[2], sys.stdin.buffer, channel)
