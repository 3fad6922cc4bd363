"""A command line as llama.cpp reads one, before typer does: every flag is one whole word.

Typer cuts a word such as -rtr into -r and its value "tr". Here a flag is the command's own, one of
the peers' (`peers.py`), or an error that names it. A flag that takes a value takes the next word,
whatever that looks like.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, fields
from typing import Any

from deskside.cli.flags import OPTIONS, spelled
from deskside.cli.peers import PEERS, TRANSLATED, Peer
from deskside.engine.config import EngineConfig
from deskside.engine.sampler import SamplingParams
from deskside.errors import DesksideError

# Commands that run, measure or plan a model: settings of another of these change nothing in one.
MODELS = ("run", "bench", "plan", "perplexity", "predict")
# What is asked of a model, rather than how it is run: a command that lacks one refuses it.
ASKED = ("max_tokens", "stop")

# How many words follow each flag of a command, by name.
Flags = Mapping[str, int]


@dataclass
class Words:
    """words: for typer, with flags of the command alone. unused: flags that change nothing."""

    words: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Command:
    """What a command line may hold. flags: the command's own.

    settings: flags of other commands, which change nothing in this one.
    others: flags of other commands, which make no sense in this one.
    """

    name: str
    flags: Flags
    settings: Flags = field(default_factory=dict)
    others: Set[str] = frozenset()

    def read(self, arguments: Sequence[str]) -> Words:
        """DesksideError names a flag that is unknown, or that would have to change something."""
        found, at = Words(), 0
        while at < len(arguments):
            word = arguments[at]
            at += 1
            if word == "--":
                found.words += arguments[at - 1 :]
                break
            if word == "-" or not word.startswith("-"):
                found.words.append(word)
                continue
            name, joined = self._split(word)
            rest = arguments[at:] if joined is None else [joined]
            at += self._flag(name, rest, joined is not None, found)
        found.unused = list(dict.fromkeys(found.unused))
        return found

    def _split(self, word: str) -> tuple[str, str | None]:
        """A flag's name, in llama.cpp's spelling, and the value that "=" joins to it."""
        name, equals, value = word.partition("=")
        if name.startswith("--"):
            name = name.replace("_", "-")
        return name, value if equals else None

    def _flag(self, name: str, rest: Sequence[str], joined: bool, found: Words) -> int:
        """Reads a flag, the first of `rest` its value; returns how many words it took of them, 0 if
        the value was joined to it."""
        peer = self._peer(name)
        if peer is None:
            raise DesksideError(self._unknown(name, rest if joined else ()))
        taken = peer.values
        if peer.words and rest and rest[0].lower() in peer.words:
            taken = 1
        if joined and taken != 1:
            raise DesksideError(f"{name}={rest[0]}: {name} takes no such value")
        if len(rest) < taken:
            raise DesksideError(f"{name}: a value is missing behind it")
        value = rest[0] if taken else ""
        translated = TRANSLATED[name](value) if name in TRANSLATED else None
        meant = [word for word in translated or () if word.startswith("-")]
        if translated is not None and all(word in self.flags for word in meant):
            found.words += translated
            if not meant:
                found.unused.append(name)
        elif meant and all(word in self.settings for word in meant):
            found.unused.append(name)
        elif name in self.flags:
            found.words += [name, *rest[:taken]]
        elif peer.refusal and not peer.is_off(value):
            raise DesksideError(f"{name}: {peer.refusal}")
        else:
            found.unused.append(name)
        return 0 if joined else taken

    def _peer(self, name: str) -> Peer | None:
        """What is known of a flag; the command's own come first."""
        if name in self.flags:
            return Peer(self.flags[name])
        if name in self.settings:
            return Peer(self.settings[name])
        return None if name in self.others else PEERS.get(name)

    def _unknown(self, name: str, joined: Sequence[str]) -> str:
        command = f"deskside {self.name}"
        if name in self.others:
            return f"{name} has no meaning in {command}"
        text = "".join([name, *(f"={value}" for value in joined)])
        if not name.startswith("--") and self.flags.get(name[:2]) and name[2:3].isdigit():
            return f"{text}: a value stands apart: {name[:2]} {name[2:]}"
        near = difflib.get_close_matches(name, [*self.flags], 1)
        hint = f"; did you mean {near[0]}?" if near else f"; see {command} --help"
        return f"{text}: {command} has no such flag{hint}"


def commands(built: Mapping[str, Any]) -> dict[str, Command]:
    """What the command line of each command may hold, from typer's commands by name."""
    flags = {name: flags_of(command) for name, command in built.items()}
    everything: dict[str, int] = {}
    for name in (*MODELS, *flags):
        everything = {**flags[name], **everything}
    settings = {
        name
        for setting in (*fields(EngineConfig), *fields(SamplingParams))
        if setting.name not in ASKED
        for name in spelled(OPTIONS[setting.name])
    }
    found = {}
    for name, own in flags.items():
        known = settings if name in MODELS else set()
        if name == "plan":
            known = known | set(flags["run"])
        unused = {flag: everything[flag] for flag in sorted(known - set(own))}
        others = set(everything) - set(own) - set(unused) - set(PEERS)
        found[name] = Command(name, own, unused, others)
    return found


def flags_of(command: Any) -> Flags:
    """The flags of a command of typer's, or of typer's group."""
    found = {"-h": 0, "--help": 0}
    for option in command.params:
        if option.param_type_name == "option":
            values = 0 if option.is_flag or option.count else option.nargs
            found |= dict.fromkeys((*option.opts, *option.secondary_opts), values)
    return found
