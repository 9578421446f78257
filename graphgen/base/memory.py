"""The kernel's limit on what a process may use. Called by processes of a server that strangers can reach."""

import resource
from pathlib import Path


def limit_memory(limit_bytes: int) -> None:
    """Lets the process have `limit_bytes` of writable memory beyond what it has now.

    RLIMIT_DATA counts the heap and private writable mappings, in use or not. RLIMIT_AS would count the address space
    as well, of which each thread's allocator reserves 64 MiB without using it. An allocation beyond the limit fails:
    in Python with MemoryError, which ends one request; in libzmq and in the tokenizer it ends the process, which is
    started anew.
    """
    allowed = data_bytes() + limit_bytes
    resource.setrlimit(resource.RLIMIT_DATA, (allowed, allowed))


def data_bytes() -> int:
    """Writable private memory of this process, as the kernel counts it against RLIMIT_DATA."""
    status = Path("/proc/self/status").read_text()
    found = next(line for line in status.splitlines() if line.startswith("VmData:"))
    return int(found.split()[1]) * 1024
