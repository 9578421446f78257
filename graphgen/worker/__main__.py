"""`python -m graphgen.worker FOLDER PARENT_PID`, started by the Engine."""

import sys
from pathlib import Path

from graphgen.worker.process import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
