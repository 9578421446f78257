"""Chats are rendered as transformers renders them, by templates that stay in their sandbox and say what is wrong."""

import json
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from graphgen.ipc.errors import InvalidRequestError
from graphgen.requests.chat_template import ChatSource, ChatTemplate

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
TEMPLATES = {
    "llama 3": LLAMA_3,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "break": "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}\n  {% generation %}\n  {{ m.content }}A\n"
    "{% endgeneration %}\n{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "generation, trimmed": "{%- generation -%}\n A: \n{%- endgeneration -%} {{ messages[0].content }}",
    "tools": "{% if tools is not none %}TOOLS{{ tools|length }}{% endif %}{{ messages[0].content }}",
    "tools defined": "{{ tools is defined }}{{ documents is defined }}{{ tools }}{{ documents }}",
    "documents": "{% if documents is none %}no{% else %}DOCUMENTS{% endif %}",
    "separators": "{{ {'b': 1, 'a': [1, 'é']}|tojson(separators=(',', ':')) }}",
    "indent": "{{ {'b': 1, 'a': [1, '<é>']}|tojson(indent=2) }}{{ messages|tojson(indent='\t') }}",
    "ascii": "{{ messages|tojson(ensure_ascii=True) }}{{ messages|tojson(ensure_ascii=False, sort_keys=True) }}",
    "positional": "{{ messages|tojson(True, 1, (',', ':'), True) }}",
    "namespace": "{% set found = namespace(n=0, self=2) %}{% for m in messages %}{% set found.n = found.n + 1 %}"
    "{% endfor %}{{ found.n }}{{ found.self }}",
    "dict": "{% set d = dict(a=1, **{'b': 2}) %}{{ d.a + d['b'] }}{{ dict.fromkeys(['x'], 0) }}"
    "{{ dict([('k', 1)]).k }}",
    "undefined": "{{ nothing }}{% if enable_thinking is defined %}T{% endif %}{{ messages[0].name }}{{ messages[9] }}",
    "time": "{{ strftime_now('%Y-%m') }}",
    "strings": "{{ messages[0]['content'].split('d')[0].strip() }}{{ messages[-1].content|upper }}"
    "{{ '%s!' % messages[0].role }}",
}
CHAT = [
    {"role": "user", "content": " Wer <da>? é "},
    {"role": "assistant", "content": "Niemand"},
    {"role": "user", "content": "Gut & schön"},
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def chat_template(text: str) -> ChatTemplate:
    return ChatTemplate(ChatSource(text, "chat_template.jinja in /models/some"), SPECIAL)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_is_rendered_as_transformers_renders_it(name: str) -> None:
    reference: Any = render_jinja_template
    (expected,), _ = reference([CHAT], chat_template=TEMPLATES[name], add_generation_prompt=True, **SPECIAL)
    assert chat_template(TEMPLATES[name]).render(CHAT) == expected


TOOLS = [
    {"type": "function", "function": {"name": "add", "description": "Adds <é>", "parameters": {"type": "object"}}},
    {"type": "function", "function": {"name": "now"}},
]
DOCUMENTS = [{"title": "Über", "text": "eins"}]
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "2+2?", "name": "Ann"},
    {
        "role": "assistant",
        "content": "",
        "reasoning_content": "Hm.",
        "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": "é"}}}],
    },
    {"role": "tool", "content": "4", "tool_call_id": "c1"},
]
WITH_ARGUMENTS = {
    "chatml with tools": "{% if tools %}{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}<think>{{ m.reasoning_content }}</think>"
    "{% endif %}{{ m.content }}{% for call in m.tool_calls %}<tool_call>{{ call.function | tojson }}</tool_call>"
    "{% endfor %}{{ m.tool_call_id }}\n{% endfor %}",
    "arguments one by one": "{{ tools|length }}{% for m in messages %}{% for call in m.tool_calls or [] %}"
    "{% for name, value in call.function.arguments.items() %}{{ name }}={{ value }},{% endfor %}{% endfor %}"
    "{% endfor %}",
    "documents": "{{ tools|length }}{% for one in documents %}{{ one.title }}: {{ one['text'] }}{% endfor %}",
    "switches": "{{ tools|length }}{% if enable_thinking is defined and not enable_thinking %}<think></think>"
    "{% endif %}{{ effort }}{{ nothing }}{{ documents|length }}",
}


@pytest.mark.parametrize("name", WITH_ARGUMENTS)
def test_tools_documents_and_switches_reach_a_template_as_those_of_transformers_do(name: str) -> None:
    reference: Any = render_jinja_template
    switches: dict[str, Any] = {"enable_thinking": False, "effort": "low", "unknown": 3}
    (expected,), _ = reference(
        [CALLED],
        tools=TOOLS,
        documents=DOCUMENTS,
        chat_template=WITH_ARGUMENTS[name],
        add_generation_prompt=True,
        **SPECIAL,
        **switches,
    )
    documents = DOCUMENTS if "documents" in WITH_ARGUMENTS[name] else None
    assert chat_template(WITH_ARGUMENTS[name]).render(CALLED, TOOLS, documents, switches) == expected


@pytest.mark.parametrize("name", ["messages", "tools", "bos_token", "add_generation_prompt"])
def test_a_switch_cannot_take_the_place_of_what_the_server_gives(name: str) -> None:
    with pytest.raises(InvalidRequestError, match=f"^chat_template_kwargs has {name}, which no request may set"):
        chat_template(f"{{{{ {name} }}}}").render(CHAT, chat_template_kwargs={name: "x"})


@pytest.mark.parametrize("name", ["raise_exception", "range", "self", "_x", "loop"])
def test_a_switch_with_the_name_of_something_else_changes_nothing(name: str) -> None:
    text = "{% for m in messages %}{{ loop.index }}{% endfor %}{{ range(2)|list }}{{ raise_exception is defined }}"
    assert chat_template(text).render(CHAT, chat_template_kwargs={name: "x"}) == chat_template(text).render(CHAT)


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_what_a_template_would_not_read_is_refused(name: str) -> None:
    given: dict[str, Any] = {name: [{"type": "function"}]}
    with pytest.raises(InvalidRequestError, match=f"does not read {name}.*chat_template="):
        chat_template(CHATML).render(CHAT, **given)
    assert chat_template(CHATML).render(CHAT, tools=[]) == chat_template(CHATML).render(CHAT)


def test_the_cases_that_were_wrong() -> None:
    chat = [{"role": "user", "content": "hi"}]
    generation = "{% generation %}A:{% endgeneration %}{{ messages[0].content }}"
    assert chat_template(generation).render(chat) == "A:hi"
    assert chat_template(TEMPLATES["tools"]).render(chat) == "hi"
    assert chat_template("{{ {'a': 1}|tojson(separators=(',', ':')) }}").render(chat) == '{"a":1}'
    assert json.loads(chat_template("{{ messages|tojson(indent=1) }}").render(chat)) == chat


def test_a_template_may_refuse_a_chat_and_the_error_lists_its_roles() -> None:
    with pytest.raises(InvalidRequestError, match=r"refuses.*: roles must alternate \(their roles: assistant, user\)"):
        chat_template(MISTRAL).render(CHAT[1:])


@pytest.mark.parametrize("broken", ["{% for %}", "\n{{ messages[0] ", "{% generation %}", "{{ messages|nosuch }}"])
def test_a_template_that_does_not_parse_says_where_it_is_and_refuses_every_chat(broken: str) -> None:
    template = chat_template(broken)
    assert "chat_template.jinja in /models/some" in template.fault
    with pytest.raises(InvalidRequestError, match=r"chat_template.jinja in /models/some.*line \d") as caught:
        template.render(CHAT)
    assert "role" not in str(caught.value)


@pytest.mark.parametrize("failing", ["{{ messages[0].content + 1 }}", "{{ nothing.here }}", "{{ 1 // 0 }}"])
def test_a_template_that_fails_does_not_blame_the_messages(failing: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"chat_template.jinja in /models/some\) fails with") as caught:
        chat_template(failing).render(CHAT)
    assert "role" not in str(caught.value)


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__ }}",
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ namespace(__init__=1) }}",
        "{% set found = namespace() %}{% set found.__class__ = 1 %}",
        "{{ dict.mro() }}",
    ],
)
def test_a_template_stays_in_its_sandbox(template: str) -> None:
    with pytest.raises(InvalidRequestError):
        chat_template(template).render(CHAT)
