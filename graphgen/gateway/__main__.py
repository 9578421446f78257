"""`python -m graphgen.gateway FOLDER PARENT_PID`, started by the supervisor."""

import sys
from pathlib import Path

from graphgen.gateway.process import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
