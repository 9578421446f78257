"""A flood of one event writes a line a second, and says how many it left out."""

import json
import logging
import sys
from datetime import datetime

import pytest

from graphgen.base.logs import FIELDS, MOST_KINDS, JsonFormatter, RepeatedLines


def said(filter_: RepeatedLines, text: str, *args: object, name: str = "graphgen") -> str | None:
    record = logging.LogRecord(name, logging.INFO, "", 0, text, args, None)
    return record.getMessage() if filter_.filter(record) else None


def test_a_line_of_a_kind_comes_once_a_second_with_the_number_of_those_left_out() -> None:
    now_s = [0.0]
    lines = RepeatedLines(lambda: now_s[0])
    written = []
    for number in range(4000):
        written.append(said(lines, "session with %r; there are %d", "me%", number))
        now_s[0] += 0.00075
    assert [line for line in written if line is not None] == [
        "session with 'me%'; there are 0",
        "session with 'me%'; there are 1334 (and 1333 more like it)",
        "session with 'me%'; there are 2668 (and 1333 more like it)",
    ]


def test_other_lines_pass_meanwhile_and_kinds_are_not_kept_without_end() -> None:
    lines = RepeatedLines(lambda: 0.0)
    assert said(lines, "one") == "one"
    assert said(lines, "two") == "two"
    assert said(lines, "one", name="other") == "one"
    assert said(lines, "one") is None
    for number in range(10 * MOST_KINDS):
        said(lines, f"kind {number}")
    assert len(lines._said) == MOST_KINDS


def test_a_line_of_json_has_all_that_a_record_has() -> None:
    """On one line, whatever is in it."""
    try:
        raise ValueError("two\nlines")
    except ValueError:
        raised = sys.exc_info()
    record = logging.LogRecord("graphgen.x", logging.ERROR, __file__, 1, 'a "%s"\n', ("b",), raised)
    setattr(record, FIELDS, {"request_id": "r"})
    text = JsonFormatter("gateway").format(record)
    line = json.loads(text)
    assert "\n" not in text
    assert {name: line[name] for name in ("level", "logger", "process", "message", "request_id")} == {
        "level": "ERROR",
        "logger": "graphgen.x",
        "process": "gateway",
        "message": 'a "b"\n',
        "request_id": "r",
    }
    assert datetime.fromisoformat(line["time"]).timestamp() == pytest.approx(record.created, abs=0.001)
    assert "ValueError: two\nlines" in line["exception"]
