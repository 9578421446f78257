"""Sentences of PROTOCOL.md that authors of clients asked for: each is there, and true."""

import re
from pathlib import Path

import msgspec
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers, processors

import graphgen.ipc
from graphgen import EngineConfig
from graphgen.ipc.codec import unpack_int32
from graphgen.ipc.engine_messages import Cancel as SchedulerCancel
from graphgen.ipc.engine_messages import Rejected, Submit
from graphgen.ipc.engine_messages import StatsRequest as SchedulerStatsRequest
from graphgen.ipc.ggp.messages import (
    Accepted,
    Bye,
    Cancel,
    ChatMessage,
    Delta,
    Done,
    Error,
    Generate,
    Health,
    HealthRequest,
    Hello,
    Ping,
    Pong,
    Sampling,
    Stats,
    StatsRequest,
    Welcome,
)
from graphgen.ipc.worker_messages import Probe
from graphgen.requests.chat_template import ChatSource
from graphgen.requests.tokenizer import Tokenizer, TokenizerData
from tests.fakes import STATS
from tests.frontend.conftest import MakeFrontend
from tests.frontend.harness import IDS, Frontend, RawClient, open_request

DOCUMENT = " ".join((Path(graphgen.ipc.__file__).parent / "PROTOCOL.md").read_text().split())
CONTEXT = 256
"""Of a model whose KV cache holds 512 positions: so that it is the context that limits."""


def says(sentence: str) -> bool:
    return sentence in DOCUMENT


def ask(frontend: Frontend, client: RawClient, prompt_len: int, **sampling: object) -> int | str:
    """The most tokens of output that the scheduler is told, or the code of the error."""
    fields = {"id": 1, "prompt_ids": [5] * prompt_len, "sampling": sampling}
    client.send_raw(b"GG\x01G", msgspec.msgpack.encode(fields))
    answer = client.receive()
    if isinstance(answer, Error):
        return answer.code
    assert isinstance(answer, Accepted)
    max_tokens = frontend.scheduler.expect(Submit).max_tokens
    client.send(Cancel(id=1))
    client.expect(Delta)
    client.expect(Done)
    frontend.scheduler.expect(SchedulerCancel)
    return max_tokens


def test_max_tokens_is_cut_to_the_context(make_frontend: MakeFrontend) -> None:
    assert says("A number above what the context leaves beside the prompt is cut to that without an error")
    frontend = make_frontend(engine=EngineConfig(device="cpu", max_model_len=CONTEXT))
    client = frontend.welcome()
    for wanted, got in ((155, 155), (156, 156), (157, 156), (2**31 - 1, 156), (None, 156)):
        assert ask(frontend, client, 100, max_tokens=wanted) == got
    assert ask(frontend, client, 100, max_tokens=500, min_tokens=156) == 156
    assert ask(frontend, client, 100, max_tokens=500, min_tokens=157) == "never_fits"


def test_what_the_kv_cache_cannot_hold_is_never_fits(frontend: Frontend) -> None:
    """Of the demo model's 1024 positions it has 512, and the last token needs none."""
    assert says("nil is cut to what the KV cache holds as well")
    client = frontend.welcome()
    assert ask(frontend, client, 100, max_tokens=413) == 413
    assert ask(frontend, client, 100, max_tokens=414) == "never_fits"
    assert ask(frontend, client, 100, max_tokens=None) == 413


def test_the_longest_prompt_is_one_less_than_the_context(make_frontend: MakeFrontend) -> None:
    assert says("The model's context: prompt and output of one sample together. The longest prompt is one less.")
    frontend = make_frontend(engine=EngineConfig(device="cpu", max_model_len=CONTEXT))
    client = frontend.connect()
    client.send(Hello())
    limit = client.expect(Welcome).limits.prompt_tokens
    assert limit == CONTEXT
    assert [ask(frontend, client, length) for length in (limit - 1, limit, limit + 1)] == [
        1,
        "never_fits",
        "never_fits",
    ]


def with_beginning() -> Tokenizer:
    """Words and a beginning-of-sequence token, which the tokenizer puts before a text, the template before a chat."""
    backend = Backend(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "?": 3}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.add_special_tokens(["<s>"])
    before = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    backend.post_processor = before
    source = ChatSource("{{ bos_token }}{% for m in messages %} {{ m.content }}{% endfor %}", "a test")
    return Tokenizer.of(TokenizerData(backend.to_str(), {"bos_token": "<s>"}, source))


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ({"text": "a b"}, [0, 1, 2]),
        ({"text": "<s> a b"}, [0, 1, 2]),
        ({"text": "<s> <s> a"}, [0, 0, 1]),
        ({"messages": [ChatMessage(role="user", content="a b")]}, [0, 1, 2]),
        ({"prompt_ids": [1, 2]}, [1, 2]),
        ({"prompt_u32": b"\x01\0\0\0\x02\0\0\0"}, [1, 2]),
    ],
    ids=lambda value: str(value)[:24],
)
def test_where_special_tokens_come_from(make_frontend: MakeFrontend, prompt: dict[str, object], ids: list[int]) -> None:
    assert says("a text that begins with the beginning-of-sequence token written out gets no second one")
    assert says("`messages` become what the chat template writes, and nothing more")
    frontend = make_frontend(tokenizer=with_beginning())
    client = frontend.welcome()
    client.send(Generate(id=1, echo_ids=True, **prompt))  # type: ignore[arg-type]  # a prompt in one of its forms
    assert client.expect(Accepted).prompt_ids == ids
    assert unpack_int32(frontend.scheduler.expect(Submit).prompt_token_ids).tolist() == ids


def test_a_prompt_can_be_asked_for_alone(make_frontend: MakeFrontend) -> None:
    """Nothing reaches the scheduler, and the client's share is free again."""
    frontend = make_frontend(tokenizer=with_beginning(), open_requests=1)
    client = frontend.welcome()
    for number, (special, ids, text) in enumerate(((True, [0, 1, 2], "<s> a b"), (False, [1, 2], "a b"))):
        client.send(
            Generate(id=number, text="a b", echo_ids=True, echo_text=True, special_tokens=special, prompt_only=True)
        )
        accepted = client.expect(Accepted)
        assert (accepted.prompt_tokens, accepted.prompt_ids, accepted.prompt_text) == (len(ids), ids, text)
        done = client.expect(Done)
        assert (done.finish, done.usage.prompt_tokens) == ([], len(ids))
    client.send(Generate(id=5, prompt_ids=[1] * 4097, prompt_only=True))
    error = client.expect(Error)
    assert (error.code, error.message) == (
        "never_fits",
        "the prompt has 4097 tokens, at most 4096 are told of one: split it",
    )
    client.send(Generate(id=6, prompt_ids=[1] * 4096, prompt_only=True))
    assert client.expect(Accepted).prompt_ids is None, "it was not asked for"
    client.expect(Done)
    client.send(Generate(id=7, prompt_ids=[1], special_tokens=False))
    assert client.expect(Error).code == "bad_request"
    client.send(Generate(id=8, prompt_ids=[9]))
    assert unpack_int32(frontend.scheduler.expect(Submit).prompt_token_ids).tolist() == [9]


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (msgspec.msgpack.encode({"versions": [2, 3]}), "unsupported_version"),
        (msgspec.msgpack.encode({"client": 7}), "bad_request"),
        (b"\xc1", "bad_frame"),
        (b"\x80", "overloaded"),
    ],
)
def test_what_hello_may_be_answered_with(make_frontend: MakeFrontend, body: bytes, code: str) -> None:
    """Forbidden and a chosen routing id: see test_peers.py; draining: see test_sessions.py."""
    assert re.search(rf"- (\w+ or )?{code}( or \w+)?: ", DOCUMENT)
    frontend = make_frontend(max_sessions=0)
    client = frontend.connect()
    client.send_raw(b"GG\x01H", body)
    error = client.expect(Error)
    assert (error.code, error.about, error.id) == (code, "hello", None)
    assert (error.retry_after_ms is not None) == (code == "overloaded")


def test_what_the_control_socket_answers(frontend: Frontend) -> None:
    table = re.search(r"\| sent on the control socket \| answer there \|(.*?)\| pong, bye \| nothing \|", DOCUMENT)
    assert table is not None
    client, control = frontend.welcome(), frontend.connect(control=True)
    control.send(Ping(t=5))
    assert control.expect(Pong).t == 5
    control.send(StatsRequest())
    frontend.scheduler.expect(SchedulerStatsRequest)
    frontend.scheduler.send(STATS)
    control.expect(Stats)
    control.send(HealthRequest())
    frontend.scheduler.send(frontend.scheduler.expect(Probe))
    control.expect(Health)
    for message in (Hello(), IDS):
        control.send(message)
        assert control.expect(Error).code == "bad_request"
    control.send(Cancel(id=1, session="none"))
    assert control.expect(Error).code == "no_session"
    open_request(frontend, client)
    control.send(Cancel(id=1, session=client.session))
    client.expect(Delta)
    client.expect(Done)
    for silent in (Pong(), Bye(), Cancel(id=1, session=client.session)):
        control.send(silent)
    assert control.receive(0.3) is None


def read_all(client: RawClient) -> list[str]:
    """Kinds of the messages up to a request's end; of deltas also how many tokens, and how the sample ended."""
    kinds = []
    while not isinstance(message := client.receive(), Done | Error):
        assert message is not None
        kinds.append(f"delta {len(message.ids)} {message.finish}" if isinstance(message, Delta) else "accepted")
    return [*kinds, type(message).__name__.lower()]


@pytest.mark.parametrize("stream", [True, False])
def test_in_which_order_the_messages_of_a_request_come(frontend: Frontend, stream: bool) -> None:
    assert says("A request that fails while it is checked has its `error` alone")
    assert says("an `error` follows the deltas of what was drawn before")
    client = frontend.welcome()
    client.send(Generate(id=1, prompt_ids=[5], sampling=Sampling(stop_token_ids=[5000]), stream=stream))
    assert read_all(client) == ["error"]
    client.send(Generate(id=1, prompt_ids=[5], sampling=Sampling(n=2), stream=stream))
    first, second = (frontend.scheduler.expect(Submit).request_id for _ in range(2))
    frontend.scheduler.send_tokens(first, [7])
    frontend.scheduler.send_tokens(second, [8], "stop")
    frontend.scheduler.send_tokens(first, [9], "length")
    kinds = read_all(client)
    assert (kinds[0], kinds[-1]) == ("accepted", "done")
    assert sum("stop" in kind or "length" in kind for kind in kinds) == 2
    assert len(kinds) == 4 or (stream and len(kinds) == 5), "the first sample's tokens may have been joined"
    client.send(Generate(id=1, prompt_ids=[5], stream=stream))
    request_id = frontend.scheduler.expect(Submit).request_id
    frontend.scheduler.send_tokens(request_id, [7])
    frontend.scheduler.send(Rejected(request_id, "DeadlineError", "too late"))
    assert read_all(client) == ["accepted", "delta 1 None", "error"]


def test_the_programs_say_what_the_tables_say() -> None:
    """Those of PROTOCOL.md, as far as can be seen without a compiler: kinds in headers, and keys."""
    text = (Path(graphgen.ipc.__file__).parent / "PROTOCOL.md").read_text()
    programs = {name: re.search(rf"```{name}\n(.*?)```", text, re.DOTALL) for name in ("go", "rust")}
    keys = {"id", "text", "sampling", "max_tokens", "temperature", "finish", "code", "message"}
    for name, program in programs.items():
        assert program is not None, name
        code = program.group(1)
        kinds = set(re.findall(r"case '(\w)'|b\"GG\\x01(\w)\"", code))
        assert {one or other for one, other in kinds} == set("WDPFE"), name
        sent = set(re.findall(r"send\(\w+, \"(\w)\"|send\(&socket, b'(\w)'", code))
        assert {one or other for one, other in sent} == set("HGQB"), name
        assert all(key in code for key in keys), name
