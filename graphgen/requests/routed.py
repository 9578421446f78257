"""A request that a frontend elsewhere routes to this server: what it says of it, in what an engine is told.

Pure. Called by `graphgen.requests.core`.
"""

from msgspec import structs

from graphgen.ipc.engine_messages import Submit
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.ggp.routing import Routed
from graphgen.ipc.step_schema import WORD_BYTES


def continued(submit: Submit, routed: Routed) -> Submit:
    """submit: of the request as if it were new. Raises InvalidRequestError for an output that is none, or complete."""
    output = routed.output_u32
    num_tokens, rest = divmod(len(output), WORD_BYTES)
    if rest:
        raise InvalidRequestError(f"output_u32 has {len(output)} bytes: give 4 for each token id, little-endian")
    if num_tokens >= submit.max_tokens:
        raise InvalidRequestError(
            f"output_u32 has {num_tokens} tokens, max_tokens is {submit.max_tokens}: nothing is left to draw"
        )
    first_s = None if routed.first_token_ms is None else submit.arrived_s + routed.first_token_ms / 1000
    return structs.replace(
        submit,
        sampler=structs.replace(submit.sampler, seed=routed.seed),
        num_moves=max(routed.moves, 1 if output else 0),
        output_token_ids=output,
        first_token_s=first_s if output else None,
        num_deaths=routed.deaths,
    )
