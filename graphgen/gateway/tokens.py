"""What prompts are to the model, and what tokens are as text: `/tokenize`, `/detokenize` and
`/tokenizer_info`, as vLLM has them.

The tokenizer is the frontend's: this process has none. Nothing is computed for these endpoints.
"""

from graphgen.calls.prompts import Chat, OnePrompt
from graphgen.gateway import schema
from graphgen.gateway.errors import ApiError
from graphgen.gateway.generation import chat_of, not_served, token_ids_of
from graphgen.gateway.http import FIELD_NAMES, Receive, Scope, Send, send_json
from graphgen.gateway.service import Service


class TokenEndpoints:
    """See this module."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def tokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, schema.TokenizeRequest)
        self._service.known(request.model)
        prompt = _prompt_of(request)
        scope[FIELD_NAMES] = {} if isinstance(prompt, Chat) else {"messages": "prompt"}
        special_tokens = isinstance(prompt, Chat) or request.add_special_tokens is not False
        found = await self._service.read_prompt(prompt, scope, special_tokens=special_tokens)
        tokens = schema.Tokens(len(found.token_ids), self._service.max_model_len, found.token_ids)
        await send_json(send, tokens)

    async def detokenize(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, schema.DetokenizeRequest)
        self._service.known(request.model)
        if not request.tokens:
            await send_json(send, schema.Detokenized(""))
            return
        scope[FIELD_NAMES] = {"messages": "tokens"}
        token_ids = token_ids_of(request.tokens, "tokens")
        found = await self._service.read_prompt(token_ids, scope, with_text=True)
        await send_json(send, schema.Detokenized(found.text or ""))

    async def tokenizer_info(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._service.tokenizer_info:
            raise ApiError(404, "this server has no tokenizer: give token ids", "not_found")
        await send_json(send, self._service.tokenizer_info)


def _prompt_of(request: schema.TokenizeRequest) -> OnePrompt:
    """Raises ApiError."""
    if request.return_token_strs:
        raise not_served("return_token_strs", "texts of single tokens")
    if request.messages is None:
        if request.prompt is None:
            raise ApiError(400, "there is no prompt: give prompt or messages", "invalid_request", "prompt")
        return request.prompt
    if request.prompt is not None:
        raise ApiError(400, "prompt and messages are both given: leave one out", "invalid_request", "prompt")
    if request.add_generation_prompt is False or request.continue_final_message:
        raise not_served("add_generation_prompt", "a chat that is not the model's turn")
    if request.add_special_tokens:
        raise not_served("add_special_tokens", "tokens around what the chat template writes")
    return chat_of(request, request.tools)
