"""The application: which path is which endpoint, and what is answered when one fails.

Owns the routes, and that every failure has an answer in OpenAI's form. Made once by `graphgen.gateway.process`.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from graphgen.gateway.admission import Admission
from graphgen.gateway.answers import OTHER_PATH, Counted
from graphgen.gateway.endpoints import Endpoints
from graphgen.gateway.errors import ApiError, anthropic_body, error_of, openai_body
from graphgen.gateway.http import GoneError, Message, Receive, Scope, Send, send_error
from graphgen.gateway.live import LiveFeed
from graphgen.gateway.messages import Messages
from graphgen.gateway.metric_table import Names
from graphgen.gateway.monitoring import Monitoring
from graphgen.gateway.openapi import OpenApi
from graphgen.gateway.page_files import Page
from graphgen.gateway.request_ids import REQUEST_ID, RequestIds
from graphgen.gateway.responses import Responses
from graphgen.gateway.service import HOLDER, Service
from graphgen.gateway.tokens import TokenEndpoints

PAGE_FILES = "/page/{name:path}"
OPEN = ("/health", "/ready", "/", PAGE_FILES)
"""Who asks for these needs no key."""
MESSAGES = "/v1/messages"
"""Of Anthropic's API."""

logger = logging.getLogger("graphgen.gateway")


class _Endpoint:
    """An endpoint as an application of its own, whose failures are answered.

    admission: who may call it; None: everyone. Whose key it was is in the scope. body_of: the form of its errors.
    """

    def __init__(
        self,
        serve: Callable[[Scope, Receive, Send], Awaitable[None]],
        admission: Admission | None,
        body_of: Callable[[ApiError], object],
    ) -> None:
        self._serve = serve
        self._admission = admission
        self._body_of = body_of

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def send_on(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            if self._admission is not None:
                scope[HOLDER] = self._admission.admit(scope)
            await self._serve(scope, receive, send_on)
        except GoneError:
            pass
        except Exception as error:
            answer = error_of(error)
            if answer.status == 500:
                logger.exception("request %s to %s failed", scope[REQUEST_ID], scope["path"])
            if not begun:
                await send_error(send, answer, self._body_of(answer))


def make_app(
    service: Service,
    admission: Admission | None = None,
    metrics_names: Names = "graphgen",
    origins: Sequence[str] = (),
) -> Starlette:
    """admission: who is let in; probes and the page need none. origins: whose pages browsers let call this server."""
    page, live = Page(), LiveFeed(service)
    endpoints, tokens, messages = Endpoints(service), TokenEndpoints(service), Messages(service)
    routes = [
        ("POST", "/v1/chat/completions", endpoints.chat_completions),
        ("POST", "/v1/completions", endpoints.completions),
        ("POST", "/v1/responses", Responses(service).create),
        ("GET", "/v1/models", endpoints.models),
        ("GET", "/v1/models/{name:path}", endpoints.model),
        ("POST", MESSAGES, messages.create),
        ("POST", f"{MESSAGES}/count_tokens", messages.count_tokens),
        ("POST", "/tokenize", tokens.tokenize),
        ("POST", "/detokenize", tokens.detokenize),
        ("GET", "/tokenizer_info", tokens.tokenizer_info),
        ("GET", "/health", endpoints.health),
        ("GET", "/ready", endpoints.ready),
        ("GET", "/openapi.json", OpenApi().serve),
        ("GET", "/metrics", Monitoring(service, metrics_names).metrics),
        ("GET", "/v1/engine/steps", live.steps),
        ("GET", "/", page.index),
        ("GET", PAGE_FILES, page.file),
    ]
    middleware = [Middleware(RequestIds), *([_cross_origin(origins)] if origins else [])]
    app = Starlette(middleware=middleware, exception_handlers={HTTPException: _no_endpoint})
    app.state.answers, app.state.live = service.answers, live
    for method, path, serve in routes:
        body_of = anthropic_body if path.startswith(MESSAGES) else openai_body
        endpoint = _Endpoint(serve, None if path in OPEN else admission, body_of)
        app.router.routes.append(Route(path, Counted(endpoint, path, service.answers), methods=[method]))
    return app


def _cross_origin(origins: Sequence[str]) -> Middleware:
    return Middleware(
        CORSMiddleware,
        allow_origins=origins,
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        expose_headers=("retry-after", "retry-after-ms", "x-request-id", "x-should-retry"),
    )


async def _no_endpoint(request: Request, error: Exception) -> Response:
    """Of a path or a method that is none."""
    assert isinstance(error, HTTPException)
    text = f"{request.method} {request.scope['path']} is not served: {error.detail}"
    answer = ApiError(error.status_code, text, "not_found" if error.status_code == 404 else None)
    headers = {"content-type": "application/json", **(error.headers or {})}
    request.app.state.answers.count(OTHER_PATH, error.status_code)
    return Response(msgspec.json.encode(openai_body(answer)), error.status_code, headers)
