"""The memory limit of the frontend process, and what follows from it for each connection.

What a peer can make this process hold must not take memory from the scheduler and the worker. The bounds hold by
arithmetic: as many connections as their bytes fit, and prompts and outputs by the limits of requests. The kernel's
limit is behind that, for what was not thought of: libzmq and the tokenizer end the process when it strikes.
"""

import ctypes
import os
import resource
from typing import NamedTuple

from graphgen.ipc.errors import ConfigError

RECEIVE_QUEUE_MESSAGES = 2
"""Of one connection. libzmq has one more at hand; the rest waits in the kernel and at the peer. With 1, libzmq 4.3.5
never delivers what comes over a connection with CURVE."""
SOCKET_BUFFER_BYTES = 128 << 10
"""Of a connection in the kernel, each way; Linux takes twice as much."""
UNSENT_BYTES = 256 << 10
"""What a connection may have to read before it gets more. Beyond that a request's tokens are joined."""
MOST_CONNECTIONS = 1024
FEWEST_CONNECTIONS = 4
"""Below that no two clients have room for both their sockets."""
SPARE_DESCRIPTORS = 256
"""For all else than connections."""
_BYTES_PER_OUTPUT_TOKEN = 10
"""Its id and its text, in the largest message to a client: a whole output, or the ids of a prompt."""
_MMAP_THRESHOLD, _ARENA_MAX = -3, -8
"""Parameters of glibc's mallopt."""


class ConnectionLimits(NamedTuple):
    """What connections may cost. Made by `connection_limits`."""

    connections: int
    per_address: int
    """Of them, from one address: others always find room."""
    held_bytes: int
    """Received and not yet taken by the loop, of one connection: three of the largest messages."""
    unsent_bytes: int
    """Handed to libzmq and not yet acknowledged by the peer, of one connection, before it gets more."""
    memory_bytes: int
    """Beyond what the process has when it begins to serve: from there on the connections that hold most are closed."""


def connection_limits(memory_limit_bytes: int, frame_bytes: int, max_model_len: int) -> ConnectionLimits:
    """As many connections as half of the memory limit and the descriptors allow. Raises ConfigError if that is next to
    none."""
    held_bytes = (RECEIVE_QUEUE_MESSAGES + 1) * frame_bytes + 2 * SOCKET_BUFFER_BYTES
    connection_bytes = held_bytes + UNSENT_BYTES + _BYTES_PER_OUTPUT_TOKEN * max_model_len
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    connections = min(
        MOST_CONNECTIONS,
        memory_limit_bytes // 2 // connection_bytes,
        (descriptors - SPARE_DESCRIPTORS) // 2,  # one is libzmq's, one the gate's
    )
    if connections < FEWEST_CONNECTIONS:
        needed = -(-2 * FEWEST_CONNECTIONS * connection_bytes >> 20)
        raise ConfigError(
            f"a memory limit of {memory_limit_bytes >> 20} MiB and {descriptors} descriptors have room for"
            f" {max(0, connections)} connections of {connection_bytes >> 10} KiB, at least {FEWEST_CONNECTIONS} are"
            f" needed: give --memory-limit-mib {needed} or more, and `ulimit -n`"
            f" {SPARE_DESCRIPTORS + 2 * FEWEST_CONNECTIONS} or more"
        )
    return ConnectionLimits(
        connections,
        per_address=max(2, connections * 3 // 4),
        held_bytes=held_bytes,
        unsent_bytes=UNSENT_BYTES,
        memory_bytes=memory_limit_bytes * 3 // 4,
    )


def keep_heap_small() -> None:
    """Lets large blocks go back to the system when they are freed, and all threads share two heaps: what the process
    has is then what it uses. Where the C library is not glibc it does nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 128 << 10)  # a number that is set is not raised by itself any more
        mallopt(_ARENA_MAX, 2)


def give_back_memory() -> None:
    """Returns freed memory of the heaps to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class ResidentMemory:
    """Memory of this process that is in use. Its file stays open: asked again, it needs no descriptor."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def num_bytes(self) -> int:
        return int(os.pread(self._statm, 128, 0).split()[1]) * self._page_bytes
