"""`python -m graphgen.scheduler FOLDER PARENT_PID`, started by the Engine."""

import sys
from pathlib import Path

from graphgen.scheduler.process import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
