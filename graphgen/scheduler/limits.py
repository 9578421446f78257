"""What the worker can hold, how much may wait for it, and which requests can never be served within it.

Owns numbers only. Made by `graphgen.scheduler.process` from the configuration and what the worker reports; read by
`graphgen.scheduler.policy` and its parts.
"""

from msgspec import Struct

from graphgen.ipc.engine_messages import ObjectiveName
from graphgen.ipc.errors import ConfigError, InvalidRequestError
from graphgen.ipc.step_schema import MAX_SCORED_ROWS
from graphgen.ipc.worker_messages import Bucket
from graphgen.scheduler.page_groups import PageGroups


class SchedulerLimits(Struct, frozen=True):
    """Sizes of the worker's tables, and how much one step may hold. Raises ConfigError for a size below 1."""

    buckets: tuple[Bucket, ...]  # that a worker has captured when it begins to serve
    num_pages: int
    page_size: int  # positions
    num_slots: int  # requests that may run at once
    max_chunks: int  # of one step
    token_budget: int  # rows of one step
    max_model_len: int  # prompt and output together
    windows: tuple[int | None, ...] = (None,)  # of each page group: positions that a row sees; None sees all
    objective: ObjectiveName = "balanced"
    steps_in_flight: int = 2
    prefix_cache: bool = True  # pages of equal prompts are shared
    max_waiting: int = 2**16  # requests
    max_waiting_tokens: int = 2**26  # prompt tokens of all waiting requests
    max_long_prompts: int = 1  # that are computed at the same time
    max_scored_rows: int = MAX_SCORED_ROWS  # of one step
    max_chunk_pages: int | None = None  # that the chunks of one step may see together, at least a whole context's
    num_senders: int = 1  # of requests, see `graphgen.ipc.senders`
    pads: bool = True  # a step has all rows of its bucket; else those that hold a token

    def __post_init__(self) -> None:
        for name in self.__struct_fields__[1:]:
            value = getattr(self, name)
            if type(value) is int and value < 1:
                raise ConfigError(f"{name} is {value}, the least is 1: raise {name}")

    def check_servable(self, prompt_len: int, max_tokens: int, groups: PageGroups) -> None:
        """Raises InvalidRequestError for a request that does not fit even with nothing else running."""
        if prompt_len < 1:
            raise InvalidRequestError("the prompt has 0 tokens, the least is 1: send at least one token")
        if max_tokens < 1:
            raise InvalidRequestError(f"max_tokens is {max_tokens}, the least is 1: raise max_tokens")
        if prompt_len + max_tokens > self.max_model_len:
            raise InvalidRequestError(
                f"prompt has {prompt_len} tokens and max_tokens is {max_tokens}, max_model_len is"
                f" {self.max_model_len}: shorten the prompt, lower max_tokens or raise max_model_len"
            )
        # The last token of the output is never computed, so it needs no position.
        num_pages = groups.most_pages(prompt_len + max_tokens - 1)
        if num_pages > self.num_pages:
            raise InvalidRequestError(
                f"prompt has {prompt_len} tokens and max_tokens is {max_tokens}: together they take"
                f" {num_pages} pages of {self.page_size} positions, the KV cache has {self.num_pages};"
                " shorten the prompt, lower max_tokens or raise num_pages"
            )
