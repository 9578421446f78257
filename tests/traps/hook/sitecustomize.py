"""Imported at the start of every Python process that has this folder on its import path; see `tests.traps`."""

import sys

if "graphgen.worker" in sys.orig_argv:
    from tests.traps import in_worker

    in_worker.install()
elif "graphgen.scheduler" in sys.orig_argv:
    from tests.traps import counting, in_scheduler

    counting.install()
    in_scheduler.install()
elif "graphgen.server.frontend" in sys.orig_argv:
    from tests.traps import counting

    counting.install()
