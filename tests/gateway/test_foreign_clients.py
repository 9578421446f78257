"""Clients of other people, unchanged, against `graphgen serve --http`: OpenAI's and the AI SDK in Node, LangChain.

Their packages are installed by `make clients`. Without them the tests are skipped, or fail where REQUIRE_CLIENTS is
set, as it is in continuous integration.
"""

import json
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from graphgen import Client, SamplingParams
from tests.serving import ServerProcess, serving

FOLDER = Path(__file__).parent / "clients"
PYTHON = FOLDER / ".venv" / "bin" / "python"
TIMEOUT_S = 120.0
FUZZ_S = int(os.environ.get("FUZZ_S", "60"))


def command_of(program: str) -> list[str]:
    """Skips, or fails, where what it needs is not installed."""
    node = shutil.which("node")
    has = PYTHON.exists() if program.endswith(".py") else node is not None and (FOLDER / "node_modules/openai").is_dir()
    if not has:
        reason = "unchanged clients are not installed: run `make clients`"
        if os.environ.get("REQUIRE_CLIENTS"):
            pytest.fail(reason)
        pytest.skip(reason)
    return [str(PYTHON) if program.endswith(".py") else "node", str(FOLDER / program)]


def environment() -> dict[str, str]:
    """Without this project's own modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def run(program: str, server: ServerProcess) -> dict[str, Any]:
    command = [*command_of(program), f"{server.url}/v1", "play"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment())
    assert done.returncode == 0, done.stderr
    said: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return said


def chat_of(ours: Client) -> str:
    (output,) = ours.chat([{"role": "user", "content": "Good morrow"}], SamplingParams(max_tokens=24, temperature=0.0))
    return output.text


def test_openais_package_in_node(server: ServerProcess, ours: Client) -> None:
    said, want = run("openai_node.js", server), chat_of(ours)
    assert (said["whole"], said["streamed"], said["response"]) == (want, want, want)
    assert (said["finish"], said["usage"]) == ("length", 24)
    (completion,) = ours.generate("ROMEO:", SamplingParams(max_tokens=8, temperature=0.0))
    assert said["completion"] == completion.text
    assert said["wrong"] == {
        "kind": "BadRequestError",
        "code": "invalid_request",
        "param": "temperature",
        "requests": 1,
    }
    assert (said["unknown"]["kind"], said["unknown"]["code"]) == ("NotFoundError", "model_not_found")
    assert (said["late"]["code"], said["late"]["requests"]) == ("deadline", 1), (
        "a missed deadline is not asked for again"
    )
    assert said["aborted"]["kind"] == "APIUserAbortError"
    deadline_s = time.monotonic() + 5
    while ours.stats().open_requests and time.monotonic() < deadline_s:
        time.sleep(0.05)
    assert ours.stats().open_requests == 0, "clients that left have ended their requests"


def test_the_ai_sdk(server: ServerProcess, ours: Client) -> None:
    said, want = run("ai_sdk.js", server), chat_of(ours)
    assert (said["whole"], said["streamed"]) == (want, want)
    assert (said["finish"], said["streamedFinish"]) == ("length", "length")
    assert (said["usage"], said["streamedUsage"]) == (24, 24)
    assert (said["unknown"]["status"], said["wrong"]["status"]) == (404, 400)


def test_langchain(server: ServerProcess, ours: Client) -> None:
    said, want = run("langchain_chat.py", server), chat_of(ours)
    assert (said["whole"], said["streamed"], said["finish"], said["usage"]) == (want, want, "length", 24)
    assert said["long"] == "OpenAIContextOverflowError"


@pytest.mark.timeout(FUZZ_S + 240)
def test_requests_made_from_the_openapi_document_find_no_fault(tmp_path: Path) -> None:
    """FUZZ_S says for how long."""
    st, _ = command_of("langchain_chat.py")
    checks = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"
    # Short answers: a request that is valid by chance would else be served for seconds.
    with serving(tmp_path, "--http", "127.0.0.1:0", "--max-model-len", "64", "--no-log-requests") as server:
        gateway = server.pid_of("graphgen.gateway")
        command = [str(Path(st).with_name("st")), "--no-color", "run", f"{server.url}/openapi.json"]
        options = ["--max-time", str(FUZZ_S), "--checks", checks, "--phases", "coverage,fuzzing", "--warnings", "off"]
        limits = ["--suppress-health-check", "all", "--request-timeout", "30"]
        done = subprocess.run(
            [*command, *options, *limits], capture_output=True, text=True, env=environment(), cwd=tmp_path
        )
        assert done.returncode == 0, done.stdout[-6000:]
        assert " passed" in done.stdout
        assert server.pid_of("graphgen.gateway") == gateway, "it is the one that was started"
        assert "Traceback" not in server.output
