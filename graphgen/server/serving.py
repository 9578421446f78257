"""A server in this process, until a signal: what is behind `graphgen serve`.

Owns its logs and what it tells its operator on standard output. Called by the command line, and by processes that a
cluster starts.
"""

import logging
import os
import sys
from collections.abc import Callable

from graphgen.base.logs import VARIABLE, log_to_stderr
from graphgen.launch.config import EngineConfig
from graphgen.server.options import ServeOptions
from graphgen.server.supervisor import ServerPlace, Supervisor

logger = logging.getLogger("graphgen.serve")


def serve_until_signal(
    config: EngineConfig, options: ServeOptions, on_ready: Callable[[ServerPlace], None] = lambda place: None
) -> int:
    """Serves until a signal: the exit code, 0 when every request got its whole output. on_ready: called when it serves,
    with where."""
    log_to_stderr("supervisor", form=options.log_format)
    os.environ[VARIABLE] = options.log_format  # for the processes that it starts
    return Supervisor(config, options, _log if options.log_format == "json" else say, on_ready).run()


def _log(text: str) -> None:
    """What an operator should see, as a line of the log for each line of it."""
    for line in text.splitlines():
        logger.info("%s", line)


def say(text: str) -> None:
    """A reader that has gone, as a closed terminal after its SIGHUP, does not end a server that drains."""
    try:
        sys.stdout.write(text + "\n")
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())  # what is left in the buffer would fail the exit
        os.close(nowhere)
