"""The memory limit of the frontend process.

What a peer can make this process hold must not take memory from the scheduler and the worker. Most of it is bounded
by the limits of requests; what is not is in libzmq, which collects the frames of a message before anyone sees it.
"""

import os
import resource
from pathlib import Path


def limit_memory(limit_bytes: int) -> None:
    """Lets the process have `limit_bytes` of writable memory beyond what it has now.

    RLIMIT_DATA counts the heap and private writable mappings, in use or not. RLIMIT_AS would count the address space
    as well, of which each thread's allocator reserves 64 MiB without using it. An allocation beyond the limit fails:
    in Python with MemoryError, which ends one request; in libzmq it closes the connection whose frame it was for. Where
    neither can go on, the process ends and is started anew.
    """
    allowed = data_bytes() + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def data_bytes() -> int:
    """Writable private memory of this process, as the kernel counts it against RLIMIT_DATA."""
    status = Path("/proc/self/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith("VmData:"))
    return int(found.split()[1]) * 1024


class ResidentMemory:
    """Memory of this process that is in use. Its file stays open: asked again, it needs no descriptor."""

    def __init__(self) -> None:
        self._statm = os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
        self._page_bytes = os.sysconf("SC_PAGE_SIZE")

    def num_bytes(self) -> int:
        return int(os.pread(self._statm, 128, 0).split()[1]) * self._page_bytes
