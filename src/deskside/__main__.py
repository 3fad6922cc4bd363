"""`python -m deskside`: the command line."""

from deskside.cli import main

if __name__ == "__main__":
    main()
