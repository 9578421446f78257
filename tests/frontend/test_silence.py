"""Who is silent is cut off; who only was not heard, because the loop itself stood still, is not."""

import time

import pytest

from graphgen.ipc.ggp.messages import Delta, Error, Ping, Pong
from graphgen.server.frontend import reception
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, open_request

SLOW_S = 0.6


def stop_loop(frontend: Frontend, seconds: float) -> None:
    """As a debugger, a laptop's lid or a busy host does; returns when it goes on."""
    ended: list[bool] = []

    def stand_still() -> None:
        time.sleep(seconds)
        ended.append(True)

    frontend._inbox.put(stand_still)
    frontend._inbox.wake()
    deadline_s = time.monotonic() + seconds + 5
    while not ended:
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


def test_a_stop_of_the_loop_is_no_silence_of_its_clients(
    make_frontend: MakeFrontend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reception, "AWAY_S", 0.2)
    frontend = make_frontend(slow_consumer_s=SLOW_S, heartbeat_s=5.0)
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    stop_loop(frontend, 1.5 * SLOW_S)
    client.send(Ping())  # the first chance to say something
    assert isinstance(client.receive(), Pong)
    frontend.scheduler.send_tokens(request_id, [5], "length")
    assert client.expect(Delta).ids == [5]


def test_a_client_that_says_nothing_is_cut_off(make_frontend: MakeFrontend) -> None:
    frontend = make_frontend(slow_consumer_s=SLOW_S, heartbeat_s=5.0)
    client = frontend.welcome()
    open_request(frontend, client)
    opened_s = time.monotonic()
    error = client.expect(Error)
    assert (error.code, error.id) == ("slow_consumer", 1)
    assert time.monotonic() - opened_s > SLOW_S - 0.1
