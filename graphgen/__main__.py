"""`python -m graphgen` is the `graphgen` command."""

from graphgen.cli import main

if __name__ == "__main__":
    main()
