"""`deskside predict`: its flags."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from deskside.cli.flags import ENGINE, Isa, Threads, Ubatch
from deskside.errors import DesksideError


def predict(
    preset: Annotated[str, Argument(help="such as qwen3.5-397b-a17b")],
    layers: Annotated[
        str, Option("--layers", help="layers of the slices: auto, or such as 4,8,12")
    ] = "auto",
    experts: Annotated[
        int | None, Option("--experts", help="fewer experts a layer", show_default="as fit")
    ] = None,
    check: Annotated[
        int | None,
        Option("--check", metavar="LAYERS", help="predict and measure one more slice"),
    ] = None,
    depths: Annotated[
        str, Option("--depths", help="context depths at which to time decoding, such as 512,4096")
    ] = "512",
    generate: Annotated[int, Option("--generate", help="tokens to decode per sample")] = 32,
    repeats: Annotated[int, Option("--repeats", help="rounds of measurement")] = 5,
    keep: Annotated[
        bool, Option("--keep/--no-keep", help="keep the slices in the cache folder")
    ] = True,
    threads: Threads = ENGINE.threads,
    ubatch: Ubatch = ENGINE.ubatch,
    kv: Annotated[str, Option("--kv", help="type of the cache: f16, q8_0, f32")] = ENGINE.ctk,
    isa: Isa = ENGINE.isa,
    out: Annotated[Path | None, Option("--out", help="write the result as JSON here")] = None,
) -> None:
    """Predict the speed of a large model on this machine from slices, before its download."""
    from deskside.bench.predict.measure import PredictOptions, predict
    from deskside.bench.predict.table import show
    from deskside.console import note, progress_bar

    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        raise DesksideError(f"--out {out}: expected a file in a folder that exists")
    wanted = "auto" if layers == "auto" else _numbers("--layers", layers)
    options = PredictOptions(
        depths=_numbers("--depths", depths),
        generate=generate,
        repeats=repeats,
        threads=threads,
        kv=kv,
        ubatch=ubatch,
        isa=isa,
    )
    with progress_bar() as progress:
        result = predict(
            preset,
            wanted,
            experts=experts,
            check=check,
            options=options,
            keep=keep,
            say=note,
            progress=progress,
        )
    show(result)
    if out is not None:
        result.save(out)


def _numbers(flag: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise DesksideError(f"{flag} {text}: expected numbers such as 4,8,12") from None
