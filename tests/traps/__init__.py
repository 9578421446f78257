"""Token ids that harm the worker which computes them: for tests of what an engine does then.

Nothing of this is in the shipped code. `hook/sitecustomize.py` is imported by every Python process that has its folder
on the import path; in a worker it wraps `ModelRunner.launch`, see `tests.traps.in_worker`. In the processes of a server
it lets a test count objects, see `tests.traps.counting`.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

FOLDER_VARIABLE = "GRAPHGEN_TEST_TRAPS"
HOOK = Path(__file__).resolve().parent / "hook"
Harm = Literal["exit", "raise", "raise later", "kill", "hang"]
"""exit: exit code 3; raise: an exception in `launch`; raise later: one when its tokens are fetched; kill: a signal;
hang: `launch` does not return."""
Rows = Literal["chunks", "decodes"]
"""What springs a trap: a step that computes the token in a chunk, or one with a decode row of a request that has the
token in its prompt."""


class Traps:
    """Which token ids do what. They may be set while the engine runs."""

    def __init__(self, folder: Path) -> None:
        """folder: an empty one of this test's own."""
        self._folder = folder

    @contextlib.contextmanager
    def in_environment(self) -> Iterator[None]:
        """Engines and servers that are started meanwhile have workers with these traps."""
        before = {name: os.environ.get(name) for name in ("PYTHONPATH", FOLDER_VARIABLE)}
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (str(HOOK), before["PYTHONPATH"])))
        os.environ[FOLDER_VARIABLE] = str(self._folder)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value

    def set(self, token_id: int, harm: Harm, once: bool = False, rows: Rows = "chunks") -> None:
        """once: the trap is gone when it has been sprung, so that the next worker computes the token."""
        partial = self._folder / "partial"
        partial.write_text(f"{rows}\n{harm}\n{'once' if once else 'always'}")
        partial.rename(self._folder / str(token_id))
