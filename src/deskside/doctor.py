"""`deskside doctor`: its flags."""

from __future__ import annotations

from typing import Annotated

from typer import Option

from deskside.cli_flags import Threads
from deskside.console import note
from deskside.engine.config import EngineConfig


def doctor(
    threads: Threads = 0,
    quick: Annotated[
        bool, Option("--quick", help="one and all threads, transparent huge pages alone")
    ] = False,
    no_store: Annotated[
        bool, Option("--no-store", help="do not keep the figures for `deskside plan`")
    ] = False,
    json_: Annotated[bool, Option("--json", help="figures for other programs")] = False,
) -> None:
    """Show what this machine has and measure what limits it; keep that for `deskside plan`."""
    n_threads = EngineConfig(threads=threads).n_threads
    if threads > n_threads:
        note(f"-t {threads} is more than the usable cores; measuring with {n_threads}")
    from deskside.bench import doctor as check

    check.main(n_threads, quick=quick, keep=not no_store, as_json=json_)
