"""`python -m graphgen.worker FOLDER PARENT_PID`, started by the Engine.

Owns the order of the first second: what needs no interpreter begins before torch is imported.
"""

import functools
import gc
import sys
from pathlib import Path

from graphgen.launch.processes import end_with_parent
from graphgen.worker.background import Background, open_context, share_interpreter_fairly


def main(folder: Path, parent_pid: int) -> None:
    end_with_parent(parent_pid, folder)
    # Imports and tracing make millions of objects that stay. To collect among them takes a quarter of their time.
    gc.disable()
    share_interpreter_fairly()
    context = Background("context", functools.partial(open_context, folder))
    from graphgen.worker.process import run  # imports torch

    run(folder, context)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
