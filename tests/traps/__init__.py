"""Steps and token ids that harm the worker which computes them: for tests of what an engine does then.

Nothing of this is in the shipped code. `hook/sitecustomize.py` is imported by every Python process that has its folder
on the import path. In a worker it wraps `ModelRunner.launch`, see `tests.traps.in_worker`; in a scheduler it may
shorten what counts as a hang and name another module as the worker's, see `tests.traps.in_scheduler`. In the processes
of a server it lets a test count objects, see `tests.traps.counting`.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

FOLDER_VARIABLE = "GRAPHGEN_TEST_TRAPS"
HUNG_VARIABLE = "GRAPHGEN_TEST_HUNG_S"
WORKER_VARIABLE = "GRAPHGEN_TEST_WORKER"
NEXT_STEP, SPRUNG = "next-step", "sprung"
"""Files in the folder, beside those that are named like token ids."""
HOOK = Path(__file__).resolve().parent / "hook"
Harm = Literal["exit", "raise", "raise later", "kill", "hang", "illegal address", "spin"]
"""exit: exit code 3; raise: an exception in `launch`; raise later: one when its tokens are fetched; kill: a signal;
hang: `launch` does not return. On a GPU alone, before the step's graph: illegal address: a kernel that writes to one;
spin: a kernel that does not end."""
Rows = Literal["chunks", "decodes"]
"""What springs a trap: a step that computes the token in a chunk, or one with a decode row of a request that has the
token in its prompt."""


class Traps:
    """Which token ids do what, or the next step. They may be set while the engine runs."""

    def __init__(self, folder: Path) -> None:
        """folder: an empty one of this test's own."""
        self._folder = folder

    @contextlib.contextmanager
    def in_environment(self, hung_s: float | None = None) -> Iterator[None]:
        """Engines and servers that are started meanwhile have workers with these traps.

        hung_s: seconds after which a worker that answers nothing counts as hung; None: as many as always.
        """
        before = {name: os.environ.get(name) for name in ("PYTHONPATH", FOLDER_VARIABLE, HUNG_VARIABLE)}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOOK), before["PYTHONPATH"])))
        os.environ[FOLDER_VARIABLE] = str(self._folder)
        if hung_s is not None:
            os.environ[HUNG_VARIABLE] = str(hung_s)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def set(self, token_id: int, harm: Harm, once: bool = False, rows: Rows = "chunks") -> None:
        """once: the trap is gone when it has been sprung, so that the next worker computes the token."""
        self._write(str(token_id), f"{rows}\n{harm}\n{'once' if once else 'always'}")

    def remove(self, token_id: int) -> None:
        (self._folder / str(token_id)).unlink()

    def set_for_next_step(self, harm: Harm) -> None:
        """The next step that a worker launches springs it, whatever it computes; `sprung_s` tells when."""
        (self._folder / SPRUNG).unlink(missing_ok=True)
        self._write(NEXT_STEP, harm)

    @property
    def sprung_s(self) -> float | None:
        """When a step sprang the trap that was set for it, as time.time(); None: none has yet."""
        path = self._folder / SPRUNG
        return float(path.read_text()) if path.exists() else None

    def _write(self, name: str, content: str) -> None:
        write_at_once(self._folder / name, content)


def write_at_once(path: Path, content: str) -> None:
    """A reader sees all of it or nothing."""
    partial = path.with_suffix(".partial")
    partial.write_text(content)
    partial.rename(path)
