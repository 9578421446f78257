"""What clients of OpenAI's API send and get: the fields that are read, and the shape of every answer.

Owns types and names alone. Fields that are not here are accepted and ignored, as OpenAI's own are.
"""

from collections.abc import Sequence
from typing import Annotated, Any

from msgspec import UNSET, Meta, Struct, UnsetType


class StreamOptions(Struct, frozen=True, kw_only=True):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class Generation(Struct, frozen=True, kw_only=True):
    """What both endpoints take; null is absent."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    logit_bias: dict[str, float] | None = None
    # What vLLM takes as well.
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool | None = None
    stop_token_ids: list[int] | None = None
    skip_special_tokens: bool | None = None
    priority: int | None = None
    cache_salt: str | None = None
    # Ours, as in SamplingParams.
    deadline_ms: float | None = None
    itl_target_ms: float | None = None
    ttft_target_ms: float | None = None
    tpot_target_ms: float | None = None

    # What the output must follow: see `graphgen.gateway.structured`.
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    guided_json: Any = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None
    structured_after: str | None = None

    # What would change the output, and is not served: see `generation.UNSERVED`.
    allowed_token_ids: Any = None
    bad_words: Any = None
    logits_processors: Any = None
    use_beam_search: Any = None
    truncate_prompt_tokens: Any = None
    include_stop_str_in_output: Any = None
    return_token_ids: Any = None
    prompt_embeds: Any = None


class ChatRequest(Generation, frozen=True, kw_only=True):
    """The body of POST /v1/chat/completions."""

    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    # As above.
    chat_template: Any = None
    continue_final_message: Any = None
    add_special_tokens: Any = None
    echo: Any = None
    functions: Any = None
    function_call: Any = None
    modalities: list[str] | None = None
    add_generation_prompt: bool | None = None


class CompletionRequest(Generation, frozen=True, kw_only=True):
    """The body of POST /v1/completions."""

    prompt: str | list[Any]  # a text, token ids, or a list of either: the decoder knows one kind of list
    echo: bool | None = None
    logprobs: int | None = None
    suffix: str | None = None
    best_of: int | None = None


class PromptTokensDetails(Struct, frozen=True):
    cached_tokens: int


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class Function(Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(Struct, frozen=True):
    id: str
    function: Function
    type: str = "function"


class ChatMessage(Struct, frozen=True, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    """The same: programs know it by one name or the other."""
    tool_calls: list[ToolCall] | UnsetType = UNSET


class TopLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]


class ChatLogprob(Struct, frozen=True):
    token: str
    logprob: float
    bytes: list[int]
    """Of the token; those of a character may lie in several."""
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    content: list[ChatLogprob]
    refusal: None = None


class TextLogprobs(Struct, frozen=True):
    """Of a completion: a column each, as long as one another."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """In characters of the choice's text."""


class ChatChoice(Struct, frozen=True, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str


class ChatCompletion(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(Struct, frozen=True, kw_only=True):
    name: str | UnsetType = UNSET
    arguments: str


class CallDelta(Struct, frozen=True):
    """Its id, type and name are in the first of a call alone: programs join what repeats."""

    index: int
    id: str | UnsetType = UNSET
    type: str | UnsetType = UNSET
    function: FunctionDelta = FunctionDelta(arguments="")


class ChatDelta(Struct, frozen=True):
    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    tool_calls: list[CallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, frozen=True, kw_only=True):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None


class ChatChunk(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None | UnsetType = UNSET


class TextChoice(Struct, frozen=True, kw_only=True):
    index: int
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: str | None = None


class TextCompletion(Struct, frozen=True, kw_only=True):
    """A whole answer, and each event of a stream."""

    id: str
    object: str = "text_completion"
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None | UnsetType = UNSET


class Model(Struct, frozen=True, kw_only=True):
    id: str
    object: str = "model"
    created: int
    owned_by: str = "graphgen"
    max_model_len: int


class ModelList(Struct, frozen=True, kw_only=True):
    object: str = "list"
    data: list[Model]


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """The body of POST /tokenize: a text, or a chat as it would be answered."""

    model: str | None = None
    prompt: str | None = None
    add_special_tokens: bool | None = None
    """Of a text, true by default: those that the tokenizer puts around a prompt."""
    messages: Annotated[list[dict[str, Any]], Meta(min_length=1)] | None = None
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    return_token_strs: bool | None = None


class Tokens(Struct, frozen=True):
    """The answer to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: Sequence[int]
    token_strs: None = None


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """The body of POST /detokenize."""

    model: str | None = None
    tokens: list[Any]


class Detokenized(Struct, frozen=True):
    """The answer to POST /detokenize: the text with its special tokens."""

    prompt: str
