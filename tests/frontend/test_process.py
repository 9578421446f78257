"""What a frontend's process does before it serves: it waits for its engines, and hears its supervisor meanwhile."""

import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from graphgen import ConfigError
from graphgen.ipc.channel import Channel
from graphgen.ipc.engine_messages import Ready
from graphgen.ipc.server_messages import AddEngine, Drain, FrontendToSupervisor, SupervisorToFrontend
from graphgen.server.frontend.process import ToldToEndError, await_engines
from graphgen.server.frontend.server import SupervisorChannel
from tests.fakes import READY
from tests.frontend.harness import Frontend, wait_until


class Ends:
    """Of the channel between a supervisor and a frontend."""

    def __init__(self, folder: Path) -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.supervisor: Channel[SupervisorToFrontend, FrontendToSupervisor] = Channel(
            self._context, folder, "frontend-0", "upper", FrontendToSupervisor
        )
        self.frontend: SupervisorChannel = Channel(self._context, folder, "frontend-0", "lower", SupervisorToFrontend)

    def close(self) -> None:
        self.supervisor.close()
        self.frontend.close()
        self._context.term()


@pytest.fixture
def ends() -> Iterator[Ends]:
    with tempfile.TemporaryDirectory(prefix="gg") as folder:
        ends = Ends(Path(folder))
        yield ends
        ends.close()


def test_who_waits_for_engines_ends_when_the_server_does(ends: Ends) -> None:
    never = threading.Event()

    def wait() -> Ready:
        never.wait()
        return READY

    ends.supervisor.send(Drain(30.0))
    with pytest.raises(ToldToEndError):
        await_engines(wait, ends.frontend, [])
    never.set()


def test_orders_that_come_while_engines_are_awaited_are_kept(ends: Ends) -> None:
    orders: list[SupervisorToFrontend] = []

    def wait() -> Ready:
        assert wait_until(lambda: bool(orders))
        return READY

    ends.supervisor.send(AddEngine(1, "tcp://a:1"))
    assert await_engines(wait, ends.frontend, orders) == READY
    assert orders == [AddEngine(1, "tcp://a:1")]


def test_what_keeps_engines_from_serving_is_raised(ends: Ends) -> None:
    def wait() -> Ready:
        raise ConfigError("it serves another model")

    with pytest.raises(ConfigError, match="another model"):
        await_engines(wait, ends.frontend, [])


class Ordered(Frontend):
    """Its supervisor has said something before it serves."""

    def _run(self) -> None:
        self.num_lost = self.server.run([Drain(0.0)])


def test_a_server_obeys_what_it_was_told_before_it_served() -> None:
    frontend = Ordered(None)
    frontend.thread.join(10)
    assert frontend.num_lost == 0
    frontend.close()
