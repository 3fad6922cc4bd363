"""`deskside list`: the models in the hub's cache."""

from __future__ import annotations


def list_() -> None:
    """The GGUF models that -hf or another program fetched: quant, size, and where they are."""
    from huggingface_hub import constants

    from deskside.console import err, printable
    from deskside.convert.hub import cached
    from deskside.files import size_text

    models, unfinished = cached()
    if not models and not unfinished:
        err.print(f"no GGUF model in {constants.HF_HUB_CACHE}; -hf USER/REPO fetches one")
    repo = ""
    for model in models:
        if model.repo != repo:
            repo = model.repo
            print(printable(repo))
        here, count = model.shards
        shards = "" if count == 1 else f", {count} shards"
        if here < count:
            shards = f", {here} of {count} shards"
        line = f"{model.quant or '-':<12} {size_text(model.nbytes):>9}  {model.name}{shards}"
        print(f"  {printable(line)}\n{'':<25}{printable(str(model.path))}")
    for repo, nbytes in sorted(unfinished.items()):
        err.print(
            f"{printable(repo)}: {size_text(nbytes)} of an unfinished download; "
            "the same -hf goes on with it",
            markup=False,
        )
