"""A child of EngineProcesses as tests want it: `python -m tests.launch.child FOLDER PARENT_PID`.

What it does is in the variable CHILD: words. `compiler` starts a process of its own and leaves its id in the folder;
`stubborn` ignores SIGTERM; `watches` ends with its parent; `fails` writes 40 lines and ends with code 3; `ends` ends
with code 0; `floods` writes 24 MiB of lines and a last one; all others wait.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from graphgen.launch.processes import end_with_parent

folder, parent_pid = Path(sys.argv[1]), int(sys.argv[2])
words = os.environ["CHILD"].split()
if "watches" in words:
    end_with_parent(parent_pid, folder)
if "stubborn" in words:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
if "compiler" in words:
    compiler = subprocess.Popen(["sleep", "100"])
    # Also where the parent may look for it when the folder is gone.
    for place in (folder / "compiler", Path(os.environ["COMPILER"])):
        place.with_suffix(".partial").write_text(str(compiler.pid))
        place.with_suffix(".partial").rename(place)
if "fails" in words:
    print("\n".join(f"line {number}" for number in range(40)), flush=True)
    sys.exit(3)
if "floods" in words:
    for _ in range(24):
        sys.stderr.write(("x" * 127 + "\n") * (1 << 13))
        sys.stderr.flush()
        time.sleep(0.05)
    sys.stderr.write("the last line\n")
(folder / "running").touch()
while "ends" not in words:
    time.sleep(0.02)
