"""The flags that say which model: -m, -hf, -hff."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from deskside.cli.flags import MODEL, Given, flags
from deskside.console import note, progress_bar
from deskside.errors import DesksideError

if TYPE_CHECKING:
    from deskside.convert.hub import HubModel

FLAGS = flags(MODEL, "model", "hf_repo", "hf_file")


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
