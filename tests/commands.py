"""The command line: in a process of its own, or in this one for what it says and how it ends."""

from __future__ import annotations

import io
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

from deskside.cli import app as cli

COMMAND = [sys.executable, "-c", "from deskside.cli import main; main()"]


def deskside(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)], input=stdin, capture_output=True, timeout=120
    )


def inside(*arguments: str | Path, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    """As `deskside`, in this process: for what is said, where starting one would take longest."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["deskside", *map(str, arguments)]),
        mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
        redirect_stdout(out),
        redirect_stderr(err),
        pytest.raises(SystemExit) as ended,
    ):
        cli.main()
    code = ended.value.code
    assert isinstance(code, int)
    said = (out.getvalue().encode(), err.getvalue().encode())
    return subprocess.CompletedProcess(list(map(str, arguments)), code, *said)


def refused(*arguments: str | Path, stdin: bytes = b"", part: str) -> None:
    """One line on stderr, nothing on stdout, exit code 2."""
    done = inside(*arguments, stdin=stdin)
    lines = done.stderr.decode().strip().splitlines()
    assert done.returncode == 2, done
    assert done.stdout == b""
    assert len([line for line in lines if "error" in line]) == 1
    assert part in lines[0], lines


def command(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `deskside WORDS`."""
    before, sys.argv = sys.argv, ["deskside", *words]
    try:
        with pytest.raises(SystemExit) as left:
            cli.main()
    finally:
        sys.argv = before
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err
