"""The Python client: what it does when the server is another, is silent, or says what it should not."""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import msgspec
import pytest
import zmq

from graphgen import (
    Chat,
    Client,
    ConfigError,
    ConnectionLostError,
    EngineClosedError,
    InvalidRequestError,
    PromptTooLongError,
    SamplingParams,
    ServerError,
)
from graphgen.calls.outputs import Delivery, StreamPiece
from graphgen.ipc.ggp.framing import make_error, server_framing
from graphgen.ipc.ggp.messages import (
    Accepted,
    Bye,
    Cancel,
    ChatMessage,
    ClientMessage,
    Delta,
    Deltas,
    Done,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Notice,
    Ping,
    Pong,
    ServerMessage,
    Timing,
    Usage,
    Welcome,
)
from graphgen.remote import connection
from graphgen.remote.frame_limit import refusal
from tests.fakes import WELCOME
from tests.forks import outcome_in_a_fork


class FakeServer:
    """A server whose every word a test chooses."""

    def __init__(self, address: str = "tcp://127.0.0.1:*") -> None:
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set(zmq.LINGER, 0)
        self._socket.bind(address)
        self.address = self._socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        self._framing = server_framing()
        self._peer = b""

    def expect(self, kind: type[ClientMessage], timeout_s: float = 5.0) -> ClientMessage:
        message = self.receive(timeout_s)
        assert isinstance(message, kind), f"expected {kind.__name__}, got {message}"
        return message

    def receive(self, timeout_s: float) -> ClientMessage | None:
        if not self._socket.poll(int(timeout_s * 1000)):
            return None
        self._peer, *frames = self._socket.recv_multipart()
        return self._framing.decode(frames)

    def expect_generate(self) -> Generate:
        message = self.expect(Generate)
        assert isinstance(message, Generate)
        return message

    def send(self, *messages: ServerMessage) -> None:
        for message in messages:
            self._socket.send_multipart([self._peer, *self._framing.encode(message)])

    def finish(self, request_id: int) -> None:
        self.send(
            Accepted(id=request_id, prompt_tokens=1),
            Delta(id=request_id, ids=[5], text="x", finish="length"),
            Done(
                id=request_id,
                finish=["length"],
                usage=Usage(prompt_tokens=1, output_tokens=1),
                timing=Timing(queued_ms=0, first_token_ms=0, total_ms=0),
            ),
        )

    def close(self) -> None:
        self._context.destroy(linger=0)


@pytest.fixture
def server() -> Iterator[FakeServer]:
    server = FakeServer()
    yield server
    server.close()


@pytest.fixture
def client(server: FakeServer) -> Iterator[Client]:
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(Client, server.address)
        server.expect(Hello)
        server.send(WELCOME)
        client = made.result(5)
    yield client
    client.close()


def test_a_client_asks_for_notices_and_logs_them(server: FakeServer, caplog: pytest.LogCaptureFixture) -> None:
    with ThreadPoolExecutor(1) as pool, caplog.at_level(logging.INFO, logger="graphgen"):
        made = pool.submit(Client, server.address)
        hello = server.expect(Hello)
        assert isinstance(hello, Hello)
        assert hello.notices
        assert hello.batches
        server.send(WELCOME)
        with made.result(5) as client:
            server.send(Notice(text="the engine serves again"))
            answer = pool.submit(client.health)
            server.expect(HealthRequest)
            server.send(Health(status="ok", ready=True, worker_ms=1.0))
            assert answer.result(5).ready
    assert f"{server.address}: the engine serves again" in caplog.messages


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:1", "ipc:///tmp/no-server-is-here"])
@pytest.mark.parametrize("timeout_s", [0.3, 10.0])
def test_a_client_of_nothing_says_so_at_once(address: str, timeout_s: float) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ConnectionLostError, match=f"nothing listens at {address}: start a server"):
        Client(address, connect_timeout_s=timeout_s)
    assert time.monotonic() - begun_s < 3  # the machine may be busy; on a quiet one it is half a second


def test_an_empty_address_is_not_taken_for_the_default() -> None:
    """It is what a program gets of a variable that is not set."""
    with pytest.raises(ConfigError, match="'' is no address"):
        Client("")


def test_a_server_that_begins_to_listen_in_time_is_found(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path / 'late'}"
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(Client, address)
        time.sleep(0.2)
        server = FakeServer(address)
        server.expect(Hello)
        server.send(WELCOME)
        made.result(5).close()
        server.close()


def test_a_server_that_listens_and_is_silent_is_given_up_in_time(server: FakeServer) -> None:
    begun_s = time.monotonic()
    with pytest.raises(ConnectionLostError, match=r"did not answer for 0\.3 s"):
        Client(server.address, connect_timeout_s=0.3)
    assert time.monotonic() - begun_s < 3


def test_a_client_says_whom_it_talks_to(server: FakeServer, client: Client) -> None:
    assert repr(client) == f"<Client of fake at {server.address}, fake>"


def test_pings_are_answered_while_nobody_reads(server: FakeServer, client: Client) -> None:
    with client.stream([1]):
        server.expect(Generate)
        server.send(Ping(t=6, instance="i"))
        pong = server.expect(Pong)
    assert isinstance(pong, Pong)
    assert pong.t == 6


def test_a_fork_gets_an_error_at_once_and_leaves_the_connection_alone(server: FakeServer, client: Client) -> None:
    stream = client.stream([1])
    request = server.expect_generate()
    calls: tuple[Callable[[], object], ...] = (
        lambda: client.generate([1]),
        lambda: client.stream([1]),
        lambda: next(stream),
        client.stats,
        client.health,
    )
    for call in calls:
        said = outcome_in_a_fork(call)
        assert said.startswith(f"EngineDeadError: the client was made in process {os.getpid()}"), said
    for close in (stream.close, client.close):
        assert outcome_in_a_fork(close) == "None"
    server.finish(request.id)
    assert [piece.text for piece in stream] == ["x"], "the parent's stream went on"


def test_no_more_requests_are_open_than_the_server_allows(server: FakeServer, client: Client) -> None:
    streams = [client.stream([number]) for number in (1, 2, 3)]
    first = server.expect_generate()
    server.expect_generate()
    assert server.receive(0.1) is None
    server.finish(first.id)
    server.expect_generate()
    assert next(streams[0]).text == "x"


def test_what_no_session_had_is_sent_again_and_what_one_had_is_lost(server: FakeServer, client: Client) -> None:
    accepted, refused = client.stream([1]), client.stream([2])
    server.send(Accepted(id=server.expect_generate().id, prompt_tokens=1))
    second = server.expect_generate()
    no_session = make_error("no_session", "say hello", second.id)
    server.send(no_session)
    server.expect(Hello)
    server.send(no_session)  # of the old session, as the welcome has not come
    assert server.receive(0.1) is None
    server.send(WELCOME)
    assert server.expect_generate() == second
    server.finish(second.id)
    assert [piece.token_ids for piece in refused] == [(5,)]
    with pytest.raises(ConnectionLostError, match="lost the session"):
        next(accepted)
    assert server.receive(0.1) is None


def limited(**limits: int) -> Welcome:
    return msgspec.structs.replace(WELCOME, limits=msgspec.structs.replace(WELCOME.limits, **limits))


def test_a_hello_that_got_lost_is_repeated_however_often_the_server_knows_no_session(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HELLO_AGAIN_S", 0.2)
    stream = client.stream([1])
    request = server.expect_generate()
    server.send(make_error("no_session", "say hello", request.id))
    server.expect(Hello)  # whose welcome goes with the connection
    server.send(make_error("no_session", "say hello", request.id))
    server.expect(Hello)
    server.send(WELCOME)
    server.finish(server.expect_generate().id)
    assert [piece.text for piece in stream] == ["x"]


def test_a_server_that_gives_no_session_is_given_up(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "HELLO_AGAIN_S", 0.2)
    monkeypatch.setattr(connection, "LOST_S", 1.2)
    stream = client.stream([1])
    no_session = make_error("no_session", "say hello", server.expect_generate().id)
    ended = threading.Event()

    def refuse_all() -> None:
        while not ended.is_set():
            server.send(no_session)
            server.receive(0.1)

    with ThreadPoolExecutor(1) as pool:
        refusing = pool.submit(refuse_all)
        try:
            with pytest.raises(ConnectionLostError, match="gives no session for"):
                next(stream)
        finally:
            ended.set()
        refusing.result(5)


def test_a_server_that_gave_no_session_for_long_is_asked_again_by_whoever_comes(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has the time that the first had."""
    monkeypatch.setattr(connection, "HELLO_AGAIN_S", 0.2)
    monkeypatch.setattr(connection, "LOST_S", 1.2)
    with ThreadPoolExecutor(1) as pool:
        given_up = pool.submit(client.health)
        server.expect(HealthRequest)
        server.send(make_error("no_session", "say hello"))
        with pytest.raises(ConnectionLostError, match="gives no session"):
            given_up.result(5)
        while server.receive(0.7) is not None:
            pass
        asked = pool.submit(client.health)
        server.expect(Hello)
        server.send(WELCOME)
        server.expect(HealthRequest)
        server.send(Health(status="ok", ready=True, worker_ms=1.0))
        assert asked.result(5).ready


def test_questions_of_a_lost_session_are_asked_in_the_next(server: FakeServer, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(client.health)
        server.expect(HealthRequest)
        server.send(make_error("no_session", "say hello"))
        server.expect(Hello)
        server.send(WELCOME)
        server.expect(HealthRequest)
        server.send(Health(status="ok", ready=True, worker_ms=1.0))
        assert asked.result(5).ready


@pytest.mark.parametrize(
    ("prompt", "error", "match"),
    [
        ("x" * (1 << 20), PromptTooLongError, "1048576 bytes of text, the limit is 1000"),
        ([5] * (1 << 18), PromptTooLongError, "262144 tokens, the context of prompt and output 100"),
        (Chat([{"role": "user", "content": "x" * (1 << 20)}]), PromptTooLongError, "bytes of text, the limit is 1000"),
    ],
    ids=["text", "ids", "chat"],
)
def test_what_is_larger_than_a_frame_is_never_sent(
    server: FakeServer, client: Client, prompt: Any, error: type[InvalidRequestError], match: str
) -> None:
    open_one = client.stream([1])
    first = server.expect_generate()
    with pytest.raises(error, match=match):
        list(client.stream(prompt))
    with pytest.raises(error, match=match):
        client.generate([prompt])
    later = client.stream([2])
    assert server.expect_generate().prompt_u32 == bytes([2, 0, 0, 0])
    server.finish(first.id)
    assert [piece.text for piece in open_one] == ["x"]
    later.close()


def test_a_request_too_large_beside_its_prompt_says_so(server: FakeServer, client: Client) -> None:
    sampling = SamplingParams(stop=[f"{number}" + "x" * 1000 for number in range(16)])
    stream = client.stream([1], sampling)
    server.send(make_error("no_session", "say hello", server.expect_generate().id))
    server.expect(Hello)
    server.send(limited(frame_bytes=10_000))  # another server, which takes less
    with pytest.raises(InvalidRequestError, match="the server's limit is 10000: shorten") as caught:
        next(stream)
    assert not isinstance(caught.value, PromptTooLongError)
    assert server.receive(0.1) is None


def test_a_request_of_just_a_frame_is_sent(server: FakeServer, client: Client) -> None:
    stream = client.stream("x" * 500)
    request = server.expect_generate()
    num_bytes = len(msgspec.msgpack.encode(request))
    assert refusal(request, num_bytes, limited(frame_bytes=num_bytes).limits) is None
    assert refusal(request, num_bytes, limited(frame_bytes=num_bytes - 1).limits) is not None
    stream.close()


def test_a_silent_server_is_asked_and_then_given_up(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOST_S", 1.2)
    stream = client.stream([1])
    server.expect(Generate)
    server.expect(Ping)
    with pytest.raises(ConnectionLostError, match="said nothing"):
        next(stream)


def test_a_client_that_was_stopped_reads_before_it_judges(
    server: FakeServer, client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "LOST_S", 1.2)
    stream = client.stream([1])
    request_id = server.expect_generate().id
    client._core._connection._call(lambda: time.sleep(1.5))
    server.finish(request_id)
    assert next(stream).text == "x"


def test_deltas_of_several_requests_come_in_one_message(server: FakeServer, client: Client) -> None:
    first, second = client.stream([1]), client.stream([2], SamplingParams(n=2))
    ids = [server.expect_generate().id for _ in range(2)]
    items = [Delta(id=ids[1], sample=1, ids=[7], finish="stop"), Delta(id=ids[0], ids=[5]), Delta(id=ids[1], ids=[6])]
    server.send(Deltas(items=[*items, Delta(id=99, ids=[1])]))  # the last one's request is not open
    assert next(first).token_ids == (5,)
    assert [(piece.sample_index, piece.token_ids) for piece in (next(second), next(second))] == [(1, (7,)), (0, (6,))]
    server.send(Deltas(items=[Delta(id=ids[0], seq=3, ids=[6]), Delta(id=ids[1], seq=1, ids=[8])]))
    with pytest.raises(ServerError, match="token 3 of sample 0 after 1"):
        next(first)
    assert next(second).token_ids == (8,), "a gap ends its own request alone"


def test_the_pieces_of_a_stream_know_their_prompt(server: FakeServer, client: Client) -> None:
    stream = client.stream([1, 2, 3], SamplingParams(n=2))
    request_id = server.expect_generate().id
    server.send(
        Accepted(id=request_id, prompt_tokens=3),
        Delta(id=request_id, ids=[5], cached_tokens=2),
        Delta(id=request_id, seq=1, ids=[6], finish="stop"),
        Delta(id=request_id, sample=1, ids=[7], finish="stop"),
    )
    assert [(piece.prompt_tokens, piece.cached_tokens) for piece in stream] == [(3, 2), (3, 2), (3, 0)]


def test_a_gap_in_the_tokens_is_no_output(server: FakeServer, client: Client) -> None:
    stream = client.stream([1])
    request_id = server.expect_generate().id
    server.send(Delta(id=request_id, ids=[5]), Delta(id=request_id, seq=2, ids=[6]))
    assert next(stream).token_ids == (5,)
    with pytest.raises(ServerError, match="token 2 of sample 0 after 1"):
        next(stream)
    server.expect(Cancel)


def test_a_message_that_cannot_be_read_ends_the_session_and_the_next_request_has_another(
    server: FakeServer, client: Client
) -> None:
    streams = [client.stream([1, 2]), client.stream([3])]
    for _ in streams:
        server.send(Accepted(id=server.expect_generate().id, prompt_tokens=2))
    server._socket.send_multipart([server._peer, b"GG\x01D", b"\x82\xa2id\x00\xa3seq\xff"])  # -1
    server.expect(Bye)
    for stream in streams:
        with pytest.raises(ConnectionLostError, match="seq"):
            list(stream)
    later = client.stream([4])
    request = server.expect_generate()
    server.send(make_error("no_session", "say hello", request.id))
    server.expect(Hello)
    server.send(WELCOME)
    assert server.expect_generate().prompt_ids == request.prompt_ids
    later.close()


def test_leaving_a_stream_cancels_it_once(server: FakeServer, client: Client) -> None:
    stream = client.stream([1])
    request_id = server.expect_generate().id
    stream.close()
    stream.close()
    cancel = server.expect(Cancel)
    assert isinstance(cancel, Cancel)
    assert cancel.id == request_id
    server.finish(request_id)  # was on its way
    assert server.receive(0.1) is None


@pytest.mark.parametrize("ended", [1, 2])
def test_a_stream_that_has_ended_hears_nothing_of_a_later_loss(server: FakeServer, client: Client, ended: int) -> None:
    """Its done is on its way: the last piece was its end. One of whose samples is not at its end hears of it."""
    heard: SimpleQueue[Delivery] = SimpleQueue()
    client._core.open([[1]], SamplingParams(n=2), streams=True, sinks=[heard.put])
    request_id = server.expect_generate().id
    server.send(Accepted(id=request_id, prompt_tokens=1))
    for sample in range(ended):
        server.send(Delta(id=request_id, sample=sample, ids=[5], finish="length"))
        assert isinstance(heard.get(timeout=5.0), StreamPiece)
    client.close()
    if ended < 2:
        assert isinstance(heard.get(timeout=5.0), EngineClosedError)
    assert heard.empty()


def test_closing_says_bye_and_ends_what_waits(server: FakeServer, client: Client) -> None:
    stream = client.stream([1])
    server.expect(Generate)
    client.close()
    with pytest.raises(EngineClosedError):
        next(stream)
    server.expect(Bye)
    with pytest.raises(EngineClosedError):
        client.generate([1])


def test_a_failed_prompt_ends_its_call_and_the_calls_other_requests(server: FakeServer, client: Client) -> None:
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.generate, [[1], [2]], SamplingParams())
        first, second = server.expect_generate(), server.expect_generate()
        server.send(make_error("internal", "no luck", first.id))
        cancel = server.expect(Cancel)
        assert isinstance(cancel, Cancel)
        assert cancel.id == second.id
        with pytest.raises(ServerError, match="no luck"):
            call.result(5)


def test_kinds_of_a_later_server_are_ignored(server: FakeServer, client: Client) -> None:
    stream = client.stream([1])
    request_id = server.expect_generate().id
    server._socket.send_multipart([server._peer, b"GG\x01z", b"\x80"])
    server._socket.send_multipart([server._peer, b"nonsense"])
    server.finish(request_id)
    assert next(stream).text == "x"


def test_a_chat_of_dicts_and_parts_is_sent_as_messages(server: FakeServer, client: Client) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(client.chat, [{"role": "user", "content": parts}])
        request = server.expect_generate()
        assert request.messages == [ChatMessage(role="user", content="a\nb")]
        server.finish(request.id)
        assert call.result(5)[0].text == "x"


def test_what_a_template_is_given_is_sent_to_a_server_that_knows_it(server: FakeServer, client: Client) -> None:
    call = {"id": "c1", "function": {"name": "add", "arguments": {"a": 1}}}
    chat = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    with pytest.raises(InvalidRequestError, match="fake gives chat templates messages of role and content alone"):
        client.chat(chat)
    with pytest.raises(InvalidRequestError, match="ask a later server"):
        client.stream(Chat([{"role": "user", "content": "x"}], chat_template_kwargs={"enable_thinking": False}))
    client._core._connection.welcome = msgspec.structs.replace(WELCOME, features=["template_arguments"])
    stream = client.stream(Chat(chat, tools=[{"n": -1}], documents=[{}], chat_template_kwargs={"a": None}))
    request = server.expect_generate()
    assert request.messages == [ChatMessage(role="assistant", content="", tool_calls=[call])]
    assert (request.tools, request.documents, request.chat_template_kwargs) == ([{"n": -1}], [{}], {"a": None})
    stream.close()
    unsendable: list[list[dict[str, Any]]] = [[{"n": 2**64}], [{"n": "\ud800"}], [{}] * 129]
    for wrong in unsendable:
        with pytest.raises(InvalidRequestError, match="a chat cannot be sent"):
            client.chat([{"role": "user", "content": "x"}], tools=wrong)


@pytest.mark.parametrize("message", [{"role": "user", "content": "\ud800"}, {"role": "r" * 65, "content": "x"}])
def test_a_message_that_cannot_be_written_down_is_refused_here(client: Client, message: dict[str, str]) -> None:
    with pytest.raises(InvalidRequestError):
        client.chat([message])
