"""Neither a frontend nor a client keeps anything of a request, a session or a question that has ended.

Both run in this process, and a thread answers in the scheduler's place, so that thousands of requests take seconds. The
same over hours, with a whole server, is `tests.soak`.
"""

import threading
from collections.abc import Callable, Iterator

import pytest

from graphgen import Client, InvalidRequestError, SamplingParams
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.engine_messages import Cancel, FinishReason, StatsRequest, Submit
from graphgen.ipc.worker_messages import Probe
from graphgen.remote.requests import RemoteRequest
from graphgen.server.frontend.requests import PublicRequest
from graphgen.server.frontend.sessions import Session
from tests.fakes import STATS
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend
from tests.live_memory import LiveMemory

PLAIN = SamplingParams(max_tokens=3, ignore_eos=True)
BLOCKS_EACH, BYTES_EACH = 0.5, 500.0
"""More for each is a leak: half an object, half a kilobyte."""
LEAKED_BYTES = 1000
COUNT = 250


class Engine:
    """Answers each request with three tokens, and each question, until the test ends."""

    def __init__(self, frontend: Frontend) -> None:
        self._scheduler = frontend.scheduler
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while not self._ends.is_set():
            match self._scheduler.receive(0.05):
                case Submit() as submit:
                    token_id = len(unpack_int32(submit.prompt_token_ids))
                    ends: tuple[FinishReason | None, ...] = (None, None, "length")
                    for reason in ends:
                        self._scheduler.send_tokens(submit.request_id, [token_id], reason)
                case StatsRequest():
                    self._scheduler.send(STATS)
                case Probe() as probe:
                    self._scheduler.send(probe)
                case Cancel() | None:
                    pass

    def end(self) -> None:
        self._ends.set()
        self._thread.join()


@pytest.fixture
def address(make_frontend: MakeFrontend) -> Iterator[str]:
    """Of a frontend with an engine behind it."""
    frontend = make_frontend()
    engine = Engine(frontend)
    yield frontend.sockets.data.address
    engine.end()


def whole(client: Client, number: int) -> None:
    client.generate([[5, 6, number % 900]], PLAIN)


def text(client: Client, number: int) -> None:
    client.generate(f"To be, or {number}", SamplingParams(max_tokens=3, stop=("never", str(number)), seed=number))


def samples(client: Client, number: int) -> None:
    list(client.stream([number % 900], SamplingParams(n=3, max_tokens=3, ignore_eos=True)))


def left(client: Client, number: int) -> None:
    with client.stream([number % 900], PLAIN) as stream:
        next(stream)


def refused(client: Client, number: int) -> None:
    with pytest.raises(InvalidRequestError):
        client.generate([[5000 + number]], PLAIN)


def asked(client: Client, number: int) -> None:
    client.stats()
    client.health()


def leak(act: Callable[[int], object]) -> LiveMemory | None:
    """What COUNT of these leave behind, if that is a leak. Looks twice: a table that grows once is none."""
    for number in range(COUNT):
        act(number)
    for _ in range(2):
        before = LiveMemory.now()
        for number in range(COUNT):
            act(number)
        grown = LiveMemory.now().since(before)
        if grown.blocks <= BLOCKS_EACH * COUNT and grown.num_bytes <= BYTES_EACH * COUNT:
            return None
    return grown


@pytest.mark.parametrize("kind", [whole, text, samples, left, refused, asked])
def test_nothing_stays_of_a_call(kind: Callable[[Client, int], None], address: str) -> None:
    with Client(address) as client:
        assert leak(lambda number: kind(client, number)) is None


def test_nothing_stays_of_a_session(address: str) -> None:
    def come_and_go(number: int) -> None:
        with Client(address) as client:
            whole(client, number)

    assert leak(come_and_go) is None


@pytest.mark.parametrize("kind", [RemoteRequest, PublicRequest, Session])
def test_a_kilobyte_that_stays_of_each_is_found(kind: type, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the client, in the frontend, and of a session, which comes and goes far more seldom."""
    kept: list[bytes] = []
    make = kind.__init__  # type: ignore[misc]  # of the class itself, not of an instance

    def make_and_keep(self: object, *arguments: object, **named: object) -> None:
        make(self, *arguments, **named)
        kept.append(bytes(LEAKED_BYTES))

    monkeypatch.setattr(kind, "__init__", make_and_keep)
    with Client(address) as first:

        def act(number: int) -> None:
            if kind is Session:
                Client(address).close()
            else:
                whole(first, number)

        assert leak(act) is not None
