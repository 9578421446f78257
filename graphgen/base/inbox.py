"""Calls that other threads leave for a loop, and the file descriptor that wakes it.

Owns the descriptor. Used by the frontend's loop and by the connection of a remote client: one wake-up serves all that
was left, and a step has a token for every running request.
"""

import os
from collections import deque
from collections.abc import Callable


class Inbox:
    """`put` and `wake` from any thread; `fileno`, `run` and `close` on the loop's."""

    def __init__(self) -> None:
        self._calls: deque[Callable[[], None]] = deque()
        self._event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._awake = False

    def put(self, call: Callable[[], None]) -> None:
        """Leaves a call, for the next time the loop is awake."""
        self._calls.append(call)

    def wake(self) -> None:
        if not self._awake:
            self._awake = True
            os.eventfd_write(self._event, 1)

    def fileno(self) -> int:
        """Readable after `wake`."""
        return self._event

    def run(self, readable: bool) -> None:
        """Makes the calls that were left, in order. `readable`: the descriptor is."""
        if readable:
            os.eventfd_read(self._event)
        # The flag falls before the calls are taken: a wake that comes after this line makes the descriptor readable.
        self._awake = False
        for _ in range(len(self._calls)):
            self._calls.popleft()()

    def close(self) -> None:
        os.close(self._event)
