"""The mock server: it keeps the protocol as a real server would, and breaks it as its script says."""

import itertools
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from graphgen.base.signals import SAME_S
from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.messages import (
    Accepted,
    Cancel,
    ChatMessage,
    Delta,
    Done,
    Draining,
    Error,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Ping,
    Sampling,
    Stats,
    StatsRequest,
)
from graphgen.mock_server.__main__ import mock_server
from graphgen.mock_server.script import Hang, Script, Silence, built_in_script, read_script
from tests import ROOT
from tests.ipc.raw_client import RawClient, running_command, running_mock
from tests.ipc.vectors import read_vectors, refuses_wrong_vectors


def collect(client: RawClient, request_id: int) -> tuple[list[Delta], Done]:
    deltas = []
    while isinstance(message := client.receive_any(), Delta):
        deltas.append(message)
    assert isinstance(message, Done), message
    assert message.id == request_id
    return deltas, message


def test_it_refuses_every_wrong_vector_with_its_code_and_lives() -> None:
    with running_mock() as server, RawClient(server.address) as client:
        refuses_wrong_vectors(client)


def test_it_refuses_a_routing_id_that_a_client_chose() -> None:
    with running_mock() as server, RawClient(server.address, routing_id=b"mine") as client:
        for message, about in ((Hello(), "hello"), (Ping(), "ping")):
            client.send(message)
            error = client.receive(Error)
            assert (error.code, error.about) == ("bad_request", about)


def test_it_takes_every_right_vector() -> None:
    right = [one for one in read_vectors("client.json") if one.expect == "ok" and one.kind == "generate"]
    with running_mock() as server, RawClient(server.address) as client:
        client.hello()
        for vector in right:
            client.send_frames(vector.frame_bytes())
            accepted = client.receive(Accepted)
            client.send(Cancel(id=accepted.id))
            while not isinstance(client.receive_any(), Done):
                pass


def test_an_echo_counts_its_tokens_and_says_why_it_ended() -> None:
    with running_mock() as server, RawClient(server.address) as client:
        client.hello()
        client.send(Generate(id=4, text="to be or not", echo_ids=True))
        assert client.receive(Accepted).prompt_ids == list(b"to be or not")
        deltas, done = collect(client, 4)
        assert "".join(delta.text for delta in deltas) == "to be or not"
        assert bytes(token for delta in deltas for token in delta.ids) == b"to be or not"
        assert [delta.seq for delta in deltas] == [0, 3, 6, 9, 12]
        assert [delta.finish for delta in deltas] == [None] * 4 + ["stop"]
        assert (done.usage.prompt_tokens, done.usage.output_tokens) == (12, 12)

        client.send(Generate(id=4, text="aé€", sampling=Sampling(max_tokens=5, n=2), stream=False))
        client.receive(Accepted)
        deltas, done = collect(client, 4)
        assert [(delta.sample, delta.text, len(delta.ids)) for delta in deltas] == [(0, "aé", 5), (1, "aé", 5)]
        assert done.finish == ["length", "length"]


def test_a_chat_and_packed_ids_are_prompts_too() -> None:
    with running_mock() as server, RawClient(server.address) as client:
        client.hello()
        client.send(Generate(id=1, messages=[ChatMessage(role="user", content="hi")]))
        client.receive(Accepted)
        assert collect(client, 1)[0][0].text == "hi"
        client.send(Generate(id=1, prompt_u32=b"h\0\0\0i\0\0\0"))
        client.receive(Accepted)
        assert collect(client, 1)[0][0].text == "hi"


def test_what_needs_a_session_is_refused_without_one() -> None:
    with running_mock() as server, RawClient(server.address) as client:
        client.send(Generate(id=3, text="x"), Ping(t=1))
        assert [(error.code, error.id) for error in (client.receive(Error), client.receive(Error))] == [
            ("no_session", 3),
            ("no_session", None),
        ]


def test_an_id_in_use_is_refused_and_the_first_request_goes_on() -> None:
    with running_mock() as server, RawClient(server.address) as client:
        client.hello()
        client.send(Generate(id=1, text="hang"), Generate(id=1, text="x"), Generate(id=1))
        codes = [(m.code, m.id) for m in client.ends_with_pong(1) if isinstance(m, Error)]
        assert codes == [("duplicate_id", None), ("duplicate_id", None)]
        client.send(Cancel(id=1))
        assert collect(client, 1)[1].finish == ["aborted"]


def test_the_control_socket_cancels_by_session_and_tells_its_state() -> None:
    with running_mock() as server, RawClient(server.address) as client, RawClient(server.control_address) as control:
        session = client.hello().session
        client.send(Generate(id=1, text="hang"))
        client.receive(Accepted)
        control.send(StatsRequest())
        assert control.receive(Stats).open_requests == 1
        control.send(Cancel(id=1, session="another"), Cancel(id=1, session=session), HealthRequest())
        assert control.receive(Health).ready
        assert collect(client, 1)[1].finish == ["aborted"]


def test_a_restart_forgets_the_session_and_has_another_instance() -> None:
    with running_mock() as server, RawClient(server.address) as client:
        first = client.hello()
        client.send(Generate(id=1, text="restart"))
        client.receive(Accepted)
        for _ in range(3):
            client.receive(Delta)
        time.sleep(0.5)  # libzmq connects again; what is sent to the old connection is lost
        client.send(Ping(t=5))
        assert client.receive(Error).code == "no_session"
        assert client.hello().instance != first.instance


def test_silence_stops_answers_and_heartbeats() -> None:
    script = Script(otherwise=(Silence(400),), heartbeat_ms=50)
    with running_mock(script) as server, RawClient(server.address) as client:
        client.hello()
        client.send(Generate(id=1, text="x"))
        client.receive(Accepted)
        began_s = time.monotonic()
        client.ends_with_pong(1)
        assert time.monotonic() - began_s > 0.3


def test_open_requests_are_pinged_and_idle_sessions_are_not() -> None:
    script = Script(otherwise=(Hang(),), heartbeat_ms=20)
    with running_mock(script) as server, RawClient(server.address) as client:
        client.hello()
        time.sleep(0.1)
        client.send(Generate(id=1, text="x"))
        kinds = [client.receive_frames()[0][3:] for _ in range(4)]
        assert kinds == [b"A", b"P", b"P", b"P"]


@pytest.mark.parametrize(("prompt", "letter"), [("future", b"z"), ("garbage", b"D")])
def test_a_script_sends_what_no_server_should(prompt: str, letter: bytes) -> None:
    with running_mock() as server, RawClient(server.address) as client:
        client.hello()
        client.send(Generate(id=1, text=prompt))
        headers_and_maps = iter(client.receive_frames, None)
        frames = list(itertools.islice((frames for frames in headers_and_maps if frames[0][3:] != b"P"), 5))
        assert frames[4][0][3:] == letter
        assert frames[4][1] in (b"\x81\xa1x\x01", b"\xc1")


def test_sigterm_finishes_what_is_open_refuses_the_rest_and_exits_with_0() -> None:
    with running_command("graphgen.mock_server") as served, RawClient(served.address) as client:
        client.hello()
        client.send(Generate(id=1, text="slow", sampling=Sampling(max_tokens=8)))
        client.receive(Accepted)
        served.process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
        served.process.send_signal(signal.SIGTERM)  # as of a group and of its leader: one wish
        while not isinstance(client.receive_any(), Draining):
            pass
        client.send(Generate(id=2, text="x"))
        answers = client.ends_with_pong(1)
        while not isinstance(answers[-1], Done):
            answers.append(client.receive_any())
        assert [(m.code, m.id) for m in answers if isinstance(m, Error)] == [("draining", 2)]
        assert answers[-1].finish == ["length"]
        assert served.process.wait(10) == 0


def test_a_second_sigterm_ends_at_once() -> None:
    with running_command("graphgen.mock_server") as served, RawClient(served.address) as client:
        client.hello()
        client.send(Generate(id=1, text="hang"))
        client.receive(Accepted)
        served.process.send_signal(signal.SIGTERM)
        while not isinstance(client.receive_any(), Draining):
            pass
        time.sleep(SAME_S + 0.1)
        served.process.send_signal(signal.SIGTERM)
        while not isinstance(message := client.receive_any(), Error):
            assert isinstance(message, Delta)
        assert message.code == "draining"
        assert served.process.wait(10) == 0


def test_with_curve_only_a_client_with_keys_is_heard() -> None:
    with running_command("graphgen.mock_server", "--curve") as served:
        assert len(served.public_key) == 40
        with RawClient(served.address, timeout_ms=300) as client, pytest.raises(zmq.Again):
            client.hello()


def test_a_script_from_a_file_is_what_was_printed(tmp_path: Path) -> None:
    path = tmp_path / "script.json"
    path.write_bytes(msgspec.json.encode(built_in_script()))
    assert read_script(path) == built_in_script()
    path.write_text('{"replies": [{"prompt": "x", "steps": [{"do": "dance"}]}]}')
    with pytest.raises(ConfigError, match="dance"):
        read_script(path)


def test_the_help_names_every_prompt_that_is_not_echoed() -> None:
    help_text = " ".join((mock_server.__doc__ or "").split())
    for reply in built_in_script().replies:
        assert reply.prompt in help_text or reply.prompt.startswith("error "), reply.prompt


def test_it_needs_no_torch() -> None:
    program = "import sys, graphgen.mock_server.__main__; print({'torch', 'transformers'} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "set()\n"
