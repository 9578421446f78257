"""A client's end of a data connection that cannot be made leaves nothing behind."""

import threading

import pytest
import zmq

from graphgen import ConfigError
from graphgen.remote import address as remote_address
from graphgen.remote.address import ServerAddress
from graphgen.remote.data_socket import DataSocket

REFUSED, TAKEN = "tcp://*:7777", "tcp://127.0.0.1:7777"


@pytest.mark.parametrize(("address", "raised"), [(REFUSED, ConfigError), (TAKEN, MemoryError)])
def test_a_connection_that_cannot_begin_leaves_no_socket(
    address: str, raised: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that libzmq refuses, whatever `check_connectable` lets pass, and one that fails on its way: a socket that
    stays open keeps the end of the context waiting, and with it whoever ends the link."""
    monkeypatch.setattr(remote_address, "check_connectable", lambda _: None)
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    connect = zmq.Socket.connect

    def fail_at_times(socket: "zmq.Socket[bytes]", to: str) -> None:
        if to == TAKEN:
            raise MemoryError("full")
        connect(socket, to)

    monkeypatch.setattr(zmq.Socket, "connect", fail_at_times)
    with pytest.raises(raised) as kept:  # as a link keeps it, and with its frames what they left open
        DataSocket.connecting(ServerAddress(address=address), context)
    end = threading.Thread(target=context.term, daemon=True)
    end.start()
    end.join(10)
    assert not end.is_alive(), kept
