"""Who sends requests to an engine: the program that made it, or the frontends of its server.

Owns what the channel of each sender is called, and which request ids are its own. Senders have numbers from 0 on; each
has a channel to itself, and its ids are those that leave its number when they are divided by the number of senders. So
two of them never use one id, and an id says who is to hear of its request.
"""

REQUEST_IDS_PER_S = 1 << 20
"""Ids of a frontend begin at the clock, in these units: one that is started later never uses an id again."""


def engine_channel(sender: int = 0) -> str:
    """Name of the sender's channel to the scheduler, in the engine's folder."""
    return f"engine-{sender}"


def sender_of(request_id: int, num_senders: int) -> int:
    """Whose request it is."""
    return request_id % num_senders


def first_request_id(sender: int, num_senders: int, now_s: float) -> int:
    """Where a sender that is started now begins to count, in strides of `num_senders`. now_s: `time.monotonic()`. An
    earlier life of the same sender has used ids below it alone."""
    return int(now_s * REQUEST_IDS_PER_S) * num_senders + sender
