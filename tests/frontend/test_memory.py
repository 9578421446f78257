"""Nothing of a request stays in the frontend when it has ended, however it ended, also while nothing else happens."""

import gc
import weakref
from collections.abc import Callable, Iterator

import pytest

from graphgen.ipc.engine_messages import Cancel as SchedulerCancel
from graphgen.ipc.engine_messages import Rejected
from graphgen.ipc.ggp.messages import Bye, Cancel, Delta, Done, Error, Generate
from graphgen.requests import core
from graphgen.requests.open_request import OpenRequest
from graphgen.server.frontend import desk, reception
from graphgen.server.frontend.requests import PublicRequest
from graphgen.server.frontend.sessions import Session
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, RawClient, open_request, wait_until


@pytest.fixture(autouse=True)
def _no_collections() -> Iterator[None]:
    """A prompt may be megabytes: it does not wait for a collection either."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Made:
    """Weak references to what the frontend makes of each request and session."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._references: list[weakref.ref[object]] = []
        for module, kind in ((desk, PublicRequest), (core, OpenRequest), (reception, Session)):
            monkeypatch.setattr(module, kind.__name__, self._recorded(kind))

    def _recorded(self, kind: type) -> Callable[..., object]:
        def make(*args: object, **kwargs: object) -> object:
            made = kind(*args, **kwargs)
            self._references.append(weakref.ref(made))
            return made

        return make

    def kept(self) -> list[str]:
        return [type(one).__name__ for reference in self._references if (one := reference()) is not None]


def end_with_tokens(frontend: Frontend, client: RawClient) -> None:
    frontend.scheduler.send_tokens(open_request(frontend, client), [1], "stop")
    client.expect(Delta)
    client.expect(Done)


def cancel_it(frontend: Frontend, client: RawClient) -> None:
    open_request(frontend, client)
    client.send(Cancel(id=1))
    frontend.scheduler.expect(SchedulerCancel)
    client.expect(Delta)
    client.expect(Done)


def be_rejected(frontend: Frontend, client: RawClient) -> None:
    request_id = open_request(frontend, client)
    frontend.scheduler.send(Rejected(request_id, "DeadlineError", "too late"))
    client.expect(Error)


def be_invalid(frontend: Frontend, client: RawClient) -> None:
    client.send(Generate(id=1, prompt_ids=[]))
    client.expect(Error)


def end_its_session(frontend: Frontend, client: RawClient) -> None:
    open_request(frontend, client)
    client.send(Bye())
    frontend.scheduler.expect(SchedulerCancel)


@pytest.mark.parametrize("end", [end_with_tokens, cancel_it, be_rejected, be_invalid, end_its_session])
def test_ended_requests_are_not_kept_in_an_idle_frontend(
    make_frontend: MakeFrontend, monkeypatch: pytest.MonkeyPatch, end: Callable[[Frontend, RawClient], None]
) -> None:
    made = Made(monkeypatch)
    frontend = make_frontend()
    for _ in range(3):
        end(frontend, frontend.welcome())
    allowed = [] if end is end_its_session else ["Session"] * 3
    assert wait_until(lambda: made.kept() == allowed), f"{made.kept()} are kept"
    its_desk = frontend.server._desk
    assert (its_desk.num_open, its_desk.num_held, its_desk._shares.num_open) == (0, 0, 0)
    assert not its_desk._unstarted
    assert not its_desk._shares._prompt_tokens
