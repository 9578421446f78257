"""Python's collector of garbage, in processes that serve.

A full collection looks at all that was ever imported, tens of thousands of objects: 10 to 30 ms in which nothing else
runs and every stream stands still. Called by processes when nothing is left to do that the first request would wait
for.
"""

import gc


def leave_imports_alone() -> None:
    """No later collection looks at what is there now."""
    gc.collect()
    gc.freeze()
