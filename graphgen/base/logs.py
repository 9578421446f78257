"""What keeps a log readable and short under a flood: lines that repeat are counted. Used by the frontend's handler."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

EVERY_S = 1.0
"""At most one line of a kind in this time."""
MOST_KINDS = 256
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class RepeatedLines(logging.Filter):
    """Lets one line of a kind through each second; the next one says how many were left out. Lines are of one kind when
    they are made from one text, whatever values it is filled with."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock = clock
        self._said: OrderedDict[tuple[str, int, str], tuple[float, int]] = OrderedDict()  # when, and how many since

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.name, record.levelno, str(record.msg)[:256])
        now_s = self._clock()
        said_s, num_more = self._said.get(kind, (-EVERY_S, 0))
        if now_s - said_s < EVERY_S:
            self._said[kind] = (said_s, num_more + 1)
            return False
        if num_more:
            record.msg = f"{record.getMessage()} (and {num_more} more like it)"
            record.args = ()
        self._said[kind] = (now_s, 0)
        self._said.move_to_end(kind)
        if len(self._said) > MOST_KINDS:
            self._said.popitem(last=False)
        return True


def log_to_stderr() -> None:
    """Sets a process of ours up: its output is a file that `launch.processes` keeps short."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.addFilter(RepeatedLines())
    logging.basicConfig(level=logging.INFO, handlers=[handler])
