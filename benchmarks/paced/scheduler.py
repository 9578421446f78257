"""A real scheduler, which starts a worker of `benchmarks.paced.worker`. Run as a module:

python -m benchmarks.paced.scheduler FOLDER PARENT_PID
"""

import sys
from pathlib import Path

from graphgen.scheduler import worker_processes
from graphgen.scheduler.__main__ import start

if __name__ == "__main__":
    worker_processes.WORKER_MODULE = "benchmarks.paced.worker"
    start(Path(sys.argv[1]), int(sys.argv[2]), num_ranks=1, num_senders=1)
