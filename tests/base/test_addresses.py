"""Binding an ipc address harms nobody: not a server that lives there, not a file, not another that starts at once."""

import os
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from graphgen.base.addresses import (
    MAX_PATH_BYTES,
    bind,
    check_address,
    check_connectable,
    control_address,
    remove_dead,
)
from graphgen.ipc.errors import ConfigError
from graphgen.remote.address import ServerAddress
from graphgen.server.options import ServeOptions
from tests import ROOT

Context = zmq.Context[zmq.Socket[bytes]]


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def path() -> Iterator[Path]:
    """Short: pytest's own folders are too long for a socket's path."""
    with tempfile.TemporaryDirectory(prefix="gg") as folder:
        yield Path(folder) / "g.sock"


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("127.0.0.1:7777", "its scheme is missing: write tcp://127.0.0.1:7777 "),
        ("localhost:7777", "write tcp://localhost:7777 "),
        ("/run/graphgen.sock", "its scheme is missing: write ipc:///run/graphgen.sock "),
        ("graphgen.sock", "write ipc://graphgen.sock "),
        ("http://127.0.0.1:80", "has the scheme 'http', supported are tcp and ipc"),
        ("tcp://127.0.0.1", "has no port"),
        ("tcp://127.0.0.1:99999", "has no port from 0 to 65535"),
        ("tcp://:7777", "has no port"),
        ("", "its scheme is missing"),
        ("tcp://127.0.0.1:²", "has no port"),
        ("tcp://127.0.0.1:" + "7" * 5000, "has no port"),
        ("ipc:///tmp/\udcff", "is no text in UTF-8"),
    ],
)
def test_what_is_no_address_is_told_as_what_it_is(address: str, message: str, context: Context) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_address(address)
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServeOptions(data=address)
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerAddress(address=address).connect(context)


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:*", "tcp://[::1]:0", "tcp://*:7777", "ipc://x", "ipc://@x", "ipc://*"]
)
def test_what_libzmq_takes_is_an_address(address: str) -> None:
    check_address(address)


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("tcp://*:7777", "tcp://*:7777 is an address to bind, and none to connect to: name host and port"),
        ("tcp://127.0.0.1:*", "is an address to bind"),
        ("tcp://nö-such-höst:1", "'nö-such-höst' is no host: write tcp://HOST:PORT"),
        ("tcp://host d:1", "'host d' is no host"),
        ("tcp://user@host:1", "'user@host' is no host"),
        ("tcp://host/x:1", "'host/x' is no host"),
        ("tcp://host,b:1", "'host,b' is no host"),
        ("tcp://.host:1", "'.host' is no host"),
        ("tcp://a b:0;127.0.0.1:6", "'a b:0;127.0.0.1' is no host"),
        ("ipc://" + "x" * (MAX_PATH_BYTES + 1), "has 108 bytes, a socket's has at most 107"),
        ("ipc://", "has no path to connect to"),
        ("ipc://@", "has no path to connect to"),
    ],
)
def test_what_libzmq_connects_to_nothing_at_is_refused_by_name(address: str, message: str, context: Context) -> None:
    with pytest.raises(zmq.ZMQError):
        context.socket(zmq.DEALER).connect(address)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_connectable(address)
    with pytest.raises(ConfigError, match=re.escape(message)):
        ServerAddress(address=address).connect(context)


@pytest.mark.parametrize("address", ["tcp://127.0.0.1:0", "ipc://*", "tcp://127.0.0.1:5;*:6"])
def test_nothing_ever_answers_at_an_address_to_bind(address: str) -> None:
    with pytest.raises(ConfigError, match="to connect to"):
        check_connectable(address)


@pytest.mark.parametrize(
    "address",
    [
        "tcp://host-1.x_y:7777",
        "tcp://[::1]:7777",
        "tcp://[fe80::1%eth0]:7777",
        "tcp://127.0.0.1:0;127.0.0.1:7777",
        "ipc://" + "x" * MAX_PATH_BYTES,
        "ipc://@x",
        "ipc:///tmp/ö b",
    ],
)
def test_what_libzmq_connects_to_may_be_named(address: str, context: Context) -> None:
    check_connectable(address)
    context.socket(zmq.DEALER).connect(address)


def reaches(context: Context, address: str, listener: "zmq.Socket[bytes]") -> bool:
    """Whether a message to the address comes out at the listener."""
    sender = context.socket(zmq.DEALER)
    sender.set(zmq.LINGER, 0)
    sender.connect(address)
    sender.send(b"hello")
    arrived = bool(listener.poll(1000))
    if arrived:
        listener.recv_multipart()
    sender.close()
    return arrived


def test_a_second_server_is_refused_and_the_first_still_hears(context: Context, path: Path) -> None:
    first, second = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    file = bind(first, f"ipc://{path}")
    assert file is not None
    with pytest.raises(ConfigError, match="in use by another server"):
        bind(second, f"ipc://{path}")
    remove_dead(f"ipc://{path}")  # nor does a supervisor that cleans up
    assert reaches(context, f"ipc://{path}", first)
    file.remove()
    assert not path.exists()


def test_a_relative_path(context: Context, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    listener = context.socket(zmq.ROUTER)
    bind(listener, "ipc://g.sock")
    assert reaches(context, f"ipc://{path}", listener)


def leave_a_dead_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as dead:
        dead.bind(str(path))


def test_a_dead_socket_is_replaced(context: Context, path: Path) -> None:
    leave_a_dead_socket(path)
    listener = context.socket(zmq.ROUTER)
    bind(listener, f"ipc://{path}")
    assert reaches(context, f"ipc://{path}", listener)


def test_a_dead_socket_is_removed_at_the_end(path: Path) -> None:
    leave_a_dead_socket(path)
    remove_dead(f"ipc://{path}")
    assert not path.exists()


@pytest.mark.parametrize("kind", ["file", "folder", "link", "pipe"])
def test_what_is_no_socket_is_left_alone(context: Context, path: Path, kind: str) -> None:
    match kind:
        case "file":
            path.write_text("precious")
        case "folder":
            path.mkdir()
        case "link":
            path.symlink_to(path.with_name("precious"))
        case _:
            os.mkfifo(path)
    before = path.lstat()
    remove_dead(f"ipc://{path}")
    with pytest.raises(ConfigError, match=f"is a {kind}, which is left alone"):
        bind(context.socket(zmq.ROUTER), f"ipc://{path}")
    assert path.lstat() == before


def test_a_file_that_took_the_place_is_not_removed(context: Context, path: Path) -> None:
    file = bind(context.socket(zmq.ROUTER), f"ipc://{path}")
    assert file is not None
    path.unlink()
    path.write_text("precious")
    file.remove()
    assert path.read_text() == "precious"


def test_the_longest_path_and_one_byte_more(context: Context, path: Path) -> None:
    longest = str(path.parent / "x") + "x" * (MAX_PATH_BYTES - len(os.fsencode(path.parent / "x")))
    listener = context.socket(zmq.ROUTER)
    bind(listener, f"ipc://{longest}")
    assert reaches(context, f"ipc://{longest}", listener)
    for address in (f"ipc://{longest}x", "ipc://@" + "x" * MAX_PATH_BYTES):
        with pytest.raises(ConfigError, match="has 108 bytes, a socket's has at most 107"):
            bind(context.socket(zmq.ROUTER), address)


def test_a_folder_that_is_not_there(context: Context, path: Path) -> None:
    with pytest.raises(ConfigError, match=f"there is no folder {path.parent / 'none'}"):
        bind(context.socket(zmq.ROUTER), f"ipc://{path.parent}/none/g.sock")


def test_abstract_names_have_no_file(context: Context, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    address = f"ipc://@{path}"
    first, second = context.socket(zmq.ROUTER), context.socket(zmq.ROUTER)
    assert bind(first, address) is None
    with pytest.raises(zmq.ZMQError, match="in use"):
        bind(second, address)
    remove_dead(address)
    assert reaches(context, address, first)
    assert not list(path.parent.iterdir())


RACER = """
import sys, zmq
from graphgen.base.addresses import bind
from graphgen.ipc.errors import ConfigError
listener = zmq.Context().socket(zmq.ROUTER)
print("at the start", flush=True)
sys.stdin.readline()
try:
    bind(listener, sys.argv[1])
    print("bound", flush=True)
except ConfigError as error:
    print(error, flush=True)
sys.stdin.readline()
"""


def test_of_many_that_find_a_dead_socket_at_once_one_binds(path: Path) -> None:
    """Each would otherwise remove the socket that the quicker one has just made."""
    command = [sys.executable, "-P", "-c", textwrap.dedent(RACER), f"ipc://{path}"]
    racers = [
        subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        for _ in range(6)
    ]

    def ask_all(word: str | None) -> list[str]:
        for racer in racers if word is not None else ():
            assert racer.stdin is not None
            racer.stdin.write(f"{word}\n")
        return [racer.stdout.readline() for racer in racers if racer.stdout is not None]

    ask_all(None)
    leave_a_dead_socket(path)
    said = ask_all("go")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.connect(str(path))
    for racer in racers:
        racer.communicate("end\n", timeout=10)
    assert said.count("bound\n") == 1
    assert sum("in use by another server" in line for line in said) == len(racers) - 1


def test_the_control_socket_lies_beside_the_data_socket() -> None:
    assert control_address("tcp://127.0.0.1:5755") == "tcp://127.0.0.1:5756"
    assert control_address("tcp://[::1]:5755") == "tcp://[::1]:5756"
    assert control_address("tcp://127.0.0.1:0") == "tcp://127.0.0.1:0"
    assert control_address("ipc:///run/g") == "ipc:///run/g-control"
