"""The command line in this process, for what it says and how it ends."""

from __future__ import annotations

import sys

import pytest

from deskside.cli import app as cli


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
