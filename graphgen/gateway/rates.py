"""How many requests a minute a key may make, over all gateways of a server.

Owns one small file for each key in the engine's folder, which the gateways share: how many requests are left, and
when that was. A file lock, held for two system calls, keeps them from each other.
"""

import fcntl
import os
import struct
import time
from pathlib import Path

_STATE = struct.Struct("<dd")  # requests left, and the time.monotonic() of it, which all processes of a machine share
MINUTE_S = 60.0


class RateLimits:
    """A key that has rested may make all requests of a minute at once; then they come back evenly."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(mode=0o700, exist_ok=True)
        self._folder = folder

    def take(self, name: str, per_minute: int) -> float:
        """Counts a request of the key: 0, or the seconds after which there is another."""
        descriptor = os.open(self._folder / name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            now_s, known = time.monotonic(), os.pread(descriptor, _STATE.size, 0)
            left, then_s = _STATE.unpack(known) if len(known) == _STATE.size else (float(per_minute), now_s)
            left = min(float(per_minute), left + (now_s - then_s) * per_minute / MINUTE_S)
            wait_s = 0.0 if left >= 1 else (1 - left) * MINUTE_S / per_minute
            os.pwrite(descriptor, _STATE.pack(left if wait_s else left - 1, now_s), 0)
            return wait_s
        finally:
            os.close(descriptor)
