"""What a call does in a fork of the process that makes it."""

import os
import signal
from collections.abc import Callable

PATIENCE_S = 10
"""A call that takes longer hangs: the fork is killed."""


def outcome_in_a_fork(call: Callable[[], object]) -> str:
    """Forks, calls, and returns the name of the exception with its message, or the value's repr."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(PATIENCE_S)
        os.close(reader)
        try:
            said = repr(call())
        except BaseException as error:  # whatever it is, it is the outcome
            said = f"{type(error).__name__}: {error}"
        os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    return data.decode() if data else f"hung, and ended with status {status}"
