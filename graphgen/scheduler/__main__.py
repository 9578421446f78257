"""`python -m graphgen.scheduler FOLDER PARENT_PID RANKS SENDERS`, started by the Engine.

Owns the order of the first second: the workers, which import torch, are started before anything slow is imported here.
"""

import sys
from pathlib import Path

from graphgen.launch.processes import end_with_parent
from graphgen.scheduler.worker_processes import WorkerProcesses


def start(folder: Path, parent_pid: int, num_ranks: int, num_senders: int) -> None:
    end_with_parent(parent_pid, folder)
    workers = WorkerProcesses(folder, parent_pid, 0, num_ranks)
    workers.begin()
    from graphgen.scheduler.process import main

    main(folder, parent_pid, workers, num_senders)


if __name__ == "__main__":
    start(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
