"""What the scheduler knows of one request.

`Request` lives from submission to the finish reason. `RunningRequest` is what it holds while it runs: a slot,
pages, and how far it is computed. It ends with the request or its preemption; admission makes a new one.
Both are state of `graphgen.scheduler.policy`; nothing else changes them.
"""

from array import array

from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.messages import FinishReason, SlotInit, Submit


class Request:
    """One prompt with its sampling parameters, and every token it has got so far."""

    __slots__ = (
        "arrival",
        "end_len",
        "end_position",
        "ended",
        "min_len",
        "num_admissions",
        "num_in_flight",
        "prompt_len",
        "request_id",
        "running",
        "slot_init",
        "started_s",
        "stop_token_ids",
        "times_passed",
        "tokens",
    )

    def __init__(self, submit: Submit, arrival: int) -> None:
        self.request_id = submit.request_id
        self.arrival = arrival  # the order of service; unlike arrived_s it has no ties
        self.tokens: array[int] = _unpack_prompt(submit)  # the prompt, then the output that has arrived
        self.prompt_len = len(self.tokens)
        # Of prompt and output together: where the request ends, and up to where no stop token ends it.
        self.end_len = self.prompt_len + submit.max_tokens
        self.min_len = self.prompt_len + submit.min_tokens
        self.stop_token_ids = frozenset(submit.stop_token_ids)
        # The last token of the output is never computed: nothing is drawn after it.
        self.end_position = self.end_len - 1
        self.slot_init = SlotInit(
            prompt_len=self.prompt_len,
            min_length=self.min_len,
            stop_token_ids=submit.stop_token_ids,
            sampler=submit.sampler,
        )
        self.num_in_flight = 0  # tokens that planned steps draw and that have not arrived
        self.num_admissions = 0
        self.times_passed = 0  # plans in which a younger request was admitted while this one did not fit
        self.started_s = submit.arrived_s  # when its first chunk was planned; its arrival until then
        self.ended = False  # finished or cancelled: tokens that still arrive are dropped
        self.running: RunningRequest | None = None  # None while it holds no slot and no pages

    def receive(self, token_id: int) -> FinishReason | None:
        """Appends a token that arrived, and says whether it was the last one.

        Stop tokens count from the one after `min_len` on: the device does not draw them earlier.
        """
        self.num_in_flight -= 1
        self.tokens.append(token_id)
        num_tokens = len(self.tokens)
        if token_id in self.stop_token_ids and num_tokens > self.min_len:
            return "stop"
        return "length" if num_tokens >= self.end_len else None


class RunningRequest:
    """A request's slot and pages, and how many of its positions the plans so far compute."""

    __slots__ = ("num_computed", "pages", "prefill_end", "request", "slot")

    def __init__(self, request: Request, slot: int, pages: list[int]) -> None:
        self.request = request
        self.slot = slot
        self.pages = pages  # its block table: position p lies in pages[p // page_size]
        self.num_computed = 0
        # Everything known at admission is computed as chunks: after a preemption that is prompt and output.
        # From there on every position is a decode row, whose token the device feeds back.
        self.prefill_end = len(request.tokens)


def _unpack_prompt(submit: Submit) -> "array[int]":
    try:
        return unpack_int32(submit.prompt_token_ids)
    except ValueError:
        raise InvalidRequestError(
            f"the prompt of request {submit.request_id} has {len(submit.prompt_token_ids)} bytes,"
            " which is no multiple of 4: pack its token ids as int32"
        ) from None
