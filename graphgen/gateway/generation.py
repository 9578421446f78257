"""From what a client asks to prompts and sampling parameters.

Owns which fields of a request become which of SamplingParams, and what is refused because it is not served. Used by the
endpoints.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from graphgen.calls.prompts import Chat, OnePrompt, one_prompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.gateway.errors import ApiError
from graphgen.gateway.schema import (
    ChatRequest,
    CompletionRequest,
    Generation,
    TokenizeRequest,
)
from graphgen.gateway.structured import structured_of
from graphgen.ipc.errors import InvalidRequestError
from graphgen.ipc.ggp.limits import MAX_MESSAGES
from graphgen.ipc.short import short
from graphgen.ipc.worker_messages import MAX_LOGPROBS

MAX_TOKEN_ID_LEN = 10
"""Digits of the largest token id."""
MAX_TOKEN_ID = 2**31 - 1
"""Of any model."""
COMPLETION_MAX_TOKENS = 16
"""Of /v1/completions, where a request says nothing."""

_SAMPLING_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "seed",
    "stop",
    "stop_token_ids",
    "min_tokens",
    "ignore_eos",
    "skip_special_tokens",
    "priority",
    "cache_salt",
    "deadline_ms",
    "itl_target_ms",
    "ttft_target_ms",
    "tpot_target_ms",
)
_MESSAGE_FIELDS = ("role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content")


UNSERVED = {
    "allowed_token_ids": "a choice of tokens",
    "bad_words": "words that never come",
    "logits_processors": "code of a client",
    "use_beam_search": "beam search",
    "truncate_prompt_tokens": "a prompt that is cut",
    "include_stop_str_in_output": "a stop string in the text",
    "return_token_ids": "token ids",
    "prompt_embeds": "a prompt of vectors",
    "chat_template": "a template of a client",
    "continue_final_message": "a chat that is not the model's turn",
    "add_special_tokens": "tokens around what the chat template writes",
    "functions": "functions in their old form",
    "function_call": "functions in their old form",
}
"""What would change an output, by its field, and is not what the field asks for: a client that got another answer in
silence would look for the reason elsewhere."""


def sampling_of(request: Generation, max_tokens: int | None) -> SamplingParams:
    """Raises ApiError with the field that is wrong."""
    values = {name: value for name in _SAMPLING_FIELDS if (value := getattr(request, name)) is not None}
    values |= _logprobs_of(request)
    if request.logit_bias:
        values["logit_bias"] = _biases_of(request.logit_bias)
    structured = structured_of(request)
    try:
        return SamplingParams(max_tokens=max_tokens, structured=structured, **values)
    except InvalidRequestError as error:
        param = _wrong_field({"max_tokens": max_tokens, **values}) or str(error).partition(" ")[0]
        raise ApiError(400, str(error), "invalid_request", param) from None


def _wrong_field(values: Mapping[str, Any]) -> str | None:
    """The first that no other could make right; None: they contradict one another."""
    for name, value in values.items():
        try:
            SamplingParams(**{"max_tokens": None, name: value})
        except InvalidRequestError:
            return name
    return None


def _biases_of(given: dict[str, float]) -> dict[int, float]:
    """JSON has no numbers for keys."""
    biases: dict[int, float] = {}
    for key, bias in given.items():
        if not (key.isascii() and key.isdigit() and len(key) <= MAX_TOKEN_ID_LEN):
            text = f"logit_bias has the key {short(key)}: give token ids, as /tokenize tells them"
            raise ApiError(400, text, "invalid_request", "logit_bias")
        if int(key) in biases:
            raise ApiError(
                400, f"logit_bias has token {int(key)} twice: give one bias", "invalid_request", "logit_bias"
            )
        biases[int(key)] = bias
    return biases


def _logprobs_of(request: Generation) -> dict[str, int]:
    """What is asked for of log-probabilities, which chats and completions say in ways of their own."""
    if isinstance(request, ChatRequest):
        num_top = request.top_logprobs or 0
        if num_top and not request.logprobs:
            text = f"top_logprobs is {num_top} without logprobs: say logprobs: true, or leave it out"
            raise ApiError(400, text, "invalid_request", "top_logprobs")
        if not 0 <= num_top <= MAX_LOGPROBS:
            text = f"top_logprobs is {num_top}: use a value from 0 to {MAX_LOGPROBS}"
            raise ApiError(400, text, "invalid_request", "top_logprobs")
        return {"logprobs": num_top} if request.logprobs else {}
    if not isinstance(request, CompletionRequest) or request.logprobs is None:
        return {}
    if not request.echo:
        return {"logprobs": request.logprobs}
    if request.stream and (request.n or 1) > 1:
        raise not_served("n", "several outputs behind an echo with log-probabilities, as a stream", "do not stream")
    return {"logprobs": request.logprobs, "prompt_logprobs": request.logprobs}


def chat_prompt(request: ChatRequest, tools: list[dict[str, Any]] | None) -> Chat:
    """tools: what the template is told of. Raises ApiError."""
    _check_common(request)
    if request.echo:
        raise not_served("echo", "a chat before its answer")
    if request.add_generation_prompt is False:
        raise not_served("add_generation_prompt", "a chat that is not the model's turn")
    for one in request.modalities or ():
        if one != "text":
            raise not_served("modalities", f"{one!r:.100}", "ask for text alone")
    return chat_of(request, tools)


def chat_of(request: ChatRequest | TokenizeRequest, tools: list[dict[str, Any]] | None) -> Chat:
    """What the model's template is given. Raises ApiError."""
    switches = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None:
        switches.setdefault("reasoning_effort", request.reasoning_effort)
    messages = [_known_fields(message) for message in request.messages or []]
    if len(messages) > MAX_MESSAGES:
        text = f"messages has {len(messages)} items, the limit is {MAX_MESSAGES}: leave some out, or join them"
        raise ApiError(400, text, "invalid_request", "messages")
    return _checked(Chat(messages, tools, request.documents, switches or None))


def _known_fields(message: Mapping[str, Any]) -> dict[str, Any]:
    """What programs send back of an answer has fields that no template reads."""
    found = {
        name: value
        for name in _MESSAGE_FIELDS
        if (value := message.get(name)) is not None and (value != [] or name == "content")
    }
    if found.get("role") == "developer":  # OpenAI's newer word, which few templates know
        found["role"] = "system"
    if "reasoning_content" not in found and isinstance(message.get("reasoning"), str):
        found["reasoning_content"] = message["reasoning"]
    return found


def _checked(chat: Chat) -> Chat:
    try:
        checked = one_prompt(chat)
    except InvalidRequestError as error:
        param = str(error).partition(" ")[0]
        param = param if param in ("tools", "documents", "chat_template_kwargs") else "messages"
        raise ApiError(400, str(error), "invalid_request", param) from None
    assert isinstance(checked, Chat)
    return checked


def completion_prompts(request: CompletionRequest) -> list[OnePrompt]:
    """Raises ApiError."""
    if request.suffix:
        raise not_served("suffix", "text behind the output")
    if request.best_of is not None and request.best_of != (request.n or 1):
        raise not_served("best_of", "a choice among outputs")
    _check_common(request)
    given = request.prompt
    if isinstance(given, str):
        return [given]
    if not given:
        text = "prompt is an empty list: give a text or token ids, or a list of them"
        raise ApiError(400, text, "invalid_request", "prompt")
    if not isinstance(given[0], (str, list)):
        return [token_ids_of(given, "prompt")]
    return [_one_of_several(f"prompt[{number}]", one) for number, one in enumerate(given)]


def _one_of_several(place: str, given: Any) -> OnePrompt:  # whatever JSON has
    if isinstance(given, (str, list)):
        return given if isinstance(given, str) else token_ids_of(given, "prompt", place)
    raise ApiError(400, f"{place} is {given!r:.100}: give a text or a list of token ids", "invalid_request", "prompt")


def token_ids_of(given: Sequence[Any], param: str, place: str = "") -> list[int]:
    """place: of the list in its field, where it is not all of it. Raises ApiError for what is no token id."""
    for number, one in enumerate(given):
        if type(one) is not int or not 0 <= one <= MAX_TOKEN_ID:
            text = f"{place or param}[{number}] is {one!r:.100}: token ids are whole numbers from 0 to {MAX_TOKEN_ID}"
            raise ApiError(400, text, "invalid_request", param)
    return list(given)


def _check_common(request: Generation) -> None:
    for name, what in UNSERVED.items():
        if getattr(request, name, None) not in (None, False, "none") and getattr(request, name) != []:
            raise not_served(name, what)


def not_served(param: str, what: str, remedy: str = "leave it out") -> ApiError:
    """Of a field that is known and cannot be obeyed."""
    return ApiError(400, f"{param}: {what} cannot be served by this server: {remedy}", "unsupported_parameter", param)
