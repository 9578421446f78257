"""A real scheduler, which starts workers of `benchmarks.paced.worker`.

Run as a module:

    python -m benchmarks.paced.scheduler FOLDER PARENT_PID RANKS SENDERS
"""

import sys
from pathlib import Path

from graphgen.scheduler import worker_processes
from graphgen.scheduler.__main__ import start

if __name__ == "__main__":
    worker_processes.WORKER_MODULE = "benchmarks.paced.worker"
    start(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
