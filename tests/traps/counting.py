"""How many objects of a kind a process of a server holds: asked for by SIGUSR2, answered in a file.

Sees what was made after the process began to serve. Loaded in the processes by the hook, see `tests.traps`.
"""

import collections
import gc
import os
import signal
import time
from pathlib import Path

from tests.traps import FOLDER_VARIABLE

KINDS = ("Request", "RunningRequest", "OpenRequest", "PublicRequest")
ANSWER_S = 10.0


def install() -> None:
    """Called in the first moment of the process."""
    signal.signal(signal.SIGUSR2, lambda *_: _answer())


def _answer() -> None:
    gc.collect()
    found = collections.Counter(type(one).__name__ for one in gc.get_objects())
    partial = _file(Path(os.environ[FOLDER_VARIABLE]), os.getpid(), ".partial")
    partial.write_text("\n".join(f"{kind} {found[kind]}" for kind in KINDS))
    partial.rename(partial.with_suffix(""))


def count_objects(folder: Path, pid: int) -> dict[str, int]:
    """By kind, in the process. folder: of the traps that it was started with. Raises TimeoutError."""
    path = _file(folder, pid, "")
    path.unlink(missing_ok=True)
    os.kill(pid, signal.SIGUSR2)
    deadline_s = time.monotonic() + ANSWER_S
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"process {pid} has not counted its objects within {ANSWER_S:g} s")
        time.sleep(0.01)
    return {kind: int(count) for kind, count in (line.split() for line in path.read_text().splitlines())}


def _file(folder: Path, pid: int, ending: str) -> Path:
    return folder / f"objects-of-{pid}{ending}"
