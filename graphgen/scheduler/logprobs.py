"""The log-probabilities of a step result, and which of them are whose.

Owns the reading of the packed rows, never what is in them: the policy passes them on. Called by
`graphgen.scheduler.policy` for the results that have some.
"""

from collections.abc import Sequence

from graphgen.ipc.step_schema import WORD_BYTES, logprob_words
from graphgen.scheduler.plan import ScoredRecord
from graphgen.scheduler.request import Request


def of_tokens(drawing: Sequence[Request], packed: bytes) -> dict[Request, bytes]:
    """Those of each request that asks for some, of the token that a step drew for it. Raises ValueError, with the
    lengths, where there are more or fewer."""
    asking = [request for request in drawing if request.logprobs is not None]
    return dict(zip(asking, _parts([(one.logprobs or 0, 1) for one in asking], packed), strict=True))


def of_prompts(scored: Sequence[ScoredRecord], packed: bytes) -> dict[Request, bytes]:
    """Those of each request that had not arrived before, which count as arrived from now on. Raises as `of_tokens`."""
    found = {}
    parts = _parts([(one.request.prompt_logprobs or 0, one.length) for one in scored], packed)
    for (request, start, length), part in zip(scored, parts, strict=True):
        num_known = request.num_scored - start
        if num_known < length:
            found[request] = part[num_known * len(part) // length :]
            request.num_scored = start + length
    return found


def _parts(rows: Sequence[tuple[int, int]], packed: bytes) -> list[bytes]:
    """rows: (likeliest tokens, rows) of each part."""
    lengths = [WORD_BYTES * logprob_words(num_top) * num_rows for num_top, num_rows in rows]
    if sum(lengths) != len(packed):
        raise ValueError(f"log-probabilities of a step result take {sum(lengths)} bytes, {len(packed)} arrived")
    parts, start = [], 0
    for length in lengths:
        parts.append(packed[start : start + length])
        start += length
    return parts
