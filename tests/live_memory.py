"""What a process holds that is alive: exact to single objects, where its resident memory moves by megabytes.

Python's small objects lie in blocks of their own allocator, everything else in malloc's. Neither counts what is free
again, so a leak shows after few requests, and other load on the machine changes nothing.
"""

import ctypes
import gc
import sys
from typing import NamedTuple


class _MallInfo(ctypes.Structure):
    """`struct mallinfo2` of glibc."""

    _fields_ = (
        *((name, ctypes.c_size_t) for name in ("arena", "ordblks", "smblks", "hblks", "hblkhd")),
        *((name, ctypes.c_size_t) for name in ("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")),
    )


_LIBC = ctypes.CDLL(None)
_LIBC.mallinfo2.restype = _MallInfo


class LiveMemory(NamedTuple):
    """Of one process at a moment, or the difference of two."""

    blocks: int  # objects of at most 512 bytes, or parts of them
    num_bytes: int  # of all others

    @classmethod
    def now(cls) -> "LiveMemory":
        """Of this process, without what the collector would free, and without names that Python's cache of attributes
        holds: up to 4096 strings that were looked up once, as pyzmq does with those of options."""
        gc.collect()
        sys._clear_type_cache()
        info = _LIBC.mallinfo2()
        return cls(sys.getallocatedblocks(), info.uordblks + info.hblkhd)

    def since(self, before: "LiveMemory") -> "LiveMemory":
        return LiveMemory(self.blocks - before.blocks, self.num_bytes - before.num_bytes)
