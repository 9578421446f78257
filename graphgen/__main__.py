"""`python -m graphgen` is the `graphgen` command, which comes with the engine."""

import sys

from graphgen.base.version import ENGINE_IS_MISSING

if __name__ == "__main__":
    try:
        from graphgen.commands.cli import main
    except ModuleNotFoundError as error:
        if error.name != "graphgen.commands":
            raise
        sys.exit(f"graphgen: the command {ENGINE_IS_MISSING}")
    main()
