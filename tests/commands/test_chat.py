"""`graphgen chat` keeps the history, `graphgen generate` applies the template, and errors do not end a conversation."""

import contextlib
import functools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from graphgen import Chat, Engine, EngineConfig, InvalidRequestError, PromptTooLongError, SamplingParams
from graphgen.calls.calls import Calls
from graphgen.calls.outputs import Sink, StreamPiece
from graphgen.commands import cli
from graphgen.commands.chat import Conversation, check_chat, converse, write_reply
from graphgen.ipc.errors import EngineDeadError
from tests.commands.in_process import run_here
from tests.commands.test_cli import SMALL
from tests.fakes import FakeCore
from tests.frontend.harness import demo_tokenizer


class Parrot(FakeCore):
    """Answers with the last message and its place in the chat. "fail" is refused, "die" ends the engine."""

    def answer(self, sinks: Sequence[Sink], num_samples: int, streams: bool) -> None:
        prompt = self.prompts[-1]
        assert isinstance(prompt, Chat)
        text = prompt.messages[-1]["content"]
        if text == "fail":
            raise PromptTooLongError("too long")
        if text == "die":
            raise EngineDeadError("dead")
        roles = "".join(message["role"][0] for message in prompt.messages)
        for piece in (StreamPiece(f"{text} ", (1, 2), None), StreamPiece(roles, (3,), "stop")):
            sinks[0](piece)


def talk(lines: Sequence[str], system: str | None = None) -> tuple[list[str], list[str]]:
    """(what the model said, what else was told)."""
    written: list[str] = []
    told: list[str] = []
    conversation = Conversation(Calls(Parrot()), SamplingParams(), system)
    converse(conversation, iter(lines), written.append, told.append)
    return "".join(written).splitlines(), told


def test_the_model_sees_the_whole_conversation() -> None:
    assert talk(["one", "", "two", "three"])[0] == ["one u", "two uau", "three uauau"]
    assert talk(["one", "two"], system="Be brief.")[0] == ["one su", "two suau"]


def test_commands_begin_anew_and_end() -> None:
    said, told = talk(["one", "/clear", "two", "/system Be brief.", "three", "/clear", "four", "/exit", "five"])
    assert said == ["one u", "two u", "three su", "four su"]
    assert not told
    assert talk(["/system", "one"], system="Be brief.")[0] == ["one u"]


def test_what_only_looks_like_a_command_is_said_or_told() -> None:
    said, told = talk(["/usr/bin is a folder", "/claer", "/help"])
    assert said == ["/usr/bin is a folder u"]
    assert told[0].startswith("there is no /claer: /clear begins anew")
    assert told[1].startswith("/clear begins anew")


def test_a_turn_that_fails_leaves_the_conversation_as_it_was() -> None:
    said, told = talk(["one", "fail", "two"])
    assert said == ["one u", "two uau"]
    assert told == ["too long; /clear begins anew"]


def test_a_dead_engine_ends_the_conversation() -> None:
    with pytest.raises(EngineDeadError):
        talk(["one", "die", "two"])


def test_ctrl_c_ends_the_reply_alone_and_frees_its_request() -> None:
    core = Parrot()
    written: list[str] = []

    def write(text: str) -> None:
        written.append(text)
        raise KeyboardInterrupt

    reply = write_reply(Calls(core), Chat([{"role": "user", "content": "one"}]), SamplingParams(), write)
    assert (reply.text, reply.num_tokens, reply.reason) == ("one ", 2, None)
    assert core.cancelled == [0]


@pytest.mark.parametrize(("template", "says"), [(None, "--chat-template"), ("{% nonsense %}", "cannot be read")])
def test_a_model_that_cannot_chat_says_why(template: str | None, says: str) -> None:
    with pytest.raises(InvalidRequestError, match=says):
        check_chat(demo_tokenizer(template))


# --- the commands ------------------------------------------------------------------------------------------------

Run = Callable[..., "subprocess.CompletedProcess[str]"]
GREEDY = ("--max-tokens", "12", "--temperature", "0", *SMALL)


class Engines(contextlib.ExitStack):
    """Stands for `Engine`: commands that ask for the same one share it, since each takes seconds to start."""

    def __init__(self) -> None:
        super().__init__()
        self._started: list[tuple[EngineConfig, Engine]] = []

    def __call__(self, config: EngineConfig) -> contextlib.AbstractContextManager[Engine]:
        for other, engine in self._started:
            if other == config:
                return contextlib.nullcontext(engine)
        self._started.append((config, self.enter_context(Engine(config))))
        return self(config)


@pytest.fixture(scope="module")
def engines() -> Iterator[Engines]:
    with Engines() as engines:
        yield engines


@pytest.fixture
def run(engines: Engines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    monkeypatch.setattr(cli, "Engine", engines)
    return functools.partial(run_here, monkeypatch=monkeypatch, capsys=capsys)


def test_generate_applies_the_template_unless_it_is_raw(run: Run, tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{% for m in messages %}{{ m.role|upper }}:\n{{ m.content }}\n\n{% endfor %}ROMEO:")
    options = (*GREEDY, "--chat-template", str(template))
    applied = run(["generate", "Good morrow", *options])
    raw = run(["generate", "USER:\nGood morrow\n\nROMEO:", "--raw", *options])
    chat = run(["chat", "-", *options], stdin="Good morrow")
    talk = run(["chat", "--system", "Be brief.", *options], stdin="/system\nGood morrow\n")
    assert applied.returncode == raw.returncode == chat.returncode == talk.returncode == 0, applied.stderr
    assert len(applied.stdout) > 5
    assert applied.stdout == raw.stdout == chat.stdout == talk.stdout
    assert chat.stderr.startswith("12 tokens, finished by length; ")


def test_the_embedded_model_chats_offline_and_goes_on_with_a_text(run: Run) -> None:
    chat = run(["chat", "Good morrow", *GREEDY])
    rendered = run(["generate", "USER:\nGood morrow\n\nASSISTANT:\n", *GREEDY])
    assert chat.returncode == rendered.returncode == 0, chat.stderr
    assert chat.stdout == rendered.stdout
    assert len(chat.stdout) > 5


def test_chat_with_a_model_that_has_no_template_is_one_message(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = SimpleNamespace(tokenizer=demo_tokenizer(None))
    monkeypatch.setattr(cli, "Engine", lambda config: contextlib.nullcontext(engine))
    done = run(["chat", "hello", *SMALL])
    assert done.returncode == 2
    assert "graphgen: the model has no chat template: name a chat model" in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
