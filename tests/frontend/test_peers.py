"""Who a peer is: a routing id that it chose is of no use, another key reads nothing of a session, and a key that is
removed ends what it opened. All on real sockets with CURVE."""

import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zmq.auth

from graphgen.ipc.engine_messages import Cancel as SchedulerCancel
from graphgen.ipc.ggp.framing import is_made_by_socket
from graphgen.ipc.ggp.messages import Cancel, Delta, Done, Error, Hello, Ping, Pong
from graphgen.server.frontend import authentication
from graphgen.server.frontend.authentication import KeyRing
from graphgen.server.frontend.keys import Keys
from tests import ROOT
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import IDS, Frontend, open_request, wait_until
from tests.frontend.test_keys import open_session, options_of


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys(tmp_path / "keys")
    for name in (None, "alice", "bob"):
        keys.make(name)
    return keys


@pytest.fixture
def frontend(make_frontend: MakeFrontend, keys: Keys) -> Frontend:
    return make_frontend(keys=str(keys.folder))


def bob_of(keys: Keys) -> dict[str, Any]:  # options of a socket
    return options_of(keys, keys.clients / "bob.key_secret")


@pytest.mark.parametrize("chosen", [b"alice", b"x", b"five5", b"y" * 255])
def test_a_routing_id_that_a_peer_chose_is_refused(frontend: Frontend, keys: Keys, chosen: bytes) -> None:
    client = frontend.connect(IDENTITY=chosen, **bob_of(keys))
    control = frontend.connect(control=True, IDENTITY=chosen, **bob_of(keys))
    for peer, message in ((client, Hello()), (client, IDS), (client, Ping()), (control, Ping())):
        peer.send(message)
        error = peer.expect(Error)
        assert error.code == "bad_request"
        assert "ZMQ_ROUTING_ID" in error.message
        assert error.id == (IDS.id if message is IDS else None)
        assert error.about == type(message).__name__.lower()
    assert frontend.session_ids() == []


def test_every_connections_own_id_is_accepted(frontend: Frontend, keys: Keys) -> None:
    clients = [open_session(frontend, keys, "alice") for _ in range(20)]
    assert all(map(is_made_by_socket, frontend.session_ids()))
    assert len(set(frontend.session_ids())) == len(clients)


def test_the_ids_of_a_process_cannot_be_known() -> None:
    """They would begin with the same number in every process: that of a `rand` without a seed, which libzmq takes."""
    code = """
        from tests.frontend.harness import Frontend
        frontend = Frontend(tokenizer=None)
        frontend.welcome()
        print(frontend.session_ids()[0].hex())
        frontend.close()
    """
    command = [sys.executable, "-P", "-c", textwrap.dedent(code)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    said = [subprocess.run(command, capture_output=True, text=True, check=True, env=environment) for _ in range(2)]
    ids = [bytes.fromhex(done.stdout) for done in said]
    assert all(map(is_made_by_socket, ids))
    assert ids[0] != ids[1]


def test_another_key_with_the_routing_id_of_a_session_ends_it(make_frontend: MakeFrontend, keys: Keys) -> None:
    """A connection may choose even an id that looks as if the socket had made it, if it knows which."""
    frontend = make_frontend(keys=str(keys.folder), heartbeat_s=60.0)  # no ping finds that alice is gone
    alice = open_session(frontend, keys, "alice")
    request_id = open_request(frontend, alice)
    (routing_id,) = frontend.session_ids()
    frontend.server._sessions.all()[0].connection = None  # nor does the gate
    alice.close()
    time.sleep(0.3)
    bob = frontend.connect(IDENTITY=routing_id, **bob_of(keys))
    bob.send(Ping())
    error = bob.expect(Error)
    assert error.code == "no_session", "the id is alice's, the key is bob's"
    assert frontend.session_ids() == []
    frontend.scheduler.expect(SchedulerCancel)
    frontend.scheduler.send_tokens(request_id, [6], "stop")
    assert bob.receive(0.3) is None


def test_nothing_is_sent_to_who_has_the_routing_id_of_a_connection_that_is_gone(make_frontend: MakeFrontend) -> None:
    """Without keys, and without a word of the one that took it."""
    frontend = make_frontend(heartbeat_s=60.0)
    client = frontend.welcome()
    request_id = open_request(frontend, client)
    (routing_id,) = frontend.session_ids()
    client.close()
    assert frontend.scheduler.expect(SchedulerCancel, timeout_s=1.0).request_id == request_id
    assert wait_until(lambda: frontend.session_ids() == [])
    other = frontend.connect(IDENTITY=routing_id)
    time.sleep(0.2)
    frontend.scheduler.send_tokens(request_id, [5], "stop")
    assert other.receive(0.3) is None


def test_a_removed_key_ends_its_sessions(frontend: Frontend, keys: Keys) -> None:
    alice, bob = open_session(frontend, keys, "alice"), open_session(frontend, keys, "bob")
    alice_id, bob_id = open_request(frontend, alice), open_request(frontend, bob)
    begun_s = time.monotonic()
    (keys.clients / "bob.key").unlink()
    error = bob.expect(Error)
    assert (error.code, error.id) == ("forbidden", IDS.id)
    assert time.monotonic() - begun_s < 2
    assert frontend.scheduler.expect(SchedulerCancel).request_id == bob_id
    for message in (Hello(), Ping(), IDS):
        bob.send(message)
        assert bob.expect(Error).code == "forbidden", "its connection lives on and may say nothing"
    control = frontend.connect(control=True, **bob_of(keys))
    control.send(Cancel(id=IDS.id, session=alice.session))
    assert control.receive(0.3) is None, "a new connection is not made at all"
    frontend.scheduler.send_tokens(alice_id, [5], "stop")
    alice.expect(Delta)
    alice.expect(Done)


def test_a_key_under_two_names_is_let_in_until_both_are_removed(frontend: Frontend, keys: Keys) -> None:
    keys.allow("bob-again", zmq.auth.load_certificate(keys.clients / "bob.key")[0].decode())
    bob = open_session(frontend, keys, "bob")
    (keys.clients / "bob.key").unlink()
    time.sleep(3 * authentication.WATCH_S)
    bob.send(Ping())
    bob.expect(Pong)
    (keys.clients / "bob-again.key").unlink()
    assert wait_until(lambda: frontend.session_ids() == [])


def test_a_handshake_reads_no_file(frontend: Frontend, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a flood of them costs no more with 500 keys than with one."""
    monkeypatch.setattr(KeyRing, "refresh", lambda _: None)
    (keys.clients / "alice.key").unlink()
    assert open_session(frontend, keys, "alice").session


@pytest.fixture
def many_keys(keys: Keys) -> Keys:
    for number in range(500):
        keys.allow(f"client-{number}", zmq.curve_keypair()[0].decode())
    return keys


def test_a_flood_of_strangers_does_not_lock_a_good_key_out(make_frontend: MakeFrontend, many_keys: Keys) -> None:
    frontend = make_frontend(keys=str(many_keys.folder))
    server = options_of(many_keys, many_keys.clients / "alice.key_secret")["CURVE_SERVERKEY"]
    strangers = []
    for _ in range(400):
        public, secret = zmq.curve_keypair()
        options = {"CURVE_SERVERKEY": server, "CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": secret}
        strangers.append(frontend.connect(**options))
    time.sleep(0.2)
    begun_s = time.monotonic()
    open_session(frontend, many_keys, "alice")
    assert time.monotonic() - begun_s < 2
    for stranger in strangers:
        stranger.close()


def refreshed(ring: KeyRing, change: Callable[[], object]) -> KeyRing:
    change()
    ring.refresh()
    return ring


def test_what_changes_in_the_folder_is_seen(keys: Keys) -> None:
    ring = KeyRing(keys.clients)
    alice, bob = (zmq.auth.load_certificate(keys.clients / f"{name}.key")[0].decode() for name in ("alice", "bob"))
    new = zmq.curve_keypair()[0].decode()
    path = keys.clients / "alice.key"
    text = path.read_text()
    assert (alice in ring, bob in ring, new in ring, "" in ring) == (True, True, False, False)
    assert new in refreshed(ring, lambda: keys.allow("carol", new))
    assert alice not in refreshed(ring, lambda: path.write_text("no key"))
    assert alice in refreshed(ring, lambda: path.write_text(text)), "of the same length, within one tick of the clock"
    assert alice not in refreshed(ring, lambda: path.write_text(text.replace(alice, new)))
    assert alice not in refreshed(ring, path.unlink)
    assert bob not in refreshed(ring, lambda: keys.clients.rename(keys.folder / "gone"))


def test_keys_that_cannot_be_read_for_now_stay(keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when all file descriptors are taken: that must not end the sessions of every client."""
    ring = KeyRing(keys.clients)
    alice = zmq.auth.load_certificate(keys.clients / "alice.key")[0].decode()

    def fail(path: Path) -> None:
        raise OSError(24, os.strerror(24))

    monkeypatch.setattr(authentication, "read_public_key", fail)
    ring.refresh()
    assert alice in ring


@pytest.mark.parametrize(
    "frames",
    [
        [b""],
        [b"", b"1.0"],
        [b"", b"1.0", b"1", b"graphgen", b"127.0.0.1", b"", b"CURVE"],
        [b"", b"1.0", b"1", b"graphgen", b"127.0.0.1", b"", b"CURVE", b"short"],
        [b"", b"1.0", b"1", b"graphgen", b"127.0.0.1", b"", b"NULL"],
        [b"", b"2.0", b"1", b"graphgen", b"127.0.0.1", b"", b"CURVE", bytes(32)],
        [b"\xff"] * 100,
    ],
)
def test_a_question_that_is_none_does_not_end_the_answers(frontend: Frontend, keys: Keys, frames: list[bytes]) -> None:
    """A thread that ended on one would lock everybody out."""
    asker = frontend.inproc(authentication.ENDPOINT)
    for _ in range(100):
        asker.send_multipart(frames)
    assert open_session(frontend, keys, "alice").session
