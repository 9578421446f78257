"""Each request that a server ends is one line, which says who and how much and never what."""

import logging
from pathlib import Path

import msgspec
import pytest

from graphgen.ipc.server_messages import RequestEnded
from graphgen.server.frontend.keys import Keys
from graphgen.server.request_log import RequestLog

ENDED = RequestEnded(
    request_id=7,
    key="",
    address="127.0.0.1",
    prompt_tokens=340,
    cached_tokens=128,
    output_tokens=57,
    finish=("stop", "length"),
    first_token_ms=23.14,
    total_ms=812.0,
)


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "graphgen.requests")
    return caplog


def test_a_line_has_the_figures_of_its_request(lines: pytest.LogCaptureFixture) -> None:
    RequestLog(None).write(ENDED)
    assert lines.messages == [
        "request id=7 client=- address=127.0.0.1 prompt_tokens=340 cached_tokens=128 output_tokens=57"
        " finish=stop,length first_token_ms=23.1 total_ms=812.0"
    ]


def test_a_client_is_called_as_its_key_is(lines: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    log = RequestLog(keys.folder)
    for name in ("alice", "bob"):  # the second is let in while the server runs
        _, public_key = keys.make(name)
        log.write(msgspec.structs.replace(ENDED, key=public_key))
    log.write(msgspec.structs.replace(ENDED, key="x" * 40))
    assert [message.split()[2] for message in lines.messages] == ["client=alice", "client=bob", "client=xxxxxxxx"]


def test_a_flood_of_requests_that_come_to_nothing_is_one_line_a_second(lines: pytest.LogCaptureFixture) -> None:
    log = RequestLog(None)
    for _ in range(1000):
        log.write(msgspec.structs.replace(ENDED, output_tokens=0, finish=("bad_request",)))
    assert len(lines.messages) <= 2
    for _ in range(10):
        log.write(ENDED)
    assert len(lines.messages) >= 11


def test_a_line_ends_with_the_name_that_its_client_gave_it(lines: pytest.LogCaptureFixture) -> None:
    RequestLog(None).write(msgspec.structs.replace(ENDED, log_id="trace-1"))
    assert lines.messages[0].endswith(" total_ms=812.0 request_id=trace-1")
