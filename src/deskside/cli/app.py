"""The list of commands, and how their failures are shown."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable
from types import FrameType
from typing import Annotated, Any, TextIO

import typer

from deskside import console
from deskside.cli import arguments, bench, doctor, files, plan, predict, quality, report, run
from deskside.cli.list import list_
from deskside.errors import DesksideError

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Runs mixture-of-experts language models on one workstation, and proves it.",
)
COMMANDS: list[Callable[..., int | None]] = [
    run.run,
    bench.bench,
    plan.plan,
    list_,
    files.synth,
    files.convert,
    files.quantize,
    quality.perplexity,
    predict.predict,
    report.compare,
    report.report,
    doctor.doctor,
]
for command in COMMANDS:
    app.command(command.__name__.rstrip("_"))(command)

# The base class of click's usage errors. Typer exports only this subclass, and some versions of
# typer bundle their own click.
USAGE_ERROR: Any = typer.BadParameter.__base__


def _version(show: bool) -> None:
    if show:
        from deskside import __version__

        typer.echo(f"deskside {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="show the version", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


_show_warning = warnings.showwarning


def _note_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if category is UserWarning:
        console.note(str(message))
    else:
        _show_warning(message, category, filename, lineno, file, line)


class Terminated(BaseException):
    """SIGTERM or SIGHUP came: what is half written goes, as after Ctrl-C. number: which of them."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # a second one must not cut the cleaning short
    raise Terminated(number)


def main() -> None:
    """Run the command line. Bad input is one line and exit code 2; Ctrl-C is exit code 130.

    SIGTERM and SIGHUP still end the process, but only after it has cleaned up.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    try:
        _main()
    except Terminated as terminated:
        signal.signal(terminated.number, signal.SIG_DFL)
        os.kill(os.getpid(), terminated.number)


def _main() -> None:
    if sys.stdout is None or sys.stderr is None:
        sys.exit(2)  # closed, so nobody could read a result or an error
    code = 0
    try:
        with warnings.catch_warnings():
            # The library warns with UserWarning, for example of options that this system lacks.
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = _note_warning
            group: Any = typer.main.get_command(app)
            words = _words(group, sys.argv[1:])
            result = group.main(args=words, prog_name="deskside", standalone_mode=False)
        code = result if isinstance(result, int) else 0
    except DesksideError as failure:
        console.error(str(failure))
        code = 2
    except USAGE_ERROR as failure:
        # Without arguments the help was shown, and the message is empty.
        if message := failure.format_message().strip():
            console.error(message)
        console.err.print("see deskside --help, or deskside COMMAND --help", style="dim")
        code = 2
    except (KeyboardInterrupt, EOFError, typer.Abort):
        console.err.print("interrupted")
        code = 130
    except OSError as failure:
        name = f"{failure.filename}: " if failure.filename else ""
        console.error(f"{name}{failure.strerror or failure}")
        code = 2
    sys.exit(code)


def _words(group: Any, given: list[str]) -> list[str]:
    """The command line for typer; one note names the flags that change nothing."""
    if not given:
        return given
    name = given[0]
    if name not in group.commands:
        # Typer would cut up -hx here as well.
        if name.startswith("-") and name.partition("=")[0] not in arguments.flags_of(group):
            raise DesksideError(f"{name}: no such flag before a command; see deskside --help")
        return given
    read = arguments.commands(group.commands)[name].read(given[1:])
    if read.unused:
        console.note(f"these change nothing here: {', '.join(read.unused)}")
    return [name, *read.words]
