"""What clients of OpenAI's Responses API send and get, as far as a server that keeps nothing can serve it.

Owns types and names alone. Fields that are not here are accepted and ignored.
"""

from typing import Any

from msgspec import Struct

from graphgen.gateway.schema import ChatLogprob, Generation


class Reasoning(Struct, frozen=True, kw_only=True):
    effort: str | None = None
    summary: str | None = None


class TextFormat(Struct, frozen=True, kw_only=True):
    format: dict[str, Any] | None = None
    verbosity: str | None = None


LOGPROBS = "message.output_text.logprobs"
"""In `include`."""


class ResponsesRequest(Generation, frozen=True, kw_only=True):
    """The body of POST /v1/responses. What other endpoints take of sampling is taken here as well."""

    input: str | list[dict[str, Any]]
    instructions: str | None = None
    max_output_tokens: int | None = None
    reasoning: Reasoning | None = None
    text: TextFormat | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    include: list[str] | None = None
    top_logprobs: int | None = None
    metadata: dict[str, Any] | None = None
    user: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    # What a server that keeps nothing cannot do.
    previous_response_id: str | None = None
    conversation: Any = None
    background: bool | None = None
    prompt: Any = None
    """A template that OpenAI keeps."""

    @property
    def asks_for_logprobs(self) -> bool:
        """OpenAI's clients say it in `include`; who says how many is meant to want them, too."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


class OutputText(Struct, frozen=True, kw_only=True, tag="output_text"):
    """A part of a message."""

    text: str
    annotations: list[None] = []
    logprobs: list[ChatLogprob] = []


class ReasoningText(Struct, frozen=True, kw_only=True, tag="reasoning_text"):
    """A part of reasoning."""

    text: str


class Message(Struct, frozen=True, kw_only=True, tag="message"):
    id: str
    status: str
    role: str = "assistant"
    content: list[OutputText]


class ReasoningItem(Struct, frozen=True, kw_only=True, tag="reasoning"):
    id: str
    status: str
    summary: list[None] = []
    content: list[ReasoningText]


class FunctionCall(Struct, frozen=True, kw_only=True, tag="function_call"):
    id: str
    status: str
    call_id: str
    name: str
    arguments: str


Item = Message | ReasoningItem | FunctionCall


class InputTokensDetails(Struct, frozen=True, kw_only=True):
    cached_tokens: int
    cache_write_tokens: int = 0


class OutputTokensDetails(Struct, frozen=True, kw_only=True):
    reasoning_tokens: int = 0


class ResponsesUsage(Struct, frozen=True, kw_only=True):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails = OutputTokensDetails()
    total_tokens: int


class ResponseError(Struct, frozen=True, kw_only=True):
    code: str
    message: str


class IncompleteDetails(Struct, frozen=True, kw_only=True):
    reason: str


class Response(Struct, frozen=True, kw_only=True):
    """The answer, and what events say of it while it grows. Repeats what was asked for, as OpenAI's does."""

    id: str
    object: str = "response"
    created_at: int
    status: str
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[Item] = []
    usage: ResponsesUsage | None = None
    instructions: str | None
    max_output_tokens: int | None
    temperature: float | None
    top_p: float | None
    reasoning: Reasoning
    text: TextFormat
    tools: list[dict[str, Any]]
    tool_choice: str | dict[str, Any]
    parallel_tool_calls: bool
    metadata: dict[str, Any]
    user: str | None
    top_logprobs: int = 0
    previous_response_id: None = None
    background: bool = False
    store: bool = False
    truncation: str = "disabled"
    service_tier: str = "default"


class ResponseChanged(Struct, frozen=True, kw_only=True):
    """The response begins (`response.created`, `.in_progress`) or ends (`.completed`, `.incomplete`, `.failed`)."""

    type: str
    sequence_number: int
    response: Response


class ItemChanged(Struct, frozen=True, kw_only=True):
    """An item begins or ends: `response.output_item.added`, `.done`."""

    type: str
    sequence_number: int
    output_index: int
    item: Item


class PartChanged(Struct, frozen=True, kw_only=True):
    """A part of a message or of reasoning begins or ends: `response.content_part.added`, `.done`."""

    type: str
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    part: OutputText | ReasoningText


class TextDelta(Struct, frozen=True, kw_only=True):
    type: str = "response.output_text.delta"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str
    logprobs: list[ChatLogprob] = []


class TextDone(Struct, frozen=True, kw_only=True):
    type: str = "response.output_text.done"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    text: str
    logprobs: list[ChatLogprob] = []


class ReasoningDelta(Struct, frozen=True, kw_only=True):
    type: str = "response.reasoning_text.delta"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    delta: str


class ReasoningDone(Struct, frozen=True, kw_only=True):
    type: str = "response.reasoning_text.done"
    sequence_number: int
    item_id: str
    output_index: int
    content_index: int = 0
    text: str


class ArgumentsDelta(Struct, frozen=True, kw_only=True):
    type: str = "response.function_call_arguments.delta"
    sequence_number: int
    item_id: str
    output_index: int
    delta: str


class ArgumentsDone(Struct, frozen=True, kw_only=True):
    type: str = "response.function_call_arguments.done"
    sequence_number: int
    item_id: str
    output_index: int
    name: str
    arguments: str
