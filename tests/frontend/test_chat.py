"""The frontend's tokenizer and templates, which know no transformers, do what transformers does."""

from typing import Any

import pytest

from graphgen.ipc.errors import InvalidRequestError
from graphgen.requests.portable_tokenizer import ChatTemplate, RustTokenizer, read_tokenizer, write_tokenizer
from tests.requests import tokenizers_for_tests

LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}{% set content = '<|start_header_id|>' +"
    " message['role'] + '<|end_header_id|>\n\n'+ message['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}
"""
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% endfor %}"
)
WITH_JSON = (
    "{% for message in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ message | tojson }}{% endfor %}"
)
CHAT = [
    {"role": "user", "content": " Wer <da>? é "},
    {"role": "assistant", "content": "Niemand"},
    {"role": "user", "content": "Gut & schön"},
]


@pytest.mark.parametrize("template", [LLAMA_3, CHATML, MISTRAL, WITH_JSON])
def test_a_chat_is_rendered_as_transformers_renders_it(template: str) -> None:
    hugging_face: Any = tokenizers_for_tests.sentencepiece_style()._hf
    expected = hugging_face.apply_chat_template(
        CHAT, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    special_tokens = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert ChatTemplate(template, special_tokens).render(CHAT) == expected


def test_a_template_may_refuse_a_chat() -> None:
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        ChatTemplate(MISTRAL, {"bos_token": "", "eos_token": ""}).render(CHAT[1:])


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    with pytest.raises(InvalidRequestError):
        ChatTemplate(template, {}).render(CHAT)


@pytest.mark.parametrize("style", sorted(tokenizers_for_tests.ALL))
def test_the_portable_tokenizer_is_the_models_own(style: str) -> None:
    own = tokenizers_for_tests.ALL[style]()
    portable = own.export()
    assert portable is not None
    moved = RustTokenizer(portable)
    assert moved.byte_token_ids == own.byte_token_ids
    texts = ["Hello the a!", "", "é 😀 b.", "<s>the</s>"]
    assert moved.encode(texts) == own.encode(texts)
    for ids in own.encode(texts):
        for skip in (True, False):
            assert moved.decode(ids, skip) == own.decode(ids, skip)


def test_the_portable_tokenizer_is_written_whole(tmp_path: Any) -> None:
    for portable in (None, tokenizers_for_tests.sentencepiece_style().export()):
        write_tokenizer(portable, tmp_path)
        assert read_tokenizer(tmp_path) == portable


def test_lone_surrogates_are_refused() -> None:
    portable = tokenizers_for_tests.byte_level().export()
    assert portable is not None
    with pytest.raises(InvalidRequestError, match="surrogates"):
        RustTokenizer(portable).encode(["\ud800"])
