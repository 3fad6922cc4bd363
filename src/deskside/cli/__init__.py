"""The command line: a file a command."""


def main() -> None:
    """The console script."""
    from deskside.cli.app import main as run

    run()
