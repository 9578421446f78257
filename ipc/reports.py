"""What an engine says of itself ten times a second to those that route requests to it.

Owns the Struct and nothing else. `graphgen.scheduler.reports` makes it, `graphgen.router.policy` reads it.
"""

from msgspec import Struct

REPORT_EVERY_S = 0.1
"""How often an engine reports."""


class EngineReport(Struct, frozen=True, array_like=True, tag="report", gc=False, kw_only=True):
    """The work that an engine has, whoever sent it, and how fast it does it."""

    epoch: int  # of its worker group; another one means that its prefix cache is empty
    is_serving: bool  # False while a worker group is being replaced
    num_open: int  # requests that have not ended, of all senders
    num_tenants: int  # that these are accounted to
    prompt_tokens: int  # that these have to compute before their next token
    output_tokens: int  # that these are expected to draw yet
    # Of these requests: those that others sent than the one who asks, and their part of the tokens.
    num_others: int
    others_prompt_tokens: int
    others_output_tokens: int
    num_steps: int  # that have run since the engine's start: an engine with requests that runs no steps hangs
    pages_free: int
    # Seconds of the device, by its measured step times; 0 where nothing was measured.
    prompt_token_s: float  # of a prompt token in a full step
    output_token_s: float  # of an output token in a full step of decodes
    step_s: float  # of a step as the engine makes them now: the gap between two tokens of a request
