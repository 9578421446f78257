"""The limit of open files, which sockets count against. Called by each process of ours when it starts."""

import resource

MOST_DESCRIPTORS = 1 << 16
"""More than any process of ours uses. A limit of a billion would make programs slow that walk over all numbers."""


def raise_descriptor_limit() -> int:
    """Raises the soft limit of open files to the hard one, MOST_DESCRIPTORS at most; the limit that holds now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MOST_DESCRIPTORS if hard == resource.RLIM_INFINITY else min(hard, MOST_DESCRIPTORS)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return soft if soft != resource.RLIM_INFINITY else MOST_DESCRIPTORS
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted
