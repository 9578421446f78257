"""CURVE keys: who has none, a wrong one, or one that is not let in, gets no answer; and no public door without keys."""

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
import zmq
import zmq.auth
from typer.testing import CliRunner

from graphgen import Client, ConfigError, ConnectionLostError, SamplingParams
from graphgen.base.salt import cache_salt
from graphgen.commands.keys import keys_app
from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.ggp.messages import Accepted, Cancel, Delta, Done, Error, Generate, Hello, Ping, Sampling, Welcome
from graphgen.server.frontend.authentication import KeyRing
from graphgen.server.frontend.keys import Keys, read_max_priority
from graphgen.server.options import ServeOptions, is_public
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, RawClient, wait_until


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    keys = Keys(tmp_path / "keys")
    keys.make(None)
    return keys


def options_of(keys: Keys, secret_file: Path) -> dict[str, Any]:  # of a socket
    public, secret = zmq.auth.load_certificate(secret_file)
    server, _ = zmq.auth.load_certificate(keys.folder / "server.key")
    assert secret is not None
    return {"CURVE_SERVERKEY": server, "CURVE_PUBLICKEY": public, "CURVE_SECRETKEY": secret}


def says_hello(client: RawClient, timeout_s: float = 2.0) -> bool:
    client.send(Hello())
    return isinstance(client.receive(timeout_s), Welcome)


def test_a_key_that_is_let_in_gets_a_session(make_frontend: MakeFrontend, keys: Keys) -> None:
    frontend = make_frontend(keys=str(keys.folder))
    secret, _ = keys.make("alice")
    assert says_hello(frontend.connect(**options_of(keys, secret)))


@pytest.mark.parametrize("with_keys", [False, True])
def test_a_frame_of_just_the_limit_is_read_and_a_larger_one_ends_the_connection(
    make_frontend: MakeFrontend, keys: Keys, with_keys: bool
) -> None:
    """Whatever CURVE adds to it."""
    frontend = make_frontend(keys=str(keys.folder) if with_keys else None)
    client = frontend.connect(**(options_of(keys, keys.make("alice")[0]) if with_keys else {}))
    client.send(Hello())
    limit = client.expect(Welcome).limits.frame_bytes
    client.send_raw(b"GG\x01G", bytes(limit))
    assert client.expect(Error).code == "bad_frame"
    client.send_raw(b"GG\x01G", bytes(limit + 1))

    def is_forgotten() -> bool:
        client.send(Ping(t=1))  # the first may go with the connection
        answer = client.receive(0.2)
        return isinstance(answer, Error) and answer.code == "no_session"

    assert wait_until(is_forgotten)


def test_strangers_get_no_answer(make_frontend: MakeFrontend, keys: Keys, tmp_path: Path) -> None:
    frontend = make_frontend(keys=str(keys.folder))
    stranger, public = Keys(tmp_path / "elsewhere").make("mallory")
    with_key = options_of(keys, stranger)
    assert not says_hello(frontend.connect(**with_key), 0.5)
    assert not says_hello(frontend.connect(), 0.5)
    keys.allow("mallory", public)  # read for each connection: no restart
    assert says_hello(frontend.connect(**with_key))


def test_the_python_client_with_keys(make_frontend: MakeFrontend, keys: Keys) -> None:
    frontend = make_frontend(keys=str(keys.folder))
    secret, _ = keys.make("alice")
    server_key = zmq.auth.load_certificate(keys.folder / "server.key")[0].decode()
    address = frontend.sockets.data.address
    with Client(address, server_key=server_key, key_file=secret) as client:
        stream = client.stream([1], SamplingParams(max_tokens=1))
        frontend.scheduler.send_tokens(frontend.scheduler.expect(Submit).request_id, [5], "length")
        assert [piece.token_ids for piece in stream] == [(5,)]
    with pytest.raises(ConnectionLostError, match="key let in"):
        Client(address, connect_timeout_s=0.5)
    with pytest.raises(ConfigError, match="needs both"):
        Client(address, server_key=server_key)


@pytest.mark.parametrize("server_key", ["", "short", "x" * 39, "x" * 45, " " * 40, "ä" * 40], ids=repr)
def test_a_client_is_told_what_is_wrong_with_the_servers_key(server_key: str, keys: Keys) -> None:
    secret, _ = keys.make("alice")
    with pytest.raises(ConfigError, match=f"server_key is '{server_key}': give the 40 characters"):
        Client("tcp://127.0.0.1:9", server_key=server_key, key_file=secret)


def test_a_client_is_told_what_is_wrong_with_its_own_key(keys: Keys, tmp_path: Path) -> None:
    _, public = keys.make("alice")
    (tmp_path / "empty").write_text("")
    for file, message in (
        (tmp_path / "nowhere", "nowhere' cannot be read .* give the file NAME.key_secret"),
        (tmp_path, "cannot be read .* give the file NAME.key_secret"),
        (tmp_path / "empty", "empty' cannot be read .* give the file NAME.key_secret"),
        (keys.clients / "alice.key", "holds no secret key: give the file NAME.key_secret"),
    ):
        with pytest.raises(ConfigError, match=message):
            Client("tcp://127.0.0.1:9", server_key=public, key_file=file)


def open_session(frontend: Frontend, keys: Keys, name: str) -> RawClient:
    secret = keys.clients / f"{name}.key_secret"
    if not secret.exists():
        keys.make(name)
    return frontend.welcome(**options_of(keys, secret))


def test_connections_with_one_key_share_its_limits(make_frontend: MakeFrontend, keys: Keys) -> None:
    frontend = make_frontend(keys=str(keys.folder), open_requests=1)
    first, second = open_session(frontend, keys, "alice"), open_session(frontend, keys, "alice")
    first.send(Generate(id=1, prompt_ids=[1]))
    first.expect(Accepted)
    second.send(Generate(id=1, prompt_ids=[1]))
    assert second.expect(Error).code == "overloaded"
    bob = open_session(frontend, keys, "bob")
    bob.send(Generate(id=1, prompt_ids=[1]))
    bob.expect(Accepted)


def test_a_request_is_accounted_to_its_key(make_frontend: MakeFrontend, keys: Keys) -> None:
    """And not to its connection: who opens more of them gets no larger part of the engine."""
    frontend = make_frontend(keys=str(keys.folder))
    secrets = {name: keys.make(name)[0] for name in ("alice", "bob")}
    clients, tenants = [], []  # a client that nothing refers to is closed, and its request cancelled
    for name in ("alice", "alice", "bob"):
        client = frontend.connect(**options_of(keys, secrets[name]))
        clients.append(client)
        assert says_hello(client)
        client.send(Generate(id=1, prompt_ids=[5, 6]))
        tenants.append(frontend.scheduler.expect(Submit).tenant)
    assert tenants[0] == tenants[1] != tenants[2]


def priority_at_the_scheduler(frontend: Frontend, client: RawClient, request_id: int, asked: int) -> int:
    client.send(Generate(id=request_id, prompt_ids=[5, 6], sampling=Sampling(priority=asked)))
    submit = frontend.scheduler.expect(Submit)
    client.expect(Accepted)
    frontend.scheduler.send_tokens(submit.request_id, [5], "length")
    client.expect(Delta)
    client.expect(Done)
    return submit.priority


def test_an_operator_caps_the_priority_of_a_key(make_frontend: MakeFrontend, keys: Keys) -> None:
    """Of that key alone; lower priorities stay, and nobody is refused."""
    frontend = make_frontend(keys=str(keys.folder))
    keys.make("alice", max_priority=3)
    alice, bob = open_session(frontend, keys, "alice"), open_session(frontend, keys, "bob")
    asked = [0, 2, 3, 4, 9]
    assert [priority_at_the_scheduler(frontend, alice, one, one) for one in asked] == [0, 2, 3, 3, 3]
    assert [priority_at_the_scheduler(frontend, bob, one, one) for one in asked] == asked


def test_a_cap_that_is_changed_holds_for_new_requests_of_a_session(make_frontend: MakeFrontend, keys: Keys) -> None:
    frontend = make_frontend(keys=str(keys.folder))
    secret, public = keys.make("alice")
    alice = frontend.welcome(**options_of(keys, secret))
    ids = itertools.count()

    def is_capped_at(cap: int) -> bool:
        return priority_at_the_scheduler(frontend, alice, next(ids), 9) == cap

    assert is_capped_at(9)
    for cap in (2, 7, 9):
        keys.allow("alice", public, max_priority=cap)
        assert wait_until(functools.partial(is_capped_at, cap), 3)


@pytest.mark.parametrize(
    ("metadata", "cap"),
    [
        ('    max-priority = "3"\n', 3),
        ("    max-priority=3\n", 3),
        ("    max-priority = '0'\r\n", 0),
        ('    email = "max-priority = 1"\n#   max-priority = "1"\n', 9),
        ("", 9),
        ('    max-priority = "high"\n', 0),
        ('    max-priority = "12"\n', 0),
        ('    max-priority = "-1"\n', 0),
        ("    max-priority = \xb2\n", 0),
        ("    max-priority\n", 0),
    ],
)
def test_what_the_metadata_of_a_key_file_say(keys: Keys, metadata: str, cap: int) -> None:
    """A cap that cannot be read is the strictest, and lets its client in all the same."""
    _, public = keys.make("alice")
    path = keys.clients / "alice.key"
    path.write_bytes(f'metadata\n{metadata}curve\n    public-key = "{public}"\n'.encode("latin-1"))
    ring = KeyRing(keys.clients)
    assert public in ring
    assert ring.max_priority(public) == cap
    assert zmq.auth.load_certificate(path)[0].decode() == public, "ZeroMQ's own reader takes the file"


def test_a_key_in_two_files_has_the_lower_cap(keys: Keys) -> None:
    _, public = keys.make("alice", max_priority=2)
    keys.allow("alice-again", public)
    assert KeyRing(keys.clients).max_priority(public) == 2
    keys.allow("alice-again", public, max_priority=1)
    assert KeyRing(keys.clients).max_priority(public) == 1


def test_a_cap_that_is_none_is_refused_before_a_key_is_made(keys: Keys) -> None:
    for cap in (-1, 10):
        with pytest.raises(ConfigError, match="priorities are 0 to 9"):
            keys.make("alice", max_priority=cap)
    assert not list(keys.folder.rglob("alice*"))
    with pytest.raises(ConfigError, match="name a client"):
        Keys(keys.folder / "new").make(None, max_priority=3)


def test_the_command_writes_the_cap(keys: Keys) -> None:
    folder = ["--keys", str(keys.folder)]
    run = CliRunner()
    assert run.invoke(keys_app, ["new", "alice", "--max-priority", "3", *folder]).exit_code == 0
    assert run.invoke(keys_app, ["allow", "bob", "0" * 40, "--max-priority", "0", *folder]).exit_code == 0
    assert [read_max_priority(keys.clients / f"{name}.key") for name in ("alice", "bob")] == [3, 0]
    assert run.invoke(keys_app, ["new", "carol", "--max-priority", "10", *folder]).exit_code == 2


@pytest.mark.parametrize("begin", ["-", "--", "-h", "--keys"])
def test_a_public_key_may_begin_as_options_do(tmp_path: Path, begin: str) -> None:
    public_key = begin + "0" * (40 - len(begin))
    done = CliRunner().invoke(keys_app, ["allow", "bob", public_key, "--keys", str(tmp_path)])
    assert done.exit_code == 0, done.output
    assert public_key in next(tmp_path.glob("clients/bob.key")).read_text()


def test_without_keys_a_request_is_accounted_to_its_session(frontend: Frontend) -> None:
    tenants = []
    for _ in range(2):
        client = frontend.welcome()
        for request_id in (1, 2):
            client.send(Generate(id=request_id, prompt_ids=[5, 6]))
            tenants.append(frontend.scheduler.expect(Submit).tenant)
    assert tenants[0] == tenants[1] != tenants[2] == tenants[3]


def test_another_key_may_not_cancel(make_frontend: MakeFrontend, keys: Keys) -> None:
    frontend = make_frontend(keys=str(keys.folder))
    alice = open_session(frontend, keys, "alice")
    keys.make("bob")
    control = frontend.connect(control=True, **options_of(keys, keys.clients / "bob.key_secret"))
    control.send(Cancel(id=1, session=alice.session))
    assert control.expect(Error).code == "forbidden"


def test_pages_are_shared_within_a_key_and_a_salt_only() -> None:
    salts = [cache_salt(client, salt) for client in ("alice", "bob", "") for salt in ("", "x", "bob")]
    assert len(set(salts)) == len(salts)
    assert cache_salt("alice", "x") == cache_salt("alice", "x")


def test_secret_keys_are_for_their_owner_alone(keys: Keys) -> None:
    secret, public = keys.make("alice")
    assert secret.stat().st_mode & 0o077 == 0
    assert keys.folder.stat().st_mode & 0o077 == 0
    assert len(public) == 40
    with pytest.raises(ConfigError, match="is there already"):
        keys.make("alice")


@pytest.mark.parametrize("name", ["../server", "a/b", "", "a b"])
def test_a_name_is_no_path(keys: Keys, name: str) -> None:
    with pytest.raises(ConfigError, match="is no name"):
        keys.allow(name, "x" * 40)


def test_what_is_no_key_is_not_let_in(keys: Keys) -> None:
    with pytest.raises(ConfigError, match="is no public key"):
        keys.allow("alice", "too short")


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("tcp://127.0.0.1:5755", False),
        ("tcp://127.9.9.9:5755", False),
        ("tcp://localhost:5755", False),
        ("tcp://[::1]:5755", False),
        ("ipc:///tmp/x", False),
        ("tcp://*:5755", True),
        ("tcp://0.0.0.0:5755", True),
        ("tcp://[::]:5755", True),
        ("tcp://192.168.0.1:5755", True),
        ("tcp://eth0:5755", True),
        ("tcp://example.org:5755", True),
    ],
)
def test_a_public_address_needs_keys(address: str, public: bool, keys: Keys) -> None:
    assert is_public(address) == public
    loopback = "tcp://127.0.0.1:1"
    for data, control in ((address, loopback), (loopback, address)):
        if public:
            with pytest.raises(ConfigError, match="insecure-public"):
                ServeOptions(data=data, control=control, keys=None)
        else:
            ServeOptions(data=data, control=control, keys=None)
        ServeOptions(data=data, control=control, keys=None, insecure_public=True)
        ServeOptions(data=data, control=control, keys=str(keys.folder))


def test_keys_that_are_missing_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="graphgen keys new"):
        ServeOptions(data="tcp://*:1", control="tcp://*:2", keys=str(tmp_path))
