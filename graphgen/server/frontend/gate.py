"""Who may connect, and how much one connection may make libzmq hold for it.

Owns what is known of each connection of the public sockets, in a thread of its own, since what has to be noticed within
milliseconds must not wait for the loop. libzmq counts messages, where memory is bytes, and puts no end to a message of
many frames; the kernel knows what came over each connection, and the loop what it took of that. The difference is held,
and a connection that holds more than honest messages can is closed.

Addresses that connect too often or too much are shut out in the kernel, by a filter on the listening socket: their
attempts cost nothing, wait, and succeed when there is room again.
"""

import contextlib
import fcntl
import ipaddress
import logging
import math
import os
import select
import socket
import struct
import termios
import threading
import time
from collections.abc import Iterable, Iterator

import zmq

from graphgen.server.frontend.accept_filter import MOST_ADDRESSES, set_filter
from graphgen.server.frontend.memory import ConnectionLimits, ResidentMemory, give_back_memory
from graphgen.server.frontend.turns import RateLimit

logger = logging.getLogger("graphgen.server.frontend")

Context = zmq.Context[zmq.Socket[bytes]]

SWEEP_S = 0.01
SWEEP_SHARE = 30.0
"""Between two sweeps so many times what one takes: a thirtieth of a core at most."""
CONNECTS_PER_S = 50.0
"""Of one address, after a burst of as many as it may have at a time."""
UNKNOWN = "unknown"
"""Where connections come from that were closed before they could be asked. Too many of them shut everyone out."""
CREDIT_BYTES_PER_S = 64
"""Of ZeroMQ's own heartbeats, which come over a connection and are never taken by the loop."""
HANDSHAKE_BYTES = 4096
PRESSURE_BYTES = 16 << 10
"""What a connection must hold to be closed when memory is short: less is no hoard."""
_EVENTS = zmq.EVENT_LISTENING | zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED
_TCP_INFO_BYTES = 136
_ACKED_AND_RECEIVED = struct.Struct("=QQ")
_RESET = struct.pack("ii", 1, 0)
"""SO_LINGER for a close that ends the connection at both ends."""
_ACKED_AT = 120
"""In Linux's struct tcp_info: tcpi_bytes_acked, tcpi_bytes_received."""


class Connection:
    """One accepted connection, from its start to its end; `taken` and the `sent` ones are the loop's.

    It has a descriptor of its own, so that it never touches another connection that got the number of a closed one.
    """

    def __init__(self, accepted: socket.socket, limits: ConnectionLimits, now_s: float) -> None:
        self.address = peer_address(accepted)
        self._socket = accepted
        self._limits = limits
        self._accepted_s = now_s
        self._taken_bytes = 0
        self._sent_bytes = 0
        self._acked_bytes = 0
        self.is_cut = False
        self.is_gone = False

    def took(self, num_bytes: int) -> None:
        """The loop has taken so much, counted as it is on the wire."""
        self._taken_bytes += num_bytes

    def sent(self, num_bytes: int) -> None:
        """The loop has handed so much to libzmq."""
        self._sent_bytes += num_bytes

    @property
    def is_full(self) -> bool:
        """Whether the peer has so much to read that it gets no more now."""
        if self._sent_bytes - self._acked_bytes <= self._limits.unsent_bytes:
            return False
        self._acked_bytes = self._read()[0]
        self._sent_bytes = max(self._sent_bytes, self._acked_bytes)  # heartbeats were not counted
        return self._sent_bytes - self._acked_bytes > self._limits.unsent_bytes

    def held_bytes(self, now_s: float) -> int:
        """What libzmq holds of what came, on the safe side; 0 where the kernel cannot tell (ipc)."""
        received = self._read()[1]
        credit = HANDSHAKE_BYTES + CREDIT_BYTES_PER_S * (now_s - self._accepted_s)
        held = received - self._taken_bytes - int(credit)
        if held <= self._limits.held_bytes:
            return max(0, held)
        return held - self._waiting_in_kernel()

    def cut(self) -> None:
        """libzmq finds it closed, and the peer is told at once, also one that waits to send."""
        self.is_cut = True
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.is_gone = True
        self._socket.close()

    def _read(self) -> tuple[int, int]:
        """Bytes that the peer has acknowledged, and that came from it."""
        try:
            info = self._socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCP_INFO_BYTES)
        except OSError:  # a socket of the ipc kind, or a closed one
            return self._sent_bytes, 0
        acked, received = _ACKED_AND_RECEIVED.unpack_from(info, _ACKED_AT)
        return acked, received

    def _waiting_in_kernel(self) -> int:
        try:
            return int(struct.unpack("i", fcntl.ioctl(self._socket, termios.FIONREAD, bytes(4)))[0])
        except OSError:
            return 0


class _Address:
    """What one address has open, and how often it connects."""

    def __init__(self, burst: int, now_s: float) -> None:
        self.num_open = 0
        self._rate = RateLimit(CONNECTS_PER_S, burst, now_s)
        self._burst = burst

    def connected(self, now_s: float) -> None:
        self.num_open += 1
        self._rate.permits(now_s)
        self._rate.spend(1)

    def may_connect(self, now_s: float) -> bool:
        return self.num_open < self._burst and self._rate.permits(now_s) >= 1

    def is_forgotten(self, now_s: float) -> bool:
        return self.num_open == 0 and self._rate.permits(now_s) >= self._burst


class _SpareDescriptor:
    """For one connection at a time when no other is left. It is never free, so no other thread can get its number."""

    def __init__(self) -> None:
        self._own, self._nothing = socket.socketpair()

    @contextlib.contextmanager
    def lent_to(self, descriptor: int) -> Iterator[socket.socket]:
        """The connection with this descriptor. Raises OSError when there is none."""
        number = self._own.fileno()
        os.dup2(descriptor, number, inheritable=False)
        try:
            lent = socket.socket(fileno=number)
            try:
                yield lent
            finally:
                lent.detach()
        finally:
            os.dup2(self._nothing.fileno(), number, inheritable=False)

    def close(self) -> None:
        self._own.close()
        self._nothing.close()


class Gate:
    """All connections of the public sockets."""

    def __init__(self, context: Context, limits: ConnectionLimits) -> None:
        self._context = context
        self.limits = limits
        self._monitors: list[zmq.Socket[bytes]] = []
        self._listening: list[socket.socket] = []
        self._connections: dict[int, Connection] = {}  # by libzmq's descriptor
        self._addresses: dict[str, _Address] = {}
        self._shut_out: frozenset[str] | None = frozenset()  # None: everyone
        self._spare = _SpareDescriptor()
        self._memory = ResidentMemory()
        self._most_memory_bytes = math.inf  # until the server has loaded what it needs
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gate", daemon=True)
        self.num_cut = 0

    def watch(self, public: "zmq.Socket[bytes]", name: str) -> None:
        """Sees every connection of a socket that is not bound yet. Before `start`."""
        address = f"inproc://gate-{name}-{id(self)}"
        public.monitor(address, _EVENTS)
        monitor = self._context.socket(zmq.PAIR)
        monitor.set_hwm(0)  # libzmq would wait for this thread
        monitor.set(zmq.LINGER, 0)
        monitor.connect(address)
        self._monitors.append(monitor)

    def start(self) -> None:
        self._thread.start()

    def limit_memory(self) -> None:
        """From now on closes those that hold most when the process has the limits' memory more than it has now."""
        self._most_memory_bytes = self._memory.num_bytes() + self.limits.memory_bytes

    def close(self) -> None:
        """After the sockets that it watches were closed."""
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        with self._lock:
            for monitor in self._monitors:
                monitor.close()
            for connection in self._connections.values():
                connection.close()
            for listening in self._listening:
                listening.close()
            self._spare.close()

    def __len__(self) -> int:
        return len(self._connections)

    def find(self, descriptor: int) -> Connection | None:
        """The connection with this descriptor of libzmq's."""
        return self._connections.get(descriptor) or self.find_new(descriptor)

    def find_new(self, descriptor: int) -> Connection | None:
        """The same, of a connection that may be new: older ones may have had the number."""
        with self._lock:
            self._take_events()
        return self._connections.get(descriptor)

    def _run(self) -> None:
        poller = select.poll()  # of the descriptors: the loop may use the ZeroMQ sockets meanwhile
        for monitor in self._monitors:
            poller.register(int(monitor.get(zmq.FD)), select.POLLIN)
        sweep_s = 0.0
        while not self._stop.is_set():
            poller.poll(max(0.0, sweep_s - time.monotonic()) * 1000)
            try:
                with self._lock:
                    self._take_events()
                    begun_s = time.monotonic()
                    if begun_s >= sweep_s:
                        self._sweep(begun_s)
                        took_s = time.monotonic() - begun_s
                        sweep_s = begun_s + max(SWEEP_S, SWEEP_SHARE * took_s)
            except Exception:
                sweep_s = time.monotonic() + SWEEP_S
                logger.exception("looking after the connections failed; it goes on")

    # --- with the lock -----------------------------------------------------------------------------------------

    def _take_events(self) -> None:
        for monitor in self._monitors:
            while True:
                try:
                    event, value = struct.unpack("=HI", monitor.recv(zmq.NOBLOCK))
                except zmq.Again:
                    break
                monitor.recv()  # the endpoint
                self._take_event(event, value, time.monotonic())

    def _take_event(self, event: int, descriptor: int, now_s: float) -> None:
        match event:
            case zmq.EVENT_LISTENING:
                listening = socket.socket(fileno=os.dup(descriptor))
                if listening.family == socket.AF_UNIX:  # the file's mode says who may connect
                    listening.close()
                else:
                    self._listening.append(listening)
            case zmq.EVENT_ACCEPTED:
                self._drop(descriptor)
                self._accept(descriptor, now_s)
            case _:
                self._drop(descriptor)

    def _accept(self, descriptor: int, now_s: float) -> None:
        try:
            accepted = socket.socket(fileno=os.dup(descriptor))
        except OSError:  # closed already, or no descriptor is left to watch it with
            self._accept_unwatched(descriptor, now_s)
            self._choose_filter(now_s)
            return
        connection = Connection(accepted, self.limits, now_s)
        self._connections[descriptor] = connection
        is_one_too_many = len(self._connections) > self.limits.connections
        if connection.address:
            address = self._address(connection.address, now_s)
            address.connected(now_s)
            is_one_too_many |= address.num_open > self.limits.per_address
        if is_one_too_many:
            self._cut(connection, "there are too many")
        self._choose_filter(now_s)

    def _accept_unwatched(self, descriptor: int, now_s: float) -> None:
        """Cuts a connection that is open, and counts it against its address."""
        name = UNKNOWN  # closed: nobody can say whose it was
        with contextlib.suppress(OSError), self._spare.lent_to(descriptor) as accepted:
            connection = Connection(accepted, self.limits, now_s)
            name = connection.address
            self._cut(connection, "no descriptor is left")
        if name:
            address = self._address(name, now_s)
            address.connected(now_s)
            address.num_open -= 1

    def _address(self, name: str, now_s: float) -> _Address:
        return self._addresses.setdefault(name, _Address(self.limits.per_address, now_s))

    def _drop(self, descriptor: int) -> None:
        connection = self._connections.pop(descriptor, None)
        if connection is None:
            return
        if connection.address:
            self._addresses[connection.address].num_open -= 1
        connection.close()

    def _sweep(self, now_s: float) -> None:
        held = {connection: connection.held_bytes(now_s) for connection in self._connections.values()}
        for connection, num_bytes in held.items():
            if num_bytes > self.limits.held_bytes:
                self._cut(connection, f"it holds {num_bytes} bytes of messages that do not end")
        if self._memory.num_bytes() > self._most_memory_bytes:
            self._relieve(held)
        for name in [name for name, address in self._addresses.items() if address.is_forgotten(now_s)]:
            del self._addresses[name]
        self._choose_filter(now_s)

    def _relieve(self, held: dict[Connection, int]) -> None:
        """Memory is short: those go that hold most."""
        most = max(held.values(), default=0)
        if most > PRESSURE_BYTES:
            for connection, num_bytes in held.items():
                if num_bytes > most // 2:
                    self._cut(connection, f"memory is short and it holds {num_bytes} bytes")
        give_back_memory()

    def _cut(self, connection: Connection, why: str) -> None:
        if connection.is_cut:
            return
        self.num_cut += 1
        logger.warning("connection of %s closed: %s", connection.address or "ipc", why)
        connection.cut()

    def _choose_filter(self, now_s: float) -> None:
        """Shuts out whom there is no room for."""
        over = frozenset(name for name, address in self._addresses.items() if not address.may_connect(now_s))
        is_full = len(self._connections) >= self.limits.connections
        self._set_filter(None if is_full or UNKNOWN in over else over)

    def _set_filter(self, shut_out: Iterable[str] | None) -> None:
        shut_out = None if shut_out is None else frozenset(list(shut_out)[:MOST_ADDRESSES])
        if shut_out == self._shut_out:
            return
        self._shut_out = shut_out
        for listening in self._listening:
            with contextlib.suppress(OSError):  # a system without filters: they are closed after they connected
                set_filter(listening, shut_out)


def peer_address(connected: socket.socket) -> str:
    """Where a connection comes from, without the port; UNKNOWN of one that is closed; "" for the ipc kind."""
    if connected.family == socket.AF_UNIX:
        return ""
    try:
        peer = connected.getpeername()
    except OSError:
        return UNKNOWN
    address = ipaddress.ip_address(str(peer[0]).partition("%")[0])
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return str(address.ipv4_mapped)
    return str(address)
