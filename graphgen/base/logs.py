"""How every process logs: as text or as JSON, one line each, and short under a flood: lines that repeat are counted.

Owns both forms, and the variable by which a process tells its children which one is wanted.
"""

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

LogFormat = Literal["text", "json"]

VARIABLE = "GRAPHGEN_LOG_FORMAT"
FIELDS = "graphgen_fields"
"""Of a record: what JSON has beside the message, by `extra`."""

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


class JsonFormatter(logging.Formatter):
    """One JSON object a line: when, how grave, who says it, the message, and the fields that a record has."""

    def __init__(self, process: str) -> None:
        super().__init__()
        self._process = process

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, Any] = {  # as JSON has them
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "process": self._process,
            "pid": record.process,
            "message": record.getMessage(),
            **getattr(record, FIELDS, {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return msgspec.json.encode(line).decode()


def log_format() -> LogFormat:
    """As the process that started this one chose it."""
    return "json" if os.environ.get(VARIABLE) == "json" else "text"


def log_to_stderr(
    process: str, level: int = logging.INFO, drops_repeats: bool = False, form: LogFormat | None = None
) -> None:
    """Sets a process of ours up: the output of a child is a file that `launch.processes` keeps short.

    process: what it is called. drops_repeats: of lines of one kind all but one a second. form: None is that of the
    process that started this one.
    """
    handler = logging.StreamHandler()
    is_json = (form or log_format()) == "json"
    handler.setFormatter(JsonFormatter(process) if is_json else logging.Formatter(FORMAT))
    if drops_repeats:
        handler.addFilter(RepeatedLines())
    logging.basicConfig(level=level, handlers=[handler])
