"""What Open WebUI sends, as its source has it (backend/open_webui/routers/openai.py and utils/payload.py), and what it
reads of the answers: a chat, its title, and the list of models."""

from typing import Any

import pytest

from graphgen import Chat
from tests.gateway.asgi import GatewayCore, Reply, call, says

HEADERS = {
    "authorization": "Bearer sk-none",
    "content-type": "application/json",
    "x-openwebui-user-name": "Ann%20B",
    "x-openwebui-user-id": "7c0e",
    "x-openwebui-user-email": "ann@example.org",
    "x-openwebui-user-role": "user",
    "x-openwebui-chat-id": "b1",
}
CHAT: dict[str, Any] = {
    "stream": True,
    "model": "fake",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Good morrow"},
        {"role": "user", "content": [{"type": "text", "text": "And now?"}]},
    ],
    "stream_options": {"include_usage": True},
    "temperature": 0.8,
    "top_p": 0.9,
    "min_p": 0.05,
    "max_tokens": 128,
    "frequency_penalty": 0.1,
    "presence_penalty": 0.2,
    "reasoning_effort": "medium",
    "seed": 0,
    "stop": ["\n\n", "USER:"],
    "user": {"name": "Ann B", "id": "7c0e", "email": "ann@example.org", "role": "user"},
}
TITLE: dict[str, Any] = {
    "model": "fake",
    "messages": [{"role": "user", "content": "### Task:\nGenerate a title as JSON."}],
    "stream": False,
    "max_completion_tokens": 1000,
}


def ask(path: str, body: object = None, method: str = "POST") -> tuple[GatewayCore, Reply]:
    core = GatewayCore(says("Good ", "morrow", finish="stop"))
    return core, call(core, path, body, method, headers=HEADERS)


def test_a_chat_is_streamed_as_it_reads_it() -> None:
    core, reply = ask("/v1/chat/completions", CHAT)
    assert (reply.status, "text/event-stream" in reply.headers["content-type"]) == (200, True)
    *chunks, done = reply.events
    assert done == "[DONE]"
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks if chunk["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "Good morrow"
    assert chunks[-1]["usage"]["total_tokens"] == 7
    (chat,) = core.prompts
    assert isinstance(chat, Chat)
    assert [message["content"] for message in chat.messages] == ["Be brief.", "Hi", "Good morrow", "And now?"]


def test_titles_tags_and_questions_are_whole_answers() -> None:
    _, reply = ask("/v1/chat/completions", TITLE)
    assert reply.json["choices"][0]["message"]["content"] == "Good morrow"


def test_it_finds_the_model_by_its_id() -> None:
    _, reply = ask("/v1/models", method="GET")
    assert [model["id"] for model in reply.json["data"]] == ["fake"]


@pytest.mark.parametrize("path", ["/v1/audio/speech", "/v1/embeddings", "/v1/images/generations"])
def test_what_is_not_served_is_an_error_that_it_shows(path: str) -> None:
    _, reply = ask(path, {"model": "fake", "input": "x"})
    assert (reply.status, reply.error["code"]) == (404, "not_found")
    assert path in reply.error["message"]
