"""`python -m graphgen` is the `graphgen` command."""

from graphgen.commands.cli import main

if __name__ == "__main__":
    main()
