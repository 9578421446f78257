"""From a request for a chat to what the frontend is asked for, and how its outputs are read.

Owns what a forced call asks of the sampling, and that a structure begins behind the thoughts. Used by every endpoint
that answers chats: OpenAI's two, and Anthropic's.
"""

from msgspec import Struct
from msgspec.structs import replace

from graphgen.calls.prompts import Chat
from graphgen.calls.sampling_params import SamplingParams
from graphgen.calls.structured import JsonSchema
from graphgen.gateway.chat_output import TAIL_LEN, ChatOutput, PlainOutput
from graphgen.gateway.errors import ApiError
from graphgen.gateway.generation import chat_prompt, sampling_of
from graphgen.gateway.http import Scope
from graphgen.gateway.schema import ChatRequest
from graphgen.gateway.service import Service
from graphgen.gateway.tools import read_tools
from graphgen.remote.requests import NO_PARSING, Parsing


class ChatTurn(Struct, frozen=True):
    """The model's turn in a chat."""

    prompt: Chat
    sampling: SamplingParams
    parsing: Parsing
    outputs: list[ChatOutput | PlainOutput]
    """One for each sample."""


async def read_chat(service: Service, request: ChatRequest, max_tokens: int | None, scope: Scope) -> ChatTurn:
    """Raises ApiError, GraphgenError."""
    parsers = service.parsers
    tools = read_tools(request, parsers.has_calls)
    prompt = chat_prompt(request, tools.described)
    sampling = sampling_of(request, max_tokens)
    service.check_share(1, sampling.n)
    structured = sampling.structured
    if tools.forced is not None:
        if structured is not None:
            text = "tool_choice: a forced call and another structure of the output exclude one another: leave one out"
            raise ApiError(400, text, "invalid_request", "tool_choice")
        structured = JsonSchema(tools.forced)
    if structured is not None and not structured.after and parsers.thinks:
        # The structure comes behind the thoughts: behind those that the prompt has begun, and those that the output
        # begins with, if it does. How the prompt ends only the frontend can say.
        read = await service.read_prompt(prompt, scope, with_text=True)
        is_begun = parsers.closing_behind(read.text or "") != ""
        opening, closing = parsers.thoughts
        structured = replace(structured, after=closing, opening="" if is_begun else opening)
    sampling = replace(sampling, structured=structured)
    if tools.schemas is None and parsers.is_plain:
        return ChatTurn(prompt, sampling, NO_PARSING, [PlainOutput() for _ in range(sampling.n)])
    outputs: list[ChatOutput | PlainOutput] = [ChatOutput(parsers, tools) for _ in range(sampling.n)]
    return ChatTurn(prompt, sampling, Parsing(tuple(parsers.symbols), TAIL_LEN), outputs)
