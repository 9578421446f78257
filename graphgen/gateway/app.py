"""The application: which path is which endpoint, and what is answered when one fails.

Owns the routes, and that every failure has an answer and every answer is counted. Made once by
`graphgen.gateway.process`.
"""

import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Route, Router

from graphgen.gateway.admission import Admission
from graphgen.gateway.answers import CLIENT_LEFT, OTHER_PATH, Answers
from graphgen.gateway.endpoints import Endpoints
from graphgen.gateway.errors import ApiError, anthropic_body, openai_body
from graphgen.gateway.http import JSON_HEADERS, GoneError, Receive, Scope, Send, answer_of, send_bytes, send_error
from graphgen.gateway.live import LiveFeed
from graphgen.gateway.messages import Messages
from graphgen.gateway.metric_table import Names
from graphgen.gateway.monitoring import Monitoring
from graphgen.gateway.openapi import OpenApi
from graphgen.gateway.page_files import Page
from graphgen.gateway.request_ids import REQUEST_ID, Beginning, name_of
from graphgen.gateway.responses import Responses
from graphgen.gateway.service import HOLDER, Service
from graphgen.gateway.tokens import TokenEndpoints
from graphgen.gateway.tracing import SPAN, RequestSpan, Tracing

PAGE_FILES = "/page/{name:path}"
OPEN = ("/health", "/ready", "/", PAGE_FILES)
"""Who asks for these needs no key."""
MESSAGES = "/v1/messages"
"""Of Anthropic's API."""
ENDPOINT = "graphgen.endpoint"
BEGINNING = "graphgen.beginning"
"""In a scope: which endpoint it has reached, and whether its answer has begun."""

logger = logging.getLogger("graphgen.gateway")


class _Endpoint:
    """An endpoint as an application of its own.

    admission: who may call it; None: everyone. Whose key it was is in the scope. body_of: the form of its errors.
    tracing: of its requests; None: they have no spans.
    """

    def __init__(
        self,
        serve: Callable[[Scope, Receive, Send], Awaitable[None]],
        path: str,
        admission: Admission | None,
        body_of: Callable[[ApiError], object],
        tracing: Tracing | None,
    ) -> None:
        self.path = path
        self.body_of = body_of
        self._tracing = tracing
        self._serve = serve
        self._admission = admission

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[ENDPOINT] = self
        if self._tracing is not None:
            scope[SPAN] = self._tracing.begin(scope, self.path)
        if self._admission is not None:
            scope[HOLDER] = self._admission.admit(scope)
        await self._serve(scope, receive, send)


class App:
    """The application. Every part of an answer passes each `send` between an endpoint and uvicorn, so there is one."""

    def __init__(self, routes: Sequence[Route], answers: Answers, live: LiveFeed, origins: Sequence[str]) -> None:
        self.answers = answers
        self.live = live
        self.routes = routes
        self._router = Router(routes)
        self._app = CORSMiddleware(self._answer, **_cross_origin(origins)) if origins else self._answer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        name = name_of(scope)
        scope["app"] = self  # as Starlette's routes want it: they raise what they cannot serve
        scope[REQUEST_ID] = name.decode()
        scope[BEGINNING] = beginning = Beginning(send, name)
        await self._app(scope, receive, beginning)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Every failure has an answer, and every answer is counted when it has ended."""
        beginning: Beginning = scope[BEGINNING]
        try:
            await self._router.app(scope, receive, send)
        except GoneError:
            pass
        except HTTPException as error:
            await _send_no_endpoint(scope, send, error)
        except Exception as error:
            answer = answer_of(error, scope)
            if answer.status == 500:
                logger.exception("request %s to %s failed", scope[REQUEST_ID], scope["path"])
            if beginning.status is None:
                await send_error(send, answer, scope[ENDPOINT].body_of(answer))
        finally:
            endpoint: _Endpoint | None = scope.get(ENDPOINT)
            status = CLIENT_LEFT if beginning.status is None else beginning.status
            self.answers.count(OTHER_PATH if endpoint is None else endpoint.path, status)
            span: RequestSpan | None = scope.get(SPAN)
            if span is not None:
                span.end(status)


def make_app(
    service: Service,
    admission: Admission | None = None,
    metrics_names: Names = "graphgen",
    origins: Sequence[str] = (),
    tracing: Tracing | None = None,
) -> App:
    """admission: who is let in; probes and the page need none. origins: whose pages browsers let call this server.
    tracing: of all that is asked by POST."""
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
    built = [
        Route(
            path,
            _Endpoint(
                serve,
                path,
                None if path in OPEN else admission,
                _body_of(path),
                tracing if method == "POST" else None,
            ),
            methods=[method],
        )
        for method, path, serve in routes
    ]
    return App(built, service.answers, live, origins)


def _body_of(path: str) -> Callable[[ApiError], object]:
    """The form of the errors of a path."""
    return anthropic_body if f"{path}/".startswith(f"{MESSAGES}/") else openai_body


def _cross_origin(origins: Sequence[str]) -> dict[str, Any]:  # the arguments of CORSMiddleware
    return {
        "allow_origins": origins,
        "allow_methods": ("GET", "POST"),
        "allow_headers": ("*",),
        "expose_headers": ("retry-after", "retry-after-ms", "x-request-id", "x-should-retry"),
    }


async def _send_no_endpoint(scope: Scope, send: Send, error: HTTPException) -> None:
    """Of a path or a method that is none."""
    text = f"{scope['method']} {scope['path']:.100} is not served: {error.detail}"
    answer = ApiError(error.status_code, text, "not_found" if error.status_code == 404 else None)
    body = msgspec.json.encode(_body_of(scope["path"])(answer))
    headers = [(name.lower().encode(), value.encode()) for name, value in (error.headers or {}).items()]
    await send_bytes(send, error.status_code, body, [*JSON_HEADERS, *headers])
