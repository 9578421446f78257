"""`python -m graphgen.server.frontend FOLDER PARENT_PID NUMBER`, started by the supervisor."""

import sys
from pathlib import Path

from graphgen.server.frontend.process import main

if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
