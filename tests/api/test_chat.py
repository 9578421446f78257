"""Chats on the embedded model: what is rendered, and engines without a template or a tokenizer."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from graphgen import Chat, Engine, InvalidRequestError, SamplingParams, demo
from graphgen.ipc.errors import CheckpointError
from graphgen.launch.config import EngineConfig
from graphgen.requests.core import launch_config, load_config_tokenizer

TEMPLATE = "{% for tool in tools or [] %}{{ tool.function.name }}\n{% endfor %}{% if aside %}(Aside)\n{% endif %}" + (
    "{% for m in messages %}{{ m.role|upper }}:\n{{ m.content }}\n\n{% endfor %}ROMEO:"
)
HELLO = [{"role": "user", "content": "Good morrow"}]
GREEDY = SamplingParams(max_tokens=8, temperature=0)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    template = tmp_path_factory.mktemp("chat") / "template.jinja"
    template.write_text(TEMPLATE)
    with Engine(device="cpu", token_budget=32, num_pages=160, cpu_threads=1, chat_template=str(template)) as engine:
        yield engine


def test_a_chat_is_the_output_of_its_rendered_text(engine: Engine) -> None:
    rendered = "USER:\nGood morrow\n\nROMEO:"
    (want,) = engine.generate(rendered, GREEDY)
    (got,) = engine.chat(HELLO, GREEDY)
    assert engine.tokenizer.render_chat(HELLO) == rendered
    assert list(got.prompt_token_ids) == engine.tokenizer.encode(rendered)
    assert (got.token_ids, got.text) == (want.token_ids, want.text)
    assert "".join(piece.text for piece in engine.stream(HELLO, GREEDY)) == want.text
    assert engine.tokenizer.decode(got.token_ids) == got.text


def test_arguments_of_a_chat_reach_its_template(engine: Engine) -> None:
    tools, switches = [{"type": "function", "function": {"name": "sing"}}], {"aside": True}
    rendered = engine.tokenizer.render_chat(HELLO, tools, None, switches)
    assert rendered == "sing\n(Aside)\nUSER:\nGood morrow\n\nROMEO:"
    (want,) = engine.generate(rendered, GREEDY)
    (got,) = engine.chat(HELLO, GREEDY, tools=tools, chat_template_kwargs=switches)
    assert (got.prompt_token_ids, got.text) == (want.prompt_token_ids, want.text)
    chat = Chat(HELLO, tools, chat_template_kwargs=switches)
    assert "".join(piece.text for piece in engine.stream(chat, GREEDY)) == want.text


def test_a_model_without_a_template_refuses_chats_and_names_the_remedy(tmp_path: Path) -> None:
    shutil.copytree(demo.model_folder(), tmp_path / "bare", ignore=shutil.ignore_patterns("*.jinja"))
    config = EngineConfig(model=str(tmp_path / "bare"), device="cpu")
    launch = launch_config(config)
    tokenizer = load_config_tokenizer(config, launch)
    assert tokenizer is not None
    with pytest.raises(InvalidRequestError, match="chat_template="):
        tokenizer.encode_chat(HELLO)
    with pytest.raises(CheckpointError, match="nosuch"):
        load_config_tokenizer(msgspec.structs.replace(config, chat_template="nosuch"), launch)
    assert load_config_tokenizer(msgspec.structs.replace(config, tokenizer="none"), launch) is None


def test_token_ids_are_served_without_a_tokenizer(engine: Engine) -> None:
    (want,) = engine.generate("Good morrow", GREEDY)
    with Engine(device="cpu", token_budget=32, num_pages=160, cpu_threads=1, tokenizer="none") as bare:
        (got,) = bare.generate(list(want.prompt_token_ids), GREEDY)
        assert (got.token_ids, got.text) == (want.token_ids, "")
        for refused in (lambda: bare.generate("hi"), lambda: bare.chat(HELLO), lambda: bare.tokenizer):
            with pytest.raises(InvalidRequestError, match='"none" serves token ids alone'):
                refused()
        with pytest.raises(InvalidRequestError, match="stop strings need a tokenizer"):
            bare.generate([1], SamplingParams(stop="x"))
