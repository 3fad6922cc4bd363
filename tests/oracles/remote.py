"""An object in a process of its own, its methods called over a pipe.

Keeps a crash of a foreign library out of the test run, and two libraries with the same symbols
apart. The idle process blocks in a read.

    with Remote(Path("capi.py"), "LlamaCpp", "model.gguf", threads=2) as engine:
        engine.logits([1, 2, 3])
"""

from __future__ import annotations

import contextlib
import os
import pickle
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO


class RemoteError(RuntimeError):
    """The call failed or the process died; the text tells why, with the end of its stderr."""


class Remote:
    """Makes `class_name(*args, **kwargs)` of the Python file `source` in a new process.

    python: the interpreter of that process, this one's by default. environment: variables that are
    set there.
    """

    def __init__(
        self,
        source: Path,
        class_name: str,
        *args: Any,
        python: str | Path = sys.executable,
        environment: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> None:
        self._name = class_name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed by close()
        self._process = subprocess.Popen(
            [str(python), __file__, str(source), class_name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env={**os.environ, **(environment or {})},
            # Ctrl-C in a terminal goes to its whole process group: the caller decides what ends
            start_new_session=True,
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

    @property
    def alive(self) -> bool:
        """Whether the process still runs."""
        return self._process.poll() is None

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
        """Failed assertions and the end of what the process wrote.

        ggml lets gdb print a trace of some thousand characters after the assertion.
        """
        self._log.seek(0)
        text = self._log.read().decode(errors="replace")
        asserts = [line for line in text.splitlines() if "GGML_ASSERT" in line]
        return "\n".join([*asserts[:1], text[-2000:]])

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return lambda *args, **kwargs: self._call(method, args, kwargs)

    def close(self, patience: float = 10) -> None:
        """Ends the process; kills it where a call takes longer than `patience` seconds."""
        if self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
        try:
            self._process.wait(timeout=patience)
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
