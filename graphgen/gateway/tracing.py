"""A span of OpenTelemetry for each request that an endpoint reads, where the operator asks for it.

Owns the names of its attributes: those of OpenTelemetry's conventions for HTTP servers and generative models, and for
the time to the first token vLLM's, since the conventions have it as a metric alone. OpenTelemetry is imported where
spans are sent, and nowhere else; where they are not, a request does nothing here. Used by `graphgen.gateway.app` and
`graphgen.gateway.service`.
"""

import os
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

from graphgen.calls.sampling_params import SamplingParams
from graphgen.gateway.http import Scope
from graphgen.gateway.outputs import Batch, Pieces, Write
from graphgen.gateway.request_ids import REQUEST_ID

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import Span, SpanProcessor

SPAN = "graphgen.span"
"""In a scope: the request's, where spans are sent."""
_OPERATIONS = {
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
    "/v1/completions": "text_completion",
}
_OF_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "presence_penalty", "frequency_penalty", "seed")
_CONTEXT = (b"traceparent", b"tracestate")
_SERVICE_NAME = "OTEL_SERVICE_NAME"


def export_to(endpoint: str) -> "SpanProcessor":
    """Spans go there by OTLP over HTTP, in batches, from a thread of their own. What else the exporter may be told is
    in the environment, as OpenTelemetry has it (OTEL_EXPORTER_OTLP_HEADERS, ...)."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint))


class Tracing:
    """Begins the spans of requests."""

    def __init__(self, processor: "SpanProcessor") -> None:
        """processor: what becomes of them."""
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = {} if _SERVICE_NAME in os.environ else {"service.name": "graphgen"}
        self._provider = TracerProvider(resource=Resource.create(name), shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("graphgen")
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, scope: Scope, path: str) -> "RequestSpan":
        """path: of the route. The span is a child of the one that the request's traceparent names, if it has one."""
        from opentelemetry.trace import SpanKind

        given: Mapping[bytes, bytes] = dict(scope["headers"])
        carrier = {name.decode(): given[name].decode("latin-1") for name in _CONTEXT if name in given}
        span = self._tracer.start_span(
            f"{scope['method']} {path}",
            context=self._propagator.extract(carrier),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "http.route": path,
                "graphgen.request_id": scope[REQUEST_ID],
            },
        )
        return RequestSpan(span, path)  # type: ignore[arg-type]  # what the provider of the SDK makes

    def close(self) -> None:
        """Sends what is left."""
        self._provider.shutdown()


class RequestSpan:
    """The span of one request."""

    def __init__(self, span: "Span", path: str) -> None:
        self._span = span
        self._path = path
        self._begun_s = time.monotonic()
        self._first_s: float | None = None
        self._prompt_tokens: dict[int, int] = {}  # by the number of the prompt
        self._cached_tokens: dict[int, int] = {}
        self._output_tokens = 0
        self._finish_reasons: list[str] = []

    def begin_outputs(self, model: str, sampling: SamplingParams) -> None:
        operation = _OPERATIONS.get(self._path)
        if operation is None:
            return
        self._span.update_name(f"{operation} {model}")
        values = {f"gen_ai.request.{name}": getattr(sampling, name) for name in _OF_SAMPLING}
        self._span.set_attributes(
            {
                "gen_ai.operation.name": operation,
                "gen_ai.provider.name": "graphgen",
                "gen_ai.request.model": model,
                "gen_ai.request.choice.count": sampling.n,
                **{name: value for name, value in values.items() if value is not None},
            }
        )

    def take(self, batch: Batch) -> None:
        """What has come of its outputs."""
        for number, piece in batch:
            if self._first_s is None and piece.token_ids:
                self._first_s = time.monotonic() - self._begun_s
            self._prompt_tokens[number] = piece.prompt_tokens
            self._cached_tokens[number] = max(piece.cached_tokens, self._cached_tokens.get(number, 0))
            self._output_tokens += len(piece.token_ids)
            if piece.finish_reason is not None:
                self._finish_reasons.append(piece.finish_reason)

    def end(self, status: int) -> None:
        """status: of the answer."""
        from opentelemetry.trace import StatusCode

        self._span.set_attribute("http.response.status_code", status)
        if self._prompt_tokens:
            self._span.set_attributes(
                {
                    "gen_ai.usage.input_tokens": sum(self._prompt_tokens.values()),
                    "gen_ai.usage.cache_read.input_tokens": sum(self._cached_tokens.values()),
                    "gen_ai.usage.output_tokens": self._output_tokens,
                    "gen_ai.response.finish_reasons": self._finish_reasons,
                }
            )
        if self._first_s is not None:
            self._span.set_attribute("gen_ai.latency.time_to_first_token", self._first_s)
        if status >= 500:
            self._span.set_status(StatusCode.ERROR)
        self._span.end()


class TracedPieces:
    """Outputs whose span hears of them. Its interface is that of Pieces."""

    def __init__(self, pieces: Pieces, span: RequestSpan) -> None:
        self._pieces = pieces
        self._span = span

    async def __aenter__(self) -> Self:
        await self._pieces.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._pieces.__aexit__(kind, error, trace)

    async def next(self, write: Write | None = None) -> Batch | None:
        """See Outputs."""

        def write_traced(batch: Batch) -> bool:
            is_written = write is not None and write(batch)
            if is_written:
                self._span.take(batch)
            return is_written

        batch = await self._pieces.next(write_traced)
        if batch:
            self._span.take(batch)
        return batch
