"""What goes into the router's policy and what comes out of it: plain data.

Owns the Structs and the limits that they share. `graphgen.router.policy` says when each is used.
"""

from typing import Literal

from msgspec import Struct

MAX_DIGESTS = 512
"""Pages of a prompt that are looked for: 32 768 tokens in pages of 64. What lies behind them counts as not cached."""

MAX_LOSSES = 3
"""Engines that a request may lose without a new token in between; with this one it fails."""

ALONE_AFTER = 2
"""Engines lost in a row after which a request runs alone, so that no other request is suspected with it."""

EngineStatus = Literal["serving", "suspect", "paused", "dead"]
"""serving: requests are sent there. suspect: it says nothing, or runs no steps. paused: its worker group is being
replaced, its requests wait. dead: its processes ended."""


class Capacity(Struct, frozen=True):
    """What an engine can hold, as its Ready says."""

    num_slots: int  # requests that run at once
    num_pages: int
    page_size: int
    token_budget: int  # rows of a step


class RouterSettings(Struct, frozen=True):
    """How requests are spread. The defaults are what `benchmarks.simulate --replicas` found to work."""

    max_holders: int = 4
    """Engines looked at because they keep most of the prompt."""
    num_random: int = 2
    """Engines looked at besides, drawn at random. With two, several routers do not all run to the same engine."""
    max_digests: int = 1 << 18
    """(engine, page) pairs that the index remembers, some 300 bytes each: 80 MB, all pages of 20 engines of 8B models
    on H200s. A frontend feeds about ten."""
    warm_up_share: float = 0.25
    """Of the requests that no engine keeps much of: how many look at an engine whose cache is still empty."""
    shed_late_first_tokens: bool = False
    """Whether a request is refused because no engine would meet its ttft_target_ms. A target is a wish, so by default
    only a deadline that nobody can meet is a reason."""
    silent_s: float = 1.0
    """An engine that reported before and says nothing for so long is suspect: ten reports are missing."""
    stuck_s: float = 3.0
    """An engine with requests that runs no step for so long is suspect."""
    lost_s: float = 15.0
    """A suspect engine keeps its requests for so long; then they go elsewhere."""
    pause_s: float = 0.5
    """Requests of an engine whose worker group is being replaced wait so long; then they go elsewhere, if another
    engine serves. A replacement takes seconds, computing a prompt again a tenth of one."""
    max_rejections: int = 2
    """Engines that may turn a request away before its sender hears of it."""


class RoutedRequest(Struct, frozen=True, kw_only=True):
    """All that the router knows of a request. Make it once, when the request comes."""

    request_id: int
    tenant: str
    digests: tuple[bytes, ...]  # `graphgen.base.page_digests.prompt_digests` of its prompt, at most MAX_DIGESTS
    prompt_len: int
    max_tokens: int
    arrived_s: float
    priority: int = 0
    deadline_ms: float | None = None  # from arrived_s to the last token
    ttft_target_ms: float | None = None  # from arrived_s to the first token
    num_output: int = 0  # tokens that it has already, from elsewhere


class Choice(Struct, frozen=True):
    """Where a request goes. Send it there, and say so by `Router.sent`."""

    request: RoutedRequest
    engine_id: str
    num_cached: int  # tokens of its prompt that the engine is thought to keep
    first_token_s: float  # predicted from now; 0 where the engine's speed is not known
    num_losses: int = 0  # engines it lost since its last new token, to be sent with it
    is_alone: bool = False  # it has to run alone there: it lost ALONE_AFTER engines in a row


class Refusal(Struct, frozen=True):
    """Why a request goes nowhere. `error` is a class of `graphgen.ipc.errors`."""

    request_id: int
    error: Literal["OverloadedError", "DeadlineError", "EngineDeadError"]
    message: str
    retry_after_s: float | None = None  # of an OverloadedError


class Loss(Struct, frozen=True):
    """An open request whose engine does not go on with it. Ignore whatever that engine still says of it."""

    request_id: int
    engine_id: str
    num_losses: int  # since its last new token, this one included
    error: str = ""  # why it fails (a PoisonedRequestError); "": `Router.move` says where it goes on


class EngineView(Struct, frozen=True):
    """An engine as an operator sees it."""

    engine_id: str
    status: EngineStatus
    is_draining: bool
    epoch: int
    num_open: int  # requests that this router sent
    num_others: int  # requests that others sent, by its last report
    num_tenants: int  # that this router's requests are accounted to
    prompt_tokens: int  # of this router's requests: to compute
    output_tokens: int  # of this router's requests: expected yet
    open_work_s: float  # of all requests
    num_digests: int  # pages that it is thought to keep
    prompt_token_s: float
    output_token_s: float
