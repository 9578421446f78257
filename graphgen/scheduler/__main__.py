"""`python -m graphgen.scheduler FOLDER PARENT_PID`, started by the Engine.

Owns the order of the first second: the workers, which import torch, are started before anything slow is imported here.
"""

import sys
from pathlib import Path

from graphgen.launch.processes import end_with_parent
from graphgen.scheduler.worker_processes import WorkerProcesses

NUM_RANKS = 1


def start(folder: Path, parent_pid: int) -> None:
    end_with_parent(parent_pid, folder)
    workers = WorkerProcesses(folder, parent_pid, 0, NUM_RANKS)
    workers.begin()
    from graphgen.scheduler.process import main

    main(folder, parent_pid, workers)


if __name__ == "__main__":
    start(Path(sys.argv[1]), int(sys.argv[2]))
