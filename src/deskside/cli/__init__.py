"""The command line. Each command has its own file."""


def main() -> None:
    """Run the console script `deskside`."""
    from deskside.cli.app import main as run

    run()
