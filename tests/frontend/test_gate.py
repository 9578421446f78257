"""What connections may cost: their number, their bytes each way, and who is let in when there are many."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from graphgen.ipc.errors import ConfigError
from graphgen.ipc.ggp.messages import Cancel, Delta, Done, Generate, Hello, Ping, Pong, Sampling, Welcome
from graphgen.server.frontend.memory import ResidentMemory, connection_limits
from graphgen.server.frontend.settings import frame_bytes_limit
from tests import ROOT
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import Frontend, RawClient, open_request, wait_until
from tests.frontend.raw_peers import MORE, connect_raw, frame, is_closed, send_without_end, shake_hands, tcp_parts

ATTACKER = "127.0.0.66"
"""Linux takes any address of 127/8 as one of its own."""


@pytest.fixture
def small(make_frontend: MakeFrontend) -> Frontend:
    """With room for a few connections."""
    return make_frontend(memory_limit_bytes=16 << 20)


@contextlib.contextmanager
def connections(frontend: Frontend, number: int, source: str = ATTACKER) -> Iterator[list[socket.socket]]:
    """As many as get in within a moment."""
    opened: list[socket.socket] = []
    try:
        with contextlib.suppress(TimeoutError):
            for _ in range(number):
                opened.append(connect_raw(frontend.sockets.data.address, source, timeout_s=0.5))
        yield opened
    finally:
        for raw in opened:
            raw.close()


def connect_from(frontend: Frontend, source: str) -> str:
    return frontend.sockets.data.address.replace("tcp://", f"tcp://{source}:0;")


def is_welcomed(client: RawClient) -> bool:
    """Says hello, and whether it is answered soon."""
    client.send(Hello())
    return isinstance(client.receive(0.5), Welcome)


@pytest.mark.parametrize("frame_bytes", [1, 100, 100_000])
def test_a_message_without_end_costs_its_connection_alone(frontend: Frontend, frame_bytes: int) -> None:
    client = frontend.welcome()
    name = open_request(frontend, client)
    memory = ResidentMemory()
    before = memory.num_bytes()
    num_bytes = send_without_end(frontend.sockets.data.address, frame_bytes)
    assert num_bytes < 256 << 20
    assert memory.num_bytes() - before < 256 << 20
    frontend.scheduler.send_tokens(name, [5, 6], "length")
    assert client.expect(Delta).ids == [5, 6]
    client.expect(Done)
    assert frontend.gate.num_cut == 1


def test_one_address_leaves_room_for_others(small: Frontend) -> None:
    limits = small.gate.limits
    with connections(small, limits.connections + 5) as opened:
        alive = [raw for raw in opened if not is_closed(raw, 0.1)]
        assert len(alive) <= limits.per_address < limits.connections
        client = small.connect(address=connect_from(small, "127.0.0.7"))
        client.send(Hello())
        client.expect(Welcome, 10)


def test_a_full_house_lets_in_again_when_there_is_room(small: Frontend) -> None:
    limits = small.gate.limits
    good = small.welcome()
    with contextlib.ExitStack() as stack:
        for number in range(3):
            stack.enter_context(connections(small, limits.per_address, f"127.0.0.{60 + number}"))
        assert wait_until(lambda: len(small.gate) >= limits.connections)
        assert wait_until(lambda: len(small.gate) <= limits.connections)
        late = small.connect()
        late.send(Hello())
        assert late.receive(0.5) is None
        good.send(Ping(t=1))
        good.expect(Pong)
    late.expect(Welcome, 10)


def test_large_messages_of_all_connections_fit_the_limit(make_frontend: MakeFrontend) -> None:
    """While the loop takes none: libzmq would have 32 of each."""
    frontend = make_frontend(memory_limit_bytes=96 << 20)
    limits = frontend.gate.limits
    body = bytes(frame_bytes_limit(1024) - 100)
    memory = ResidentMemory()
    before = memory.num_bytes()
    num_sent = 0
    with connections(frontend, limits.per_address) as opened:
        frontend.server._rate.spend(1 << 20)  # no permit for messages
        for raw in opened:
            shake_hands(raw)
            raw.settimeout(0.01)
            with contextlib.suppress(TimeoutError, ConnectionError):
                for _ in range(40):
                    raw.sendall(frame(b"GG\x01G", MORE) + frame(body))
                    num_sent += 1
        time.sleep(0.2)
        grown = memory.num_bytes() - before
        assert num_sent > len(opened), "each sends more than one message"
        assert grown < limits.connections * limits.held_bytes < 96 << 20
        assert not any(is_closed(raw, 0.01) for raw in opened), "honest messages, however many"


def test_a_client_that_does_not_read_gets_no_more_than_it_may_have_unread(frontend: Frontend) -> None:
    """Each answer repeats a prompt of 1000 ids, and ends at once."""
    client = frontend.welcome(RCVHWM=1, RCVBUF=4096)
    memory = ResidentMemory()
    ask = Generate(id=1, prompt_ids=[1000] * 1000, echo_ids=True, sampling=Sampling(n=1))
    other = frontend.welcome()
    before = memory.num_bytes()
    for number in range(3000):
        client.send(Generate(id=number, prompt_ids=ask.prompt_ids, echo_ids=True))
        client.send(Cancel(id=number))
        if number % 100 == 99:
            other.send(Ping(t=number))
            assert other.expect(Pong, 20).t == number
    session = next(one for one in frontend.server._sessions.all() if one.name == client.session)
    assert session.connection is not None
    unsent = session.connection._sent_bytes - session.connection._read()[0]
    assert unsent < 2 * frontend.gate.limits.unsent_bytes
    assert memory.num_bytes() - before < 64 << 20
    assert len(session.requests) <= 2 * frontend.settings.open_requests


def test_a_message_of_very_many_frames_holds_no_tokens_up(frontend: Frontend) -> None:
    client = frontend.welcome()
    name = open_request(frontend, client)
    with connect_raw(frontend.sockets.data.address) as raw:
        shake_hands(raw)
        raw.sendall(frame(b"", MORE) * 400_000 + frame(b""))
        waits_s = []
        for number in range(100):
            begun_s = time.monotonic()
            frontend.scheduler.send_tokens(name, [number])
            assert client.expect(Delta).ids == [number]
            waits_s.append(time.monotonic() - begun_s)
    assert max(waits_s) < 0.3, "taken at once it takes a second"
    client.send(Ping(t=1))
    client.expect(Pong)


def flood(frontend: Frontend, duration_s: float) -> int:
    """Connects and leaves again as often as it can; how often it got in."""
    end_s, num_connected = time.monotonic() + duration_s, 0
    while time.monotonic() < end_s:
        with contextlib.suppress(TimeoutError, ConnectionError):
            connect_raw(frontend.sockets.data.address, ATTACKER, timeout_s=0.05).close()
            num_connected += 1
        time.sleep(0.001)  # the gate's thread is in this process
    return num_connected


def test_an_address_that_connects_too_often_is_let_in_later(small: Frontend) -> None:
    limits = small.gate.limits
    good = small.welcome()
    assert flood(small, 0.5) > limits.per_address
    assert flood(small, 1.0) < limits.per_address + 150, "without a limit 700 get in"
    good.send(Ping(t=1))
    good.expect(Pong)
    client = small.connect(address=connect_from(small, "127.0.0.8"))
    client.send(Hello())
    client.expect(Welcome)


def test_connections_that_end_are_forgotten(frontend: Frontend) -> None:
    for _ in range(5):
        client = frontend.welcome()
        with connections(frontend, 10):
            assert wait_until(lambda: len(frontend.gate) >= 11)
        client.close()
        assert wait_until(lambda: len(frontend.gate) == 0)
    assert frontend.gate.num_cut == 0


def test_ipc_connections_are_counted_and_served(make_frontend: MakeFrontend, tmp_path: Path) -> None:
    data, control = f"ipc://{tmp_path}/data", f"ipc://{tmp_path}/control"
    frontend = make_frontend(memory_limit_bytes=16 << 20, data=data, control=control)
    clients = [frontend.welcome() for _ in range(frontend.gate.limits.connections)]
    for client in clients:
        client.send(Ping(t=1))
        client.expect(Pong)
    late = frontend.connect()
    late.send(Hello())
    assert late.receive(0.3) is None
    for client in clients:
        client.close()
    assert wait_until(lambda: len(frontend.gate) < frontend.gate.limits.connections)
    assert wait_until(lambda: is_welcomed(late)), "a hello is lost with a connection that is closed"


def test_heartbeats_and_garbage_are_no_hoard(frontend: Frontend) -> None:
    client = frontend.welcome(HEARTBEAT_IVL=10, HEARTBEAT_TIMEOUT=10_000)
    time.sleep(1)
    client.send(Ping(t=1))
    client.expect(Pong)
    assert frontend.gate.num_cut == 0


def test_when_memory_is_short_those_go_that_hold_most(frontend: Frontend) -> None:
    """Whatever took the memory: a small hoard that is allowed otherwise is closed, a good client is not."""
    client = frontend.welcome()
    with connect_raw(frontend.sockets.data.address) as raw:
        shake_hands(raw)
        raw.sendall(frame(bytes(100_000), MORE))
        assert not is_closed(raw, 0.2)
        frontend.gate._most_memory_bytes = 0.0
        assert is_closed(raw)
    client.send(Ping(t=1))
    client.expect(Pong)


FEW_DESCRIPTORS = """
import os, resource
resource.setrlimit(resource.RLIMIT_NOFILE, (280, 300))
from graphgen.base.descriptors import raise_descriptor_limit
assert raise_descriptor_limit() == 300
from graphgen.ipc.ggp.messages import Stats, StatsRequest
from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.server.frontend import sockets
from tests.fakes import STATS
from tests.frontend.harness import Frontend, demo_tokenizer, wait_until

def num_free():
    return 300 - len(os.listdir("/proc/self/fd"))

def is_any_left():
    try:
        os.close(os.dup(0))
    except OSError:
        return False
    return True

sockets.HANDSHAKE_MS = 600_000  # who connects and says nothing stays
frontend = Frontend(demo_tokenizer())
most = frontend.gate.limits.connections
assert most == (300 - 256) // 2
client = frontend.welcome()
free = num_free()
with frontend.gate._lock:  # it hears of the peers when they have taken all descriptors
    print(frontend.sockets.data.address, flush=True)
    assert wait_until(lambda: not is_any_left(), 20)
assert wait_until(lambda: is_any_left() and num_free() >= free - 2 * most, 20), "connections that nobody watches"
assert len(frontend.gate) <= most
client.send(StatsRequest())
frontend.scheduler.expect(SchedulerStatsRequest)
frontend.scheduler.send(STATS)
client.expect(Stats)
print("served", flush=True)
assert wait_until(lambda: len(frontend.gate) == 1, 20)
frontend.welcome()
frontend.close()
print("open again", flush=True)
"""


def test_more_connections_than_descriptors_end_nothing() -> None:
    """A server with few of them; the peers are in this process."""
    child = subprocess.Popen(
        [sys.executable, "-P", "-c", FEW_DESCRIPTORS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    with child, contextlib.ExitStack() as stack:
        stack.callback(child.kill)
        assert child.stdout is not None
        with contextlib.ExitStack() as peers:
            if address := child.stdout.readline().strip():
                for number in range(400):
                    peer = peers.enter_context(socket.socket())
                    peer.setblocking(False)
                    peer.bind((f"127.0.1.{number % 8 + 1}", 0))
                    peer.connect_ex(tcp_parts(address))
            served = child.stdout.readline()
        said, errors = child.communicate(timeout=60)
    assert (served, said) == ("served\n", "open again\n"), errors


def test_few_descriptors_mean_few_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda _: (512, 512))
    assert connection_limits(1 << 30, frame_bytes_limit(1024), 1024).connections == (512 - 256) // 2


@pytest.mark.parametrize("positions", [1024, 8192, 131_072, 262_144])
def test_connections_times_bytes_fit_half_of_the_limit(positions: int) -> None:
    limit = 1 << 30
    limits = connection_limits(limit, frame_bytes_limit(positions), positions)
    assert limits.connections * (limits.held_bytes + limits.unsent_bytes + 10 * positions) <= limit // 2
    assert limits.connections >= 24
    assert limits.per_address < limits.connections


def test_a_limit_without_room_for_connections_is_refused_with_the_one_that_has() -> None:
    with pytest.raises(ConfigError, match="--memory-limit-mib") as refused:
        connection_limits(8 << 20, frame_bytes_limit(131_072), 131_072)
    needed = int(str(refused.value).partition("--memory-limit-mib ")[2].split()[0])
    assert connection_limits(needed << 20, frame_bytes_limit(131_072), 131_072).connections >= 4
