"""`python -m graphgen.worker FOLDER PARENT_PID NAME OWNER_PID [behind-another]`, started by the scheduler.

Owns the order of the first second: what needs no interpreter begins before torch is imported. A standby comes here
too, and waits for its turn when it has imported what there is to import.
"""

import faulthandler
import functools
import gc
import logging
import signal
import sys
from pathlib import Path

from graphgen.base.logs import log_to_stderr
from graphgen.launch.processes import end_with_parent, rank_of
from graphgen.worker.ahead import KernelsAhead, has_driver
from graphgen.worker.background import Background, open_context, share_interpreter_fairly
from graphgen.worker.turn import Turn, stand_by


def main(folder: Path, parent_pid: int, name: str, owner_pid: int, behind_another: bool) -> None:
    """folder: of this epoch, within the engine's. name: of this rank. owner_pid: the process whose engine it is.

    behind_another: a worker serves meanwhile, for which the kernels were compiled: nothing looks for them again, which
    would ask the driver beside its steps.
    """
    end_with_parent(parent_pid, folder.parent, owner_pid)
    log_to_stderr(name, logging.WARNING)
    faulthandler.enable()  # a start that ends by a signal says where
    # The first thing: no thread of ours calls a driver yet.
    kernels = KernelsAhead.of(folder, rank_of(name)) if has_driver() and not behind_another else None
    faulthandler.register(signal.SIGUSR1)  # the scheduler asks where a step hangs
    # Imports and tracing make millions of objects that stay. To collect among them takes a quarter of their time.
    gc.disable()
    share_interpreter_fairly()
    turn = Turn(sys.stdin.fileno())
    context = Background("context", functools.partial(open_context, folder, rank_of(name), turn.wait))
    from graphgen.worker.process import run  # imports torch

    imports = stand_by(folder, name, turn)
    run(folder, name, imports, context, kernels)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), len(sys.argv) > 5)
