"""Waiting for what other processes or threads do."""

import time
from collections.abc import Callable


def wait_until(done: Callable[[], bool], what: str, timeout_s: float) -> None:
    """Raises AssertionError when it is not done in time."""
    deadline_s = time.monotonic() + timeout_s
    while not done():
        assert time.monotonic() < deadline_s, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.05)
