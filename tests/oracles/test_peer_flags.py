"""The list of llama.cpp's flags that `test_arguments.py` walks, beside what llama.cpp prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.test_arguments import LISTS

from . import need

PARSER = Path(__file__).with_name("llama_args.py")
PROGRAMS = range(1, 17)  # enum llama_example


def listed() -> dict[str, int]:
    """Flags of llama.cpp in our list, and how many values follow each."""
    text = LISTS.read_text().partition("\n[llama.cpp]\n")[2].partition("\n[ik_llama.cpp]\n")[0]
    found: dict[str, int] = {}
    for line in text.splitlines():
        names = [word for word in line.split() if word.startswith("-")]
        found |= dict.fromkeys(names, len(line.split()) - len(names))
    return found


def printed(program: int) -> dict[str, int]:
    """Flags of a program's help: those of a line, then the name of a value if they take one."""
    done = subprocess.run(
        [sys.executable, str(PARSER), f"--program={program}", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, int] = {}
    for line in done.stdout.splitlines():
        if not line.startswith("-") or line.startswith("-----"):
            continue
        column = line[:40] if line[39:40] == " " else line  # what it does follows there
        names, values = [], 0
        for word in re.split(r",\s*(?=-)|\s+(?=-[\w-])", column):
            name, _, value = word.strip().rstrip(",").partition(" ")
            names.append(name)
            values = max(values, len(value.split()) if value.strip() == "START END" else 0)
            values = max(values, int(bool(value.strip())))
        found |= dict.fromkeys(filter(None, names), values)
    return found


def test_the_list_has_what_llama_cpp_prints() -> None:
    need.packages("xllamacpp")
    ours, theirs = listed(), dict[str, int]()
    for program in PROGRAMS:
        theirs |= printed(program)
    assert len(theirs) > 400
    assert ours == theirs
