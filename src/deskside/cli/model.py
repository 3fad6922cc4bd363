"""The flags that say which model: -m, -hf, -hff."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from typer import Option

from deskside.cli.flags import Given, Group, flags
from deskside.console import note, progress_bar
from deskside.errors import DesksideError

if TYPE_CHECKING:
    from deskside.convert.hub import HubModel


@dataclass(frozen=True)
class ModelFlags:
    """A file here, or a model of a hub; without any the bundled demo model."""

    model: Path | None = None
    hf_repo: str | None = None
    hf_file: str | None = None


# By the fields of ModelFlags that they set.
MODEL: dict[str, Any] = {
    "model": Option("-m", "--model", help="GGUF file; without it the bundled demo model"),
    "hf_repo": Option(
        *("-hf", "-hfr", "--hf-repo"),
        metavar="USER/REPO[:QUANT]",
        help="a model of the hub, fetched once; QUANT as in its file's name, else Q4_K_M",
    ),
    "hf_file": Option(
        "-hff", "--hf-file", metavar="NAME", help="of which file of --hf-repo, instead of QUANT"
    ),
}


def model_flags(**helps: str) -> Group:
    """helps: what a command says of a flag instead."""
    changes: dict[str, Any] = {name: {"help": text} for name, text in helps.items()}
    return flags(ModelFlags(), *MODEL, options=MODEL, **changes)


def with_source(source: Path | None, given: Given) -> Given:
    """The flags and a file that stands without one, of which only one may be there."""
    if source is None:
        return given
    if given:
        other = next(iter(given.values()))
        raise DesksideError(f"{source} and {other} are two models: give one of them")
    return {"model": source}


def model_file(given: Given) -> Path | None:
    """The file that the flags name, fetched if it must be; None without any of them."""
    model = hub_model(given)
    return fetched(model) if model is not None else given.get("model")


def hub_model(given: Given) -> HubModel | None:
    """The hub's model that -hf names, not fetched; None without the flag."""
    repo, name = given.get("hf_repo"), given.get("hf_file")
    if repo is None:
        if name is not None:
            raise DesksideError(f"-hff {name}: a file of which repo? give -hf USER/REPO as well")
        return None
    if "model" in given:
        raise DesksideError("-m and -hf are two models: give one of them")
    from deskside.convert.hub import find

    return find(repo, name, note)


def fetched(model: HubModel) -> Path:
    with progress_bar() as progress:
        return model.fetch(note, progress)
