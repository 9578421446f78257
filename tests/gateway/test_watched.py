"""What an operator sees of a server with a gateway: logs of every process as JSON, and its metrics."""

import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from graphgen.server.frontend.monitor import FRESH_S
from tests.serving import ServerProcess, serving

SECRET = "zebrafish"
"""In every prompt: no log may have it."""


@pytest.fixture(scope="module")
def collector() -> Iterator[tuple[str, list[bytes]]]:
    """Where spans are sent, and what has come."""
    came: list[bytes] = []

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            came.append(self.rfile.read(int(self.headers["content-length"])))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Collector) as listener:
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listener.server_port}/v1/traces", came
        listener.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, collector: tuple[str, list[bytes]]) -> Iterator[ServerProcess]:
    folder = tmp_path_factory.mktemp("server")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")  # milliseconds
        patch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
        with serving(folder, "--http", "127.0.0.1:0", "--log-format", "json", "--http-traces", collector[0]) as server:
            yield server


def post(server: ServerProcess, path: str, body: Any, name: str = "") -> tuple[int, str, bytes]:
    """Status, X-Request-Id and body of the answer."""
    headers = {"x-request-id": name} if name else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(server.url + path, data, headers), timeout=200) as answer:
            return answer.status, answer.headers["x-request-id"], answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers["x-request-id"], error.read()


def complete(server: ServerProcess, name: str, **further: Any) -> tuple[int, str, bytes]:
    return post(server, "/v1/completions", {"prompt": f"A {SECRET}:", "max_tokens": 8, **further}, name)


def lines_of(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


def value(server: ServerProcess, name: str) -> float:
    """Of a metric without labels."""
    text = post(server, "/metrics", None)[2].decode()
    return float(next(line for line in text.splitlines() if line.startswith(f"{name} ")).split()[1])


def folder_of(server: ServerProcess) -> Path:
    """The engine's, with the logs of its processes."""
    arguments = Path(f"/proc/{server.pid_of('graphgen.scheduler')}/cmdline").read_bytes().split(b"\0")
    return Path(os.fsdecode(arguments[arguments.index(b"graphgen.scheduler") + 1]))


def test_a_span_of_each_request_goes_where_it_is_asked_for(
    server: ServerProcess, collector: tuple[str, list[bytes]]
) -> None:
    status, _, _ = complete(server, "traced-7")
    assert status == 200
    deadline_s = time.monotonic() + 20
    while not any(b"traced-7" in sent for sent in collector[1]):
        assert time.monotonic() < deadline_s, "no span came"
        time.sleep(0.05)
    (sent,) = (sent for sent in collector[1] if b"traced-7" in sent)
    assert b"text_completion demo" in sent
    assert b"gen_ai.usage.output_tokens" in sent
    assert SECRET.encode() not in b"".join(collector[1])


def test_a_request_is_known_by_its_name_to_the_end(server: ServerProcess) -> None:
    status, name, _ = complete(server, "trace-7/a")
    assert (status, name) == (200, "trace-7/a")
    found: list[dict[str, Any]] = []
    deadline_s = time.monotonic() + 10  # the line comes after the answer
    while not found and time.monotonic() < deadline_s:
        time.sleep(0.05)
        found = [line for line in lines_of(server.output) if line.get("request_id") == "trace-7/a"]
    (line,) = found
    assert (line["logger"], line["process"], line["level"]) == ("graphgen.requests", "supervisor", "INFO")
    assert (line["output_tokens"], line["finish"], line["address"]) == (8, "length", "127.0.0.1")
    assert line["prompt_tokens"] > 0


@pytest.mark.parametrize("name", ["x" * 129, "a b", "a\tb", "é"])
def test_a_name_that_logs_cannot_hold_is_replaced(server: ServerProcess, name: str) -> None:
    assert complete(server, name)[1].startswith("req-")


def test_every_answer_has_a_name_also_a_refusal(server: ServerProcess) -> None:
    assert complete(server, "wrong", temperature=-1)[:2] == (400, "wrong")
    assert post(server, "/no/such/path", None, "nowhere")[:2] == (404, "nowhere")
    assert post(server, "/health", None)[1].startswith("req-")


def test_metrics_are_those_of_what_was_served(server: ServerProcess) -> None:
    names = ("graphgen_output_tokens_total", "graphgen_inter_token_latency_seconds_count", "graphgen_steps_total")
    before = [value(server, name) for name in names]
    complete(server, "")
    time.sleep(2 * FRESH_S)  # so long an answer of the engine serves again, and the request may have taken less
    tokens, gaps, steps = (value(server, name) - one for name, one in zip(names, before, strict=True))
    assert (tokens, gaps) == (8, 7)
    assert steps >= 8
    assert value(server, "graphgen_engine_serves") == 1


def test_logs_are_json_and_name_the_requests_of_a_dead_worker_and_say_nothing_of_prompts(server: ServerProcess) -> None:
    """The last test of this server: its worker dies."""
    with ThreadPoolExecutor(1) as pool:
        open_one = pool.submit(complete, server, "victim", max_tokens=200)
        while value(server, "graphgen_requests_running") == 0:
            assert not open_one.done(), "it ended before anybody saw it"
        os.kill(int((folder_of(server) / "worker-0.pid").read_text()), signal.SIGKILL)
        assert open_one.result()[0] == 200
    post(server, "/v1/chat/completions", {"messages": [{"role": SECRET, "content": SECRET}]})
    post(server, "/v1/completions", {"prompt": [SECRET]})
    post(server, "/v1/completions", {"prompt": SECRET * 5000})
    logs = {path.name: path.read_text() for path in folder_of(server).glob("*.log")}
    assert {"scheduler.log", "frontend-0.log", "gateway-0.log"} <= set(logs)
    assert not [name for name, text in logs.items() if SECRET in text]
    assert SECRET not in server.output
    said = [line for name in ("scheduler.log", "frontend-0.log", "gateway-0.log") for line in lines_of(logs[name])]
    assert any(line["process"] == "scheduler" and line["message"] == "it computed requests victim" for line in said)
    assert any("a new worker serves" in line["message"] for line in lines_of(server.output))
