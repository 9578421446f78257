"""Texts and chats as tokens, and tokens as text, at the gateway."""

from typing import Any

import pytest

from graphgen import PromptTooLongError
from tests.gateway.asgi import GatewayCore, call, says

TOKENIZE, DETOKENIZE = "/tokenize", "/detokenize"
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}]}


@pytest.mark.parametrize(
    ("body", "tokens"),
    [
        ({"prompt": "Hi"}, [1, 72, 105]),
        ({"prompt": "Hi", "add_special_tokens": False}, [72, 105]),
        ({"prompt": "", "add_special_tokens": False}, []),
        ({**CHAT, "model": "fake"}, [1, 72, 105]),
    ],
)
def test_a_prompt_is_told_as_tokens(body: dict[str, Any], tokens: list[int]) -> None:
    core = GatewayCore(says("x"))
    reply = call(core, TOKENIZE, body)
    assert reply.status == 200
    assert reply.json == {"count": len(tokens), "max_model_len": 100, "tokens": tokens, "token_strs": None}
    assert core.tenants == ["192.0.2.7"], "it counts to who asked"


def test_tokens_are_told_as_text() -> None:
    core = GatewayCore(says("x"))
    assert call(core, DETOKENIZE, {"tokens": [72, 105]}).json == {"prompt": "Hi"}
    assert call(core, DETOKENIZE, {"tokens": []}).json == {"prompt": ""}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        (TOKENIZE, {}, "prompt"),
        (TOKENIZE, {**CHAT, "prompt": "Hi"}, "prompt"),
        (TOKENIZE, {**CHAT, "add_generation_prompt": False}, "add_generation_prompt"),
        (TOKENIZE, {**CHAT, "continue_final_message": True}, "add_generation_prompt"),
        (TOKENIZE, {**CHAT, "add_special_tokens": True}, "add_special_tokens"),
        (TOKENIZE, {"prompt": "Hi", "return_token_strs": True}, "return_token_strs"),
        (TOKENIZE, {"messages": [{"role": 1}]}, "messages"),
        (DETOKENIZE, {"tokens": [1.5]}, "tokens"),
        (DETOKENIZE, {"tokens": "Hi"}, "tokens"),
    ],
)
def test_what_is_no_prompt_and_no_tokens_is_refused(path: str, body: dict[str, Any], param: str) -> None:
    reply = call(GatewayCore(says("x")), path, body)
    assert (reply.status, reply.error["param"]) == (400, param)


class FullCore(GatewayCore):
    """No prompt is short enough."""

    def read_prompt(self, *_: Any, **__: Any) -> None:
        raise PromptTooLongError("9 tokens")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [(TOKENIZE, {"prompt": "Hi"}, "prompt"), (TOKENIZE, CHAT, "messages"), (DETOKENIZE, {"tokens": [1]}, "tokens")],
)
def test_what_is_too_long_is_told_by_the_name_of_its_field(path: str, body: dict[str, Any], param: str) -> None:
    reply = call(FullCore(says("x")), path, body)
    assert (reply.status, reply.error["code"], reply.error["param"]) == (400, "context_length_exceeded", param)


def test_another_model_has_other_tokens() -> None:
    for path, body in ((TOKENIZE, {"prompt": "Hi"}), (DETOKENIZE, {"tokens": []})):
        reply = call(GatewayCore(says("x")), path, {**body, "model": "other"})
        assert (reply.status, reply.error["code"]) == (404, "model_not_found")


def test_special_tokens_and_template_are_told_where_there_is_a_tokenizer() -> None:
    info = {"bos_token": "<s>", "chat_template": "{{ x }}"}
    reply = call(GatewayCore(says("x")), "/tokenizer_info", method="GET", tokenizer_info=info)
    assert (reply.status, reply.json) == (200, info)
    assert call(GatewayCore(says("x")), "/tokenizer_info", method="GET").status == 404
