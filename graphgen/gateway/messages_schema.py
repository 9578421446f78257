"""What clients of Anthropic's Messages API send and get.

Owns types and names alone. Fields that are not here are accepted and ignored.
"""

from typing import Annotated, Any

from msgspec import Meta, Struct


class Effort(Struct, frozen=True, kw_only=True):
    effort: str | None = None
    format: dict[str, Any] | None = None


class Thinking(Struct, frozen=True, kw_only=True):
    type: str


class PromptOfMessages(Struct, frozen=True, kw_only=True):
    """The body of POST /v1/messages/count_tokens, and what of POST /v1/messages is its prompt."""

    model: str | None = None
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: Effort | None = None


class MessagesRequest(PromptOfMessages, frozen=True, kw_only=True):
    """The body of POST /v1/messages."""

    max_tokens: int
    stream: bool | None = None
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    # As other endpoints have it.
    seed: int | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    deadline_ms: float | None = None
    itl_target_ms: float | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None


class TextBlock(Struct, frozen=True, kw_only=True, tag="text"):
    text: str
    citations: None = None


class ThinkingBlock(Struct, frozen=True, kw_only=True, tag="thinking"):
    thinking: str
    signature: str = ""
    """Nothing here signs what a model thought."""


class ToolUseBlock(Struct, frozen=True, kw_only=True, tag="tool_use"):
    id: str
    name: str
    input: dict[str, Any] = {}


Block = TextBlock | ThinkingBlock | ToolUseBlock


class MessagesUsage(Struct, frozen=True, kw_only=True):
    """Of the prompt, what was found in the prefix cache is counted apart."""

    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int
    cache_creation_input_tokens: int = 0


class AnswerMessage(Struct, frozen=True, kw_only=True):
    id: str
    type: str = "message"
    role: str = "assistant"
    model: str
    content: list[Block]
    stop_reason: str | None = None
    stop_sequence: str | None = None
    usage: MessagesUsage


class InputTokens(Struct, frozen=True):
    """The answer to POST /v1/messages/count_tokens."""

    input_tokens: int


class MessageStart(Struct, frozen=True, kw_only=True):
    type: str = "message_start"
    message: AnswerMessage


class BlockStart(Struct, frozen=True, kw_only=True):
    type: str = "content_block_start"
    index: int
    content_block: Block


class TextDelta(Struct, frozen=True, kw_only=True, tag="text_delta"):
    text: str


class ThinkingDelta(Struct, frozen=True, kw_only=True, tag="thinking_delta"):
    thinking: str


class InputJsonDelta(Struct, frozen=True, kw_only=True, tag="input_json_delta"):
    partial_json: str


BlockChange = TextDelta | ThinkingDelta | InputJsonDelta


class BlockDelta(Struct, frozen=True, kw_only=True):
    type: str = "content_block_delta"
    index: int
    delta: BlockChange


class BlockStop(Struct, frozen=True, kw_only=True):
    type: str = "content_block_stop"
    index: int


class Stop(Struct, frozen=True, kw_only=True):
    stop_reason: str
    stop_sequence: str | None = None


class MessageDelta(Struct, frozen=True, kw_only=True):
    type: str = "message_delta"
    delta: Stop
    usage: MessagesUsage


class MessageStop(Struct, frozen=True, kw_only=True):
    type: str = "message_stop"
