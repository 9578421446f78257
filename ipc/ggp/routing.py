"""What a server and a frontend that routes requests of others to it tell each other: the message `load`, and the maps
`routed` of a `generate` and `capacity` of a `welcome`.

Owns the types. `graphgen.router.remote_messages` translates between them and what engines say on one machine.
"""

from typing import Annotated

from msgspec import Meta, Struct

from graphgen.ipc.ggp import limits
from graphgen.ipc.ggp.statistics import Count, Measured

Positive = Annotated[int, Meta(ge=1, le=limits.MAX_INT)]


class Routed(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a frontend that routes the requests of others says of one: the value of `generate.routed`. It has one sample
    and no stop strings; deltas carry no text, which the frontend makes itself."""

    seed: Annotated[int, Meta(ge=0, le=2**63 - 1, description="In the place of `sampling.seed`.")]
    age_ms: Annotated[
        Measured,
        Meta(description="Since the request reached its frontend: its deadline and its targets count from there."),
    ] = 0.0
    output_u32: Annotated[
        bytes,
        Meta(
            max_length=4 * limits.MAX_PROMPT_TOKENS,
            description="Tokens of output that it got elsewhere, as in `prompt_u32`: it goes on behind them. They count"
            " to `max_tokens` and `min_tokens`, and for penalties; `seq` and `usage` count from there.",
        ),
    ] = b""
    first_token_ms: Annotated[
        Measured | None, Meta(description="With `output_u32`: from its arrival to the first of them.")
    ] = None
    moves: Annotated[Count, Meta(description="Engines that had it before.")] = 0
    deaths: Annotated[
        Count, Meta(description="Of engines and workers that had it, since its last token. The third one fails it.")
    ] = 0


class Capacity(Struct, frozen=True, kw_only=True):
    """What can run at once, for who routes requests: the value of `welcome.capacity`."""

    engines: Annotated[Positive, Meta(description="Behind this server, that serve.")]
    slots: Annotated[Positive, Meta(description="Samples that run at once, in all engines.")]
    pages: Annotated[Positive, Meta(description="Of the KV cache of the engine with the fewest.")]
    page_size: Annotated[Positive, Meta(description="Positions of a page.")]
    step_rows: Annotated[Positive, Meta(description="Token rows of a step of one engine.")]
    chunk_rows: Annotated[Positive, Meta(description="Of these: rows that chunks of prompts may take.")]
    windows: Annotated[
        list[Count | None],
        Meta(description="Of each group of layers: positions that a row sees, nil for all before it."),
    ]


class Load(Struct, frozen=True, kw_only=True):
    """What the engines have to do, ten times a second. Sent to sessions whose `hello` said `routes`, where it may.

    Seconds are of the device, by measured step times; 0 where nothing was measured.
    """

    epoch: Annotated[Count, Meta(description="Another one than before: what the prefix cache kept is gone.")]
    serves: Annotated[bool, Meta(description="false: the engine, or its worker, is being replaced.")]
    engines: Annotated[Count, Meta(description="That serve.")]
    open: Annotated[Count, Meta(description="Samples that have not ended, of all clients.")]
    tenants: Annotated[Count, Meta(description="Clients that these are of.")]
    prompt_tokens: Annotated[Count, Meta(description="That they have to compute before their next token.")]
    output_tokens: Annotated[Count, Meta(description="That they are expected to draw yet.")]
    steps: Annotated[Count, Meta(description="That have run.")]
    pages_free: Count
    prompt_token_s: Annotated[Measured, Meta(description="Of a prompt token in full steps of all engines.")]
    output_token_s: Annotated[Measured, Meta(description="Of an output token in full steps of decodes.")]
    step_s: Annotated[Measured, Meta(description="Of a step as they are now: the gap between two tokens.")]
