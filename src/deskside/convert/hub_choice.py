"""Which files of a repo are one model, and which model QUANT means: as llama.cpp reads names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath

from deskside.convert.hub_http import HubFile, Say, ignore
from deskside.errors import DesksideError
from deskside.files import size_text

DEFAULT_QUANTS = ("Q4_K_M", "Q8_0")  # llama.cpp's, in this order; then a repo's first model
SHOWN = 20  # models of a repo in an error
_SHARD = re.compile(r"(?P<stem>.*)-(?P<no>\d{5})-of-(?P<count>\d{5})\.gguf", re.DOTALL)
# Files beside a model that are none, by the names that llama.cpp knows them by.
_BESIDE = re.compile(r"mmproj|imatrix|(mtp|eagle3|dflash|dspark)-")
_QUANT = re.compile(
    r"(?:^|[-._])((?:UD-|smol-)?(?:I?Q\d|TQ\d|BF16|F16|F32|MXFP\d|NVFP\d)\w*)$", re.IGNORECASE
)


def _stem(name: str) -> str:
    """A model's name without folder, number of the shard and suffix."""
    base = PurePosixPath(name).name
    shard = _SHARD.fullmatch(base)
    return shard["stem"] if shard else base.removesuffix(".gguf")


def quant_of(name: str) -> str:
    """The quant that a file's name says, such as Q4_K_M or UD-IQ2_M; "" if it says none."""
    found = _QUANT.search(_stem(name))
    return found[1] if found else ""


def shards(names: Iterable[str]) -> list[list[str]]:
    """GGUF files by the model that they are shards of, both in the order of their names."""
    groups: dict[str, list[str]] = {}
    for name in sorted(names):
        shard = _SHARD.fullmatch(name)
        groups.setdefault(f"{shard['stem']}-of-{shard['count']}" if shard else name, []).append(
            name
        )
    return list(groups.values())


def shard_count(name: str) -> int:
    """How many shards a file's name says that its model has."""
    shard = _SHARD.fullmatch(name)
    return int(shard["count"]) if shard else 1


def choose(
    files: Sequence[HubFile],
    where: str,
    quant: str | None = None,
    file: str | None = None,
    say: Say = ignore,
) -> tuple[HubFile, ...]:
    """The shards of the one model that is meant, as llama.cpp means it.

    A file's name holds QUANT, in either case, before "." or "-". Where several do, the one with
    nothing else before it. Without QUANT DEFAULT_QUANTS, else the first model. where: for messages.
    """
    by_name = {f.name: f for f in files}
    groups = shards(by_name)
    models = [g for g in groups if not _BESIDE.search(PurePosixPath(g[0]).name)]
    if not models and (file is None or not groups):
        raise DesksideError(f"{where}: has no GGUF file of a model; choose a repo that has")
    if file is not None:
        found, what = _named(groups, file), file
    elif quant is not None:
        found, what = _tagged(models, quant), f"model with {quant} in its name"
    else:
        found, what = _default(models, where, say), "model"
    if not found:
        raise DesksideError(f"{where}: has no {what}; it has {_shown(models or groups, by_name)}")
    if len(found) > 1:
        raise DesksideError(
            f"{where}: several are meant: {_shown(found, by_name, names=True)}; name one with -hff"
        )
    (chosen,) = found
    count = shard_count(chosen[0])
    if len(chosen) != count:
        raise DesksideError(f"{where}: has {len(chosen)} of the {count} shards of {chosen[0]}")
    return tuple(by_name[name] for name in chosen)


def _named(groups: list[list[str]], file: str) -> list[list[str]]:
    """Models with a file of that path in the repo, else of that name in any folder."""
    wanted = file.lower()
    exact = [g for g in groups if wanted in map(str.lower, g)]
    return exact or [g for g in groups if wanted in (PurePosixPath(n).name.lower() for n in g)]


def _default(models: list[list[str]], where: str, say: Say) -> list[list[str]]:
    for tag in DEFAULT_QUANTS:
        if found := _tagged(models, tag):
            return found
    if len(models) > 1:
        say(f"{where}: has no {DEFAULT_QUANTS[0]}; taking its first model, {models[0][0]}")
    return models[:1]


def _tagged(models: list[list[str]], tag: str) -> list[list[str]]:
    found = [m for m in models if re.search(re.escape(tag) + "[.-]", m[0], re.IGNORECASE)]
    if len(found) < 2:
        return found
    ends = re.compile(rf"((?:.*[-._])?){re.escape(tag)}", re.IGNORECASE | re.DOTALL)
    leads = [(lead[1], m) for m in found if (lead := ends.fullmatch(_stem(m[0])))]
    shortest = min((lead for lead, _ in leads), key=len, default="")
    if leads and all(lead.startswith(shortest) for lead, _ in leads):
        return [m for lead, m in leads if lead == shortest]
    return found


def _shown(models: list[list[str]], files: Mapping[str, HubFile], names: bool = False) -> str:
    """Models by their quants where these tell them apart, else by their names."""
    quants = [quant_of(m[0]) for m in models]
    if names or "" in quants or len({q.lower() for q in quants}) < len(quants):
        quants = [m[0] for m in models]
    shown = [
        f"{label} ({size_text(sum(files[name].size for name in m))})"
        for label, m in zip(quants, models, strict=True)
    ]
    more = f" and {len(shown) - SHOWN} more" if len(shown) > SHOWN else ""
    return ", ".join(shown[:SHOWN]) + more
