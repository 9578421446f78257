"""The endpoints of OpenAI's API: chats, completions, models, and whether the server serves.

How requests are read is `graphgen.gateway.generation`, how outputs are written `graphgen.gateway.completion_writers`.
"""

import asyncio
from collections.abc import Sequence

from graphgen.calls.prompts import OnePrompt
from graphgen.calls.sampling_params import SamplingParams
from graphgen.gateway import schema
from graphgen.gateway.chat_turn import read_chat
from graphgen.gateway.completion_writers import ChatWriter, CompletionWriter, OutputWriter
from graphgen.gateway.generation import COMPLETION_MAX_TOKENS, completion_prompts, sampling_of
from graphgen.gateway.http import FIELD_NAMES, Receive, Scope, Send, send_json
from graphgen.gateway.ids import new_id
from graphgen.gateway.outputs import NoOutputs, Outputs, send_outputs
from graphgen.gateway.service import Service
from graphgen.remote.requests import NO_PARSING, Parsing


class Endpoints:
    """Chats, completions, models and probes."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def chat_completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, schema.ChatRequest)
        limit = request.max_tokens
        if request.max_completion_tokens is not None:
            limit = request.max_completion_tokens
            scope[FIELD_NAMES] = {"max_tokens": "max_completion_tokens"}
        model = self._service.known(request.model)
        turn = await read_chat(self._service, request, limit, scope)
        writer = ChatWriter(new_id("chatcmpl"), model, request, turn.outputs)
        await self._answer(writer, [turn.prompt], turn.sampling, scope, receive, send, turn.parsing)

    async def completions(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = await self._service.read(scope, receive, schema.CompletionRequest)
        scope[FIELD_NAMES] = {"messages": "prompt"}
        prompts = completion_prompts(request)
        is_echo_alone = bool(request.echo) and request.max_tokens == 0
        limit = COMPLETION_MAX_TOKENS if request.max_tokens is None else request.max_tokens
        sampling = sampling_of(request, 1 if is_echo_alone else limit)
        model = self._service.known(request.model)
        is_computed = not is_echo_alone or request.logprobs is not None
        if is_computed:
            self._service.check_share(len(prompts), sampling.n)
        echoed, lengths = [""] * len(prompts), [0] * len(prompts)
        for number, prompt in enumerate(prompts if request.echo else ()):
            echoed[number], lengths[number] = await self._echo_of(prompt, scope, is_counted=not is_computed)
        writer = CompletionWriter(new_id("cmpl"), model, sampling.n, request, echoed)
        if is_computed:
            await self._answer(writer, prompts, sampling, scope, receive, send)
        else:
            await _send(writer, NoOutputs(lengths, sampling.n), len(prompts), scope, send)

    async def models(self, scope: Scope, receive: Receive, send: Send) -> None:
        names = self._service.model_names
        await send_json(send, schema.ModelList(data=[self._described(name) for name in names]))

    async def model(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send_json(send, self._described(self._service.known(scope["path_params"]["name"])))

    async def health(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether frontend, scheduler and worker live; also while the server drains."""
        health = await asyncio.to_thread(self._service.core.health)
        await send_json(send, {"status": health.status}, 200 if health.ready or health.status == "draining" else 503)

    async def ready(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Whether new requests are taken."""
        health = await asyncio.to_thread(self._service.core.health)
        await send_json(send, {"status": health.status}, 200 if health.ready else 503)

    async def _answer(
        self,
        writer: OutputWriter,
        prompts: Sequence[OnePrompt],
        sampling: SamplingParams,
        scope: Scope,
        receive: Receive,
        send: Send,
        parsing: Parsing = NO_PARSING,
    ) -> None:
        async with self._service.pieces(prompts, sampling, scope, receive, parsing) as pieces:
            await _send(writer, pieces, len(prompts), scope, send)

    async def _echo_of(self, prompt: OnePrompt, scope: Scope, is_counted: bool) -> tuple[str, int]:
        """What `echo` puts before an output, and its tokens if they are counted here."""
        if isinstance(prompt, str) and not is_counted:
            return prompt, 0
        found = await self._service.read_prompt(prompt, scope, with_text=not isinstance(prompt, str))
        return prompt if isinstance(prompt, str) else found.text or "", len(found.token_ids)

    def _described(self, name: str) -> schema.Model:
        return schema.Model(id=name, created=self._service.created, max_model_len=self._service.max_model_len)


async def _send(writer: OutputWriter, outputs: Outputs, num_prompts: int, scope: Scope, send: Send) -> None:
    if writer.streams:
        await send_outputs(scope, send, outputs, writer)
    else:
        await send_json(send, await writer.whole(outputs, num_prompts))
