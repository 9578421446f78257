"""Spans of requests: what they say, whose child they are, and that there is nothing of them where nobody asked."""

import subprocess
import sys
from collections.abc import Mapping
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from graphgen import NumericalError
from graphgen.gateway.tracing import Tracing
from graphgen.ipc.errors import ConfigError
from graphgen.server.http_address import check_traces
from tests.gateway.asgi import GatewayCore, call, fails, says

CHATS = "/v1/chat/completions"
HELLO: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


def span_of(path: str, body: Any, core: GatewayCore | None = None, **further: Any) -> ReadableSpan:
    kept = InMemorySpanExporter()
    tracing = Tracing(SimpleSpanProcessor(kept))
    call(core or GatewayCore(says("a", "b", finish="stop")), path, body, tracing=tracing, **further)
    (span,) = kept.get_finished_spans()
    return span


def attributes(span: ReadableSpan) -> Mapping[str, Any]:
    assert span.attributes is not None
    return span.attributes


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("path", "body", "operation"),
    [
        (CHATS, {**HELLO, "max_tokens": 9}, "chat"),
        ("/v1/completions", {"prompt": "Hi", "max_tokens": 9}, "text_completion"),
        ("/v1/responses", {"input": "Hi", "max_output_tokens": 9}, "chat"),
        ("/v1/messages", {**HELLO, "max_tokens": 9}, "chat"),
    ],
)
def test_a_span_says_what_was_asked_and_what_came(path: str, body: Any, operation: str, stream: bool) -> None:
    span = span_of(path, {**body, "temperature": 0.5, "stream": stream}, headers={"x-request-id": "r7"})
    found = dict(attributes(span))
    assert found.pop("gen_ai.latency.time_to_first_token") > 0
    assert (span.name, span.kind, span.status.status_code) == (f"{operation} fake", SpanKind.SERVER, StatusCode.UNSET)
    assert found == {
        "http.request.method": "POST",
        "http.route": path,
        "http.response.status_code": 200,
        "graphgen.request_id": "r7",
        "gen_ai.operation.name": operation,
        "gen_ai.provider.name": "graphgen",
        "gen_ai.request.model": "fake",
        "gen_ai.request.choice.count": 1,
        "gen_ai.request.max_tokens": 9,
        "gen_ai.request.temperature": 0.5,
        "gen_ai.request.presence_penalty": 0.0,
        "gen_ai.request.frequency_penalty": 0.0,
        "gen_ai.usage.input_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 2,
        "gen_ai.usage.output_tokens": 2,
        "gen_ai.response.finish_reasons": ("stop",),
    }


def test_it_is_the_child_of_the_span_that_the_client_names() -> None:
    span = span_of(CHATS, HELLO, headers={"traceparent": PARENT})
    assert span.parent is not None
    assert f"{span.context.trace_id:032x}-{span.parent.span_id:016x}" == PARENT[3:-3]
    assert span_of(CHATS, HELLO, headers={"traceparent": "00-nonsense"}).parent is None


def test_failures_and_requests_without_outputs_have_spans_and_probes_have_none() -> None:
    span = span_of(CHATS, {**HELLO, "temperature": -1})
    assert (span.name, attributes(span)["http.response.status_code"]) == (f"POST {CHATS}", 400)
    assert span.status.status_code is StatusCode.UNSET
    span = span_of(CHATS, HELLO, GatewayCore(fails(NumericalError("x"))))
    assert (attributes(span)["http.response.status_code"], span.status.status_code) == (500, StatusCode.ERROR)
    assert span_of("/tokenize", {"prompt": "Hi"}).name == "POST /tokenize"
    with pytest.raises(ValueError, match="not enough values"):
        span_of("/health", None, method="GET")


def test_nothing_of_it_is_loaded_where_nobody_asked() -> None:
    code = "import sys, graphgen.gateway.process; sys.exit(any('opentelemetry' in name for name in sys.modules))"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False).returncode == 0


def test_spans_go_to_a_url() -> None:
    check_traces(None)
    check_traces("http://127.0.0.1:4318/v1/traces")
    with pytest.raises(ConfigError, match=r"http_traces is 127\.0\.0\.1:4318: give a URL"):
        check_traces("127.0.0.1:4318")
